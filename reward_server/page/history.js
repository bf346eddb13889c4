// What was tried in this visit: a table, newest first, and the reward's trail. Gone with the tab.

import { plain, signed } from "./numbers.js";

const MAX_TRIES = 50;
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, EDGE] = [240, 48, 6]; // of the trail's view box

/**
 * `section` holds #tries and #trail. A try is {picture: {name, url}, model, isImageOnly, prompt, positive, negative,
 * preference_scale, scorer, reward, edit}; onBringBack is called with one. Tries of one edit (a word being typed)
 * share a row.
 */
export class History {
  constructor(section, onBringBack) {
    this.section = section;
    this.rows = section.querySelector("#tries");
    this.trail = section.querySelector("#trail");
    this.onBringBack = onBringBack;
    this.tries = [];
    this.count = 0;
  }

  /** Adds the try and returns by how much the reward moved, null where nothing comparable came before. */
  add(attempt) {
    const last = this.tries.at(-1);
    if (last && isSame(last, attempt)) return last.change; // asked again: nothing moved
    if (last?.edit === attempt.edit) {
      this.tries.pop();
      this.rows.firstElementChild.remove();
    } else {
      this.count += 1;
    }
    const before = this.tries.findLast((one) => one.scorer === attempt.scorer);
    const change = before ? attempt.reward - before.reward : null;
    this.tries.push({ ...attempt, change });
    this.rows.prepend(this.row(attempt, change));
    if (this.tries.length > MAX_TRIES) {
      this.tries.shift();
      this.rows.lastElementChild.remove();
    }
    this.section.hidden = false;
    this.drawTrail(attempt.scorer);
    return change;
  }

  row(attempt, change) {
    const row = document.createElement("tr");
    const picture = document.createElement("img");
    Object.assign(picture, { src: attempt.picture.url, alt: attempt.picture.name, title: attempt.picture.name });
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "quiet", textContent: "Bring back" });
    button.setAttribute("aria-label", `Bring back try ${this.count}`);
    button.addEventListener("click", () => this.onBringBack(attempt));
    const texts = attempt.isImageOnly ? ["–", "–", "–"] : [attempt.positive, attempt.negative, attempt.prompt];
    row.append(
      cell(picture),
      cell(plain(attempt.reward), "n"),
      cell(change === null ? "" : signed(change), "n"),
      ...texts.map((text) => cell(text)),
      cell(plain(attempt.preference_scale, 2), "n"),
      cell(button),
    );
    return row;
  }

  /** The rewards of one scorer in order; rewards of two scorers have no common scale. */
  drawTrail(scorer) {
    const rewards = this.tries.filter((one) => one.scorer === scorer).map((one) => one.reward);
    const [low, high] = [Math.min(...rewards, 0), Math.max(...rewards, 0)];
    const x = (index) => EDGE + (index * (WIDTH - 2 * EDGE)) / Math.max(rewards.length - 1, 1);
    const y = (reward) => HEIGHT - EDGE - ((reward - low) * (HEIGHT - 2 * EDGE)) / (high - low || 1);
    const points = rewards.map((reward, index) => `${x(index)},${y(reward)}`).join(" ");
    this.trail.replaceChildren(
      shape("line", { class: "zero", x1: 0, x2: WIDTH, y1: y(0), y2: y(0) }),
      shape("polyline", { points }),
      shape("circle", { cx: x(rewards.length - 1), cy: y(rewards.at(-1)), r: 3.5 }),
    );
    this.trail.setAttribute("aria-label", `Rewards so far: ${rewards.map((reward) => plain(reward)).join(", ")}`);
  }
}

function isSame(one, other) {
  const fields = ["picture", "model", "prompt", "positive", "negative", "preference_scale"];
  return fields.every((field) => one[field] === other[field]);
}

function cell(content, className = "") {
  const cell = document.createElement("td");
  cell.className = className;
  cell.append(content);
  return cell;
}

function shape(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
