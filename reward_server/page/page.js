// The page's wiring: what is asked, when it is asked, and what happens to the answer or the refusal.

import { markStale, showAnswer, showNoAnswer } from "./answer.js";
import { History } from "./history.js";
import { hasMap, mode, setMap, show as showMap, showOpacity } from "./map_view.js";
import { SCALED_PX, drawExample, readPicture, scaledDown, toBase64 } from "./picture.js";
import { Refusal, listRewards, score, useKey } from "./service.js";

const PAUSE_MS = 350; // of typing, before the service is asked
const MAY_PASS = [0, 408, 429, 500, 502, 503, 504]; // may go better the next time
const TEXTS = ["prompt", "positive", "negative"];
const MISSING = { picture: "a picture", prompt: "a prompt", positive: "the first word", negative: "the second word" };
const UNREAD = "unread"; // as a text for a reward that reads none: the service wants one
const EXAMPLE = { prompt: "red heart", positive: "3D", negative: "Flat" };

const at = (id) => document.getElementById(id);
const history = new History(at("history"), bringBack);
const touched = new Set(); // texts that have been left once: only these are called missing at the field

let rewards = [];
let picture = null;
let asking = null; // AbortController of the request under way
let timer = 0;
let edit = 0; // answers that come while one control is being used share a row of the history
let inUse = null; // the control being used
let again = start; // what "Try again" does

// --- the request ---

async function start() {
  again = start;
  try {
    rewards = await listRewards();
  } catch (error) {
    showRefusal(error);
    return;
  }
  at("model").replaceChildren(...rewards.map(({ name }) => new Option(name, name)));
  at("reward-field").hidden = rewards.length < 2;
  at("served-name").textContent = `Served here: ${rewards.map(({ name }) => name).join(", ")}`;
  changed(0);
}

/** Marks the answer as stale after a change of the request, and sends the new one after a pause. */
function changed(pauseMs = PAUSE_MS) {
  clearTimeout(timer);
  asking?.abort();
  at("failure").hidden = true;
  const missing = findMissing();
  showMissing(missing);
  if (missing.length > 0 || rewards.length === 0) {
    markStale(false);
    setMap(null);
    showNoAnswer(missing.length > 0 ? `Still missing: ${listed(missing.map((name) => MISSING[name]))}.` : "");
    return;
  }
  markStale(true);
  timer = setTimeout(ask, pauseMs);
}

async function ask() {
  const mine = new AbortController();
  asking = mine;
  again = ask;
  at("failure").hidden = true;
  markStale(true);
  const request = readRequest();
  let answer;
  try {
    answer = await score(await bodyOf(request), mine.signal);
  } catch (error) {
    if (!mine.signal.aborted) showRefusal(error);
    return;
  }
  if (mine.signal.aborted) return; // a newer request has taken over
  markStale(false);
  showAnswer(request, answer, history.add({ ...request, scorer: answer.scorer, reward: answer.reward }));
  setMap(answer.heat_map ?? null);
}

function readRequest() {
  const texts = Object.fromEntries(TEXTS.map((name) => [name, at(name).value.trim() || UNREAD]));
  const preference_scale = at("scale").valueAsNumber;
  return { picture, edit, model: at("model").value, isImageOnly: isImageOnly(), preference_scale, ...texts };
}

async function bodyOf({ picture, model, prompt, positive, negative, preference_scale }) {
  const image = await toBase64(picture);
  return { image, prompt, positive, negative, preference_scale, reward: model, with_heat_map: mode() !== "off" };
}

function findMissing() {
  const empty = isImageOnly() ? [] : TEXTS.filter((name) => !at(name).value.trim());
  return picture ? empty : ["picture", ...empty];
}

function listed(names) {
  return new Intl.ListFormat("en").format(names);
}

function isImageOnly() {
  return Boolean(rewards.find(({ name }) => name === at("model").value)?.is_image_only);
}

// --- what is missing, what was refused ---

function showMissing(missing) {
  for (const name of TEXTS) {
    const isWrong = missing.includes(name) && touched.has(name);
    at(`${name}-error`).hidden = !isWrong;
    at(name).setAttribute("aria-invalid", String(isWrong));
    at(name).disabled = isImageOnly();
  }
  at("swap").disabled = isImageOnly();
}

