// The results: one picture against the photo under the slider, or all of them side by side, and a tile for each.
import { t } from "./i18n.js";
import { $, make, problemText, say, segments } from "./page.js";
import { makeSlider } from "./slider.js";

export const MOST = 12; // pictures that are kept; the oldest goes first

// A shot is {number, seed, before, url}: before and url are the photo's and the picture's addresses. url is null until it is there; before is
// null, and so is seed until then, where an earlier load of the page began it.
let shots = [];
let count = 0; // of all shots that there ever were
let chosen = null;
let view = "compare";
let working = false;
const slider = makeSlider($("slider"));

export const hasShots = () => shots.length > 0;

// Makes room for what is about to be painted.
export function expect(seeds, before) {
  const fresh = seeds.map((seed) => ({ number: (count += 1), seed, before, url: null }));
  const kept = shots.slice(Math.max(0, shots.length + fresh.length - MOST));
  release(shots.filter((shot) => !kept.includes(shot)), kept);
  shots = [...kept, ...fresh];
  chosen = null;
  view = "compare";
  if (before) $("waiting-photo").src = before;
  else $("waiting-photo").removeAttribute("src");
  render();
  return fresh;
}

export function arrive(shot, blob) {
  shot.url = URL.createObjectURL(blob);
  if (!chosen) choose(shot);
  else render();
}

// What will not come any more.
export function drop(shot) {
  shots = shots.filter((other) => other !== shot);
  if (!working && !chosen) chosen = shots.findLast(({ url }) => url) ?? null;
  render();
}

export function setWorking(now) {
  working = now;
  if (!working && !chosen) choose(shots.findLast(({ url }) => url) ?? null);
  else render();
}

export function clearStage() {
  release(shots);
  shots = [];
  count = 0;
  chosen = null;
  render();
}

function release(old, kept = []) {
  for (const { url, before } of old) {
    if (url) URL.revokeObjectURL(url);
    if (before && !kept.some((shot) => shot.before === before)) URL.revokeObjectURL(before);
  }
}

function choose(shot) {
  chosen = shot;
  if (shot) {
    slider.show(shot.before, shot.url);
    $("slider-note").hidden = !shot.before;
    $("download").href = shot.url;
    $("download").download = `deephair-${shot.seed}.png`;
  }
  render();
}

function render() {
  const ready = shots.filter(({ url }) => url);
  const sheet = view === "sheet" && ready.length > 1;
  $("empty").hidden = Boolean(chosen) || working;
  $("waiting").hidden = Boolean(chosen) || !working || !$("waiting-photo").hasAttribute("src");
  $("compare").hidden = !chosen || sheet;
  $("sheet").hidden = !sheet;
  $("running").hidden = !working;
  $("variants").hidden = shots.length < 2;
  $("actions").hidden = !chosen;
  $("again").disabled = working;
  $("variants").querySelector(".segments").hidden = ready.length < 2;
  pressView(sheet ? "sheet" : "compare");
  say("tiles", () => $("tiles").replaceChildren(...shots.map(tile)));
  if (sheet) say("sheet", () => $("sheet").replaceChildren(...before(), ...ready.map(sheetItem)));
}

function tile(shot) {
  const name = t(shot.url ? "variant" : "variantWaiting", { number: shot.number });
  const button = make("button", { type: "button", className: "tile", title: name, disabled: !shot.url });
  button.append(shot.url ? make("img", { src: shot.url, alt: "" }) : make("span", { className: "pending" }), make("span", { textContent: String(shot.number) }));
  button.setAttribute("aria-label", name);
  button.setAttribute("aria-pressed", String(shot === chosen));
  button.addEventListener("click", () => {
    choose(shot);
    $("tiles").querySelector("[aria-pressed=true]").focus();
  });
  return make("li", {}, button);
}

const before = () => (chosen.before ? [figure(chosen.before, t("before"))] : []);

function figure(url, caption) {
  return make("li", {}, make("figure", {}, make("img", { src: url, alt: "" }), make("figcaption", { textContent: caption })));
}

function sheetItem(shot) {
  const item = figure(shot.url, t("variant", { number: shot.number }));
  item.classList.toggle("chosen", shot === chosen);
  return item;
}

const pressView = segments([...document.querySelectorAll("[data-view]")], "view", (value) => {
  view = value;
  render();
});

// ---- problems ----

const WORTH_A_RETRY = ["network", "queue_full", "busy", "starting", "storage", "out_of_memory", "internal"];

export function showProblem(problem) {
  say("problem", () => {
    $("problem").querySelector("strong").textContent = t("failed");
    $("problem").querySelector("p").textContent = problemText(problem);
  });
  $("retry").hidden = !WORTH_A_RETRY.includes(problem.code);
  $("problem").hidden = false;
}

export function hideProblem() {
  $("problem").hidden = true;
}

export const describeStage = () => slider.describe();
