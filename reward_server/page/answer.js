// The answer in numbers: the reward, how it came about, and both similarities as bars.

import { brief, plain, signed } from "./numbers.js";

const BAR_ENDS = [0.25, 0.5, 1, 2.5, 5, 10]; // a bar's full length: steps, so that the bars of two tries compare
const at = (id) => document.getElementById(id);

/** `change`: by how much the reward moved since the try before, null where there was none. */
export function showAnswer(request, answer, change) {
  const { preference_scale: scale, isImageOnly } = request;
  const [positive, negative] = [answer.positive_similarity, answer.negative_similarity];
  at("result").dataset.state = "full";
  Object.assign(at("reward"), { value: answer.reward, textContent: plain(answer.reward) });
  at("change").textContent = change === null ? "" : `${signed(change)} since the try before`;
  at("sum").textContent = isImageOnly
    ? `(1 + ${plain(scale, 2)}) × ${plain(positive)}. This reward judges the picture alone and reads no text.`
    : `(1 + ${plain(scale, 2)}) × ${plain(positive)} − ${plain(negative)}`;
  at("scorer").textContent = `Scored by ${shortened(answer.scorer)}`;
  at("request").textContent = `Request ${answer.request_id}`;
  at("scorer").title = answer.scorer;
  showBars(request, [positive, negative]);
  const moved = change === null ? "" : `, ${signed(change)}`;
  const similarities = `${request.positive} ${plain(positive)}, ${request.negative} ${plain(negative)}`;
  at("spoken").textContent = `Reward ${plain(answer.reward)}${moved}. ${isImageOnly ? "" : similarities}`;
}

/** No number, and `text` in its place. */
export function showNoAnswer(text) {
  at("result").dataset.state = "empty";
  Object.assign(at("reward"), { value: "", textContent: "–" });
  for (const id of ["change", "scorer", "request", "spoken"]) at(id).textContent = "";
  for (const id of ["bars", "bars-help"]) at(id).hidden = true;
  at("sum").textContent = text;
}

/** What is on show no longer answers the request: an answer is under way, or was refused. */
export function markStale(isBusy) {
  const result = at("result");
  if (result.dataset.state === "full") result.dataset.state = "stale";
  result.setAttribute("aria-busy", String(isBusy));
}

function showBars({ prompt, positive, negative, isImageOnly }, values) {
  const largest = Math.max(...values.map(Math.abs));
  const end = BAR_ENDS.find((one) => one >= largest) ?? largest;
  const low = Math.min(...values) < 0 ? -end : 0;
  showBar(at("positive-bar"), positive, prompt, values[0], low, end);
  showBar(at("negative-bar"), negative, prompt, values[1], low, end);
  const ends = `${low ? `−${brief(end)}` : "0"} to ${brief(end)}`;
  at("bars-help").textContent = `Cosine similarity of the picture with each text; the bars run from ${ends}.`;
  for (const id of ["bars", "bars-help"]) at(id).hidden = isImageOnly;
}

function showBar(bar, word, prompt, value, low, end) {
  const name = document.createElement("strong");
  name.textContent = `${word}.`;
  bar.querySelector("dt").replaceChildren(name, ` ${prompt}`); // the text that the service compares with
  Object.assign(bar.querySelector("data"), { value, textContent: plain(value) });
  const fill = bar.querySelector(".fill").style;
  fill.left = `${(100 * (Math.min(value, 0) - low)) / (end - low)}%`;
  fill.width = `${(100 * Math.abs(value)) / (end - low)}%`;
  bar.querySelector(".track").classList.toggle("two-sided", low < 0);
}

/** name@sha256:0123abcd… */
function shortened(scorer) {
  return scorer.replace(/(sha256:[0-9a-f]{8})[0-9a-f]+/, "$1…");
}
