// What the person wants beside the photos: words, pickers, what may change and how strongly.
import { t, word } from "./i18n.js";
import { $, make, radios, say } from "./page.js";

// How a hair colour looks, for people who rather see than read; a colour without an entry is shown by its name only.
const TONES = {
  black: "#1d191a",
  "natural brown": "#4a3427",
  "reddish brown": "#74301f",
  "golden brown": "#a0712f",
  "ash brown": "#7b7264",
  ombre: "linear-gradient(#3a2a23 35%, #c99b5f 80%)",
  "two-tone": "linear-gradient(90deg, #2e2624 50%, #b3563f 50%)",
  "pinkish brown": "#a0656a",
  blonde: "#d9b36c",
  gray: "#9b9a98",
  red: "#a8301f",
};
// Which pickers mean something in a mode; all of them in one that is not named.
const ABOUT = { colour: ["color"], shape: ["length", "curl", "bangs"] };

const chosen = { color: "" };
let pickers = {};
let offered = {};
let fewSteps = false;
let mode = null; // where the server knows no modes

export function offerWishes(offers) {
  offered = offers;
  pickers = offers.pickers;
  const { color, ...others } = pickers;
  document.querySelector(".selects").replaceChildren(...Object.entries(others).map(([name, values]) => select(name, values)));
  if (color) swatches(color);
  $("pickers").hidden = !Object.keys(pickers).length;
  mode = offers.mode?.first ?? null;
  $("modes").hidden = !offers.mode;
  if (offers.mode) radios($("modes").querySelector(".segments"), "mode", offers.mode.values, mode, (value) => t(`mode_${value}`), choose);
  showManner();
  choose(mode);
}

// A few-step LoRA knows its own steps and begins with noise alone: neither is offered then.
export function offerSampling(sampling) {
  fewSteps = Boolean(sampling?.few_step);
  showManner();
}

function showManner() {
  $("strength-field").hidden = !offered.strength || fewSteps;
  $("steps-field").hidden = fewSteps;
  $("manner").hidden = $("modes").hidden && $("strength-field").hidden;
}

function choose(value) {
  mode = value;
  for (const part of document.querySelectorAll("[data-picker]")) part.hidden = !means(part.dataset.picker);
}

const means = (picker) => picker in pickers && (ABOUT[mode]?.includes(picker) ?? true);

function select(name, values) {
  const options = ["", ...values].map((value) => make("option", { value }));
  const list = make("select", { id: `pick-${name}` }, ...options);
  list.addEventListener("change", () => (chosen[name] = list.value));
  const label = make("label", { htmlFor: list.id });
  const field = make("div", { className: "field" }, label, list);
  field.dataset.picker = name;
  say(`pick-${name}`, () => {
    label.textContent = t(`pick_${name}`);
    for (const option of options) option.textContent = option.value ? word("values", option.value) : t("asItComes");
  });
  return field;
}

function swatches(values) {
  const parts = ["", ...values].map((value) => {
    const input = make("input", { type: "radio", name: "color", value, checked: value === chosen.color });
    input.addEventListener("change", () => (chosen.color = value));
    const tone = make("span", { className: value ? "tone" : "tone any" });
    if (value in TONES) tone.style.background = TONES[value];
    const name = make("span", { className: value && value in TONES ? "hidden-input" : "tone-name" });
    return { value, label: make("label", { className: "swatch" }, input, tone, name), name };
  });
  document.querySelector(".swatch-list").replaceChildren(...parts.map(({ label }) => label));
  say("pick-color", () => {
    for (const { value, label, name } of parts) {
      name.textContent = value ? word("values", value) : t("asItComes");
      label.title = name.textContent;
    }
  });
}

const strength = $("strength");
const tellStrength = () => ($("strength-value").textContent = t("percent", { n: Math.round(strength.value * 100) }));
strength.addEventListener("input", tellStrength);
say("strength", tellStrength);

// The form fields of a job; what is at its default is left out.
export function wishes() {
  const fields = { prompt: $("prompt").value.trim() };
  if (!$("steps-field").hidden) fields.steps = $("steps").value;
  for (const [name, value] of Object.entries(chosen)) if (means(name)) fields[name] = value;
  if (mode) fields.mode = mode;
  if (!$("strength-field").hidden && strength.value !== "1") fields.strength = strength.value;
  return fields;
}

// Whether they say anything about the hair.
export function sayAnything(fields) {
  return Boolean(fields.prompt || Object.keys(chosen).some((name) => fields[name]));
}
