// The heat map over the picture with its controls: mode, opacity, legend, and words for those who do not see it.

import { decode, draw, strongestPlace } from "./heat_map.js";
import { brief } from "./numbers.js";

const at = (id) => document.getElementById(id);
const MODES = {
  magnitude: {
    ends: ["none", "strong"],
    help: "Color is strongest where a small change of the picture moves the reward most",
  },
  signed: { ends: ["darker", "lighter"], help: "Orange: lighter pixels raise the reward there. Blue: darker ones do" },
  off: { ends: ["", ""], help: "Off, and the service is not asked for it" },
};

let map = null; // {magnitude, signed, width_px, height_px}

export const mode = () => document.querySelector("input[name=mode]:checked").value;
export const hasMap = () => map !== null;

/** `heatMap` as the service sends it, or null to take the map away. */
export function setMap(heatMap) {
  map = heatMap && { ...heatMap, magnitude: decode(heatMap.values), signed: decode(heatMap.signed) };
  show();
}

export function show() {
  const kind = mode();
  const isDrawn = map !== null && kind !== "off";
  const { ends, help } = MODES[kind];
  at("heat").hidden = !isDrawn;
  at("legend").hidden = kind === "off";
  at("legend").dataset.mode = kind;
  [at("legend-low").textContent, at("legend-high").textContent] = ends;
  at("map-help").textContent = `${help}.`;
  if (isDrawn) drawMap(map[kind], kind, help);
  showOpacity();
}

export function showOpacity() {
  const share = at("opacity").valueAsNumber / 100;
  const text = `${at("opacity").value} %`;
  at("opacity-value").textContent = text;
  at("opacity").setAttribute("aria-valuetext", text);
  at("heat").style.opacity = share;
  at("picture").style.filter = at("heat").hidden ? "" : `grayscale(${Math.min(2 * share, 1)})`; // all color is the map's
}

function drawMap(values, kind, help) {
  const place = strongestPlace(map.magnitude, map);
  const full = draw(at("heat"), values, map, kind === "signed");
  at("heat").setAttribute("aria-label", `Heat map of the reward's gradient: most of it in the ${place} of the picture`);
  const scale = `Full color: ${brief(full)} of reward per unit of light`;
  at("map-help").textContent = `${help}. Most of it is in the ${place}. ${scale}.`;
}