function showRefusal(error) {
  markStale(false);
  if (!(error instanceof Refusal)) throw error;
  setMap(null);
  showNoAnswer("No answer: see the message at the top.");
  const { status, message, requestId, retryAfterS } = error;
  at("failure-text").textContent = retryAfterS ? `${message} (wait ${retryAfterS} s)` : message;
  at("failure-id").textContent = requestId ? `Request ${requestId}` : "";
  at("key-form").hidden = status !== 401;
  at("retry").hidden = !MAY_PASS.includes(status);
  at("failure").hidden = false;
  if (status === 401) at("key").focus();
}

// --- the picture ---

async function choose(blob, name) {
  try {
    setPicture(await readPicture(blob, name));
  } catch (error) {
    showRefusal(new Refusal(null, error.message, "", null));
  }
}

function setPicture(chosen) {
  const isNew = picture !== chosen;
  picture = chosen;
  used(null);
  at("easel").dataset.state = "full";
  at("easel").style.setProperty("--ratio", chosen.width / chosen.height);
  Object.assign(at("picture"), { src: chosen.url, alt: `The picture: ${chosen.name}` });
  for (const id of ["figure", "map"]) at(id).hidden = false;
  at("drop-title").textContent = "Choose another picture";
  at("file-help").textContent = "or drop it, or paste it";
  at("picture-name").textContent = `${chosen.name}, ${chosen.width} × ${chosen.height}`;
  at("shrink").hidden = Math.max(chosen.width, chosen.height) <= SCALED_PX;
  at("shrink").textContent = `Scale down to ${SCALED_PX}`;
  if (isNew) setMap(null);
  changed(0);
}

async function showExample() {
  if (!isImageOnly() && TEXTS.every((name) => !at(name).value.trim())) {
    for (const name of TEXTS) at(name).value = EXAMPLE[name];
  }
  setPicture(await drawExample());
}

// --- the controls ---

function bringBack(attempt) {
  for (const name of TEXTS) at(name).value = attempt[name];
  at("model").value = attempt.model;
  at("scale").value = attempt.preference_scale;
  showScale();
  setPicture(attempt.picture);
}

function swapWords() {
  const [positive, negative] = [at("positive"), at("negative")];
  [positive.value, negative.value] = [negative.value, positive.value];
  used(null);
  changed(0);
}

/** Counts edits: going on with the same control is the same one; null, an act that is done at once, is always new. */
function used(control) {
  if (control === null || control !== inUse) edit += 1;
  inUse = control;
}

function showScale() {
  at("scale-value").textContent = at("scale").valueAsNumber.toFixed(2);
}

function wireRequest() {
  at("request-form").addEventListener("submit", (event) => {
    event.preventDefault();
    for (const name of TEXTS) touched.add(name);
    changed(0);
  });
  for (const name of TEXTS) {
    at(name).addEventListener("change", () => {
      touched.add(name);
      showMissing(findMissing());
    });
  }
  for (const name of [...TEXTS, "scale"]) {
    at(name).addEventListener("input", () => {
      used(name);
      showScale();
      changed();
    });
    at(name).addEventListener("change", () => (inUse = null));
  }
  at("model").addEventListener("change", () => {
    used(null);
    changed(0);
  });
  at("swap").addEventListener("click", swapWords);
}

function wirePicture() {
  at("file").addEventListener("change", () => {
    const [file] = at("file").files;
    at("file").value = ""; // the same file may be chosen again
    if (file) choose(file, file.name);
  });
  at("example").addEventListener("click", showExample);
  at("shrink").addEventListener("click", async () => setPicture(await scaledDown(picture)));
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (!file) return;
    event.preventDefault();
    choose(file, "pasted picture");
  });
  const isFile = (event) => event.dataTransfer.types.includes("Files");
  const mark = (isOver) => at("easel").classList.toggle("over", isOver);
  document.addEventListener("dragover", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) mark(false); // out of the window
  });
  document.addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    mark(false);
    const [file] = event.dataTransfer.files;
    if (file) choose(file, file.name);
  });
}

function wireMap() {
  at("opacity").addEventListener("input", showOpacity);
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => (mode() === "off" || hasMap() ? showMap() : changed(0)));
  }
}

function wireRefusal() {
  at("retry").addEventListener("click", () => again());
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(at("key").value.trim());
    at("key").value = "";
    again();
  });
}

wireRequest();
wirePicture();
wireMap();
wireRefusal();
showMap();
showScale();
start();
