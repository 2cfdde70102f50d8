// What every part of the page uses: finding elements, making them, saying things again in another language, and announcing them.
import { errorText, t } from "./i18n.js";

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

// What was said last under each key; a change of language says it again.
const said = new Map();

export function say(key, tell) {
  said.set(key, tell);
  tell();
}

export function sayAgain() {
  for (const tell of said.values()) tell();
}

export function note(element, key, values) {
  element.classList.remove("bad");
  say(element.id, () => (element.textContent = t(key, values)));
}

export function noteProblem(element, problem) {
  element.classList.add("bad");
  say(element.id, () => (element.textContent = problemText(problem)));
}

export function problemText(problem) {
  const wait = problem.retryAfter ? ` ${t("tryAgain", { seconds: problem.retryAfter })}` : "";
  return errorText(problem) + wait;
}

export const problemOf = (error) => error.problem ?? { code: "internal", detail: String(error.message ?? error) };

export function announce(text) {
  $("announce").textContent = text;
}

// Buttons of which one is pressed; calls onChoose(value of data-NAME).
export function segments(buttons, name, onChoose) {
  const press = (value) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset[name] === value));
  };
  for (const button of buttons)
    button.addEventListener("click", () => {
      press(button.dataset[name]);
      onChoose(button.dataset[name]);
    });
  return press;
}

// Radio buttons that look like segments. label(value) is asked again for another language.
export function radios(box, name, values, chosen, label, onChoose = () => {}) {
  const parts = values.map((value) => {
    const input = make("input", { type: "radio", name, value, checked: value === chosen });
    input.addEventListener("change", () => onChoose(value));
    return { value, input, text: make("span") };
  });
  box.replaceChildren(...parts.map(({ input, text }) => make("label", {}, input, text)));
  say(`radios-${name}`, () => parts.forEach(({ value, text }) => (text.textContent = label(value))));
}

export const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));
