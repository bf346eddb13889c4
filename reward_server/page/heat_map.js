// An image gradient as colors: strength in one ramp, or lighter and darker in two, transparent where nothing matters.

const CLIP = 0.995; // share of pixels below full color: a few outliers would otherwise hide all others
const STRENGTH = [[176, 16, 92], [222, 48, 58], [250, 134, 36], [255, 226, 110]]; // weak to strong
const LIGHTER = [240, 106, 20];
const DARKER = [38, 102, 232];
const ROWS = ["upper", "middle", "lower"];
const COLUMNS = ["left", "center", "right"];

/** Float32Array of the little-endian numbers in a base64 text. */
export function decode(base64) {
  const letters = atob(base64);
  const bytes = new Uint8Array(letters.length);
  for (let index = 0; index < letters.length; index += 1) bytes[index] = letters.charCodeAt(index);
  return new Float32Array(bytes.buffer); // every machine with a browser of today is little-endian
}

/** Draws values (height_px × width_px, row by row) at their own size; returns the magnitude drawn in full color. */
export function draw(canvas, values, { width_px, height_px }, isSigned) {
  Object.assign(canvas, { width: width_px, height: height_px });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width_px, height_px);
  const above = table(isSigned ? () => LIGHTER : ramp);
  const below = table(() => DARKER);
  const full = fullScale(values);
  values.forEach((value, index) => {
    const level = Math.min(Math.round((255 * Math.abs(value)) / full), 255);
    image.data.set(isSigned && value < 0 ? below[level] : above[level], 4 * index);
  });
  context.putImageData(image, 0, 0);
  return full;
}

/** "upper right": the ninth of the picture that holds most of the magnitude. */
export function strongestPlace(values, { width_px, height_px }) {
  const sums = new Float64Array(9);
  values.forEach((value, index) => {
    const row = Math.floor((3 * Math.floor(index / width_px)) / height_px);
    const column = Math.floor((3 * (index % width_px)) / width_px);
    sums[3 * row + column] += Math.abs(value);
  });
  const best = sums.indexOf(Math.max(...sums));
  return `${ROWS[Math.floor(best / 3)]} ${COLUMNS[best % 3]}`;
}

/** The CLIP quantile of the magnitudes, and never 0. */
function fullScale(values) {
  const sorted = Float32Array.from(values, Math.abs).sort();
  const last = sorted.length - 1;
  return sorted[Math.floor(CLIP * last)] || sorted[last] || 1;
}

/** Color and opacity of 256 strengths: what is weak lets the picture through. */
function table(colorOf) {
  const strengths = Array.from({ length: 256 }, (_, level) => level / 255);
  return strengths.map((strength) => [...colorOf(strength), 255 * strength]);
}

function ramp(strength) {
  const place = strength * (STRENGTH.length - 1);
  const below = Math.min(Math.floor(place), STRENGTH.length - 2);
  return STRENGTH[below].map((low, channel) => low + (place - below) * (STRENGTH[below + 1][channel] - low));
}
