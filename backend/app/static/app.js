// The page's story: two photos, a look at what the server sees, a job with progress and cancel, the comparison, the deletion.
import * as api from "./api.js";
import { IDEAS, currentLanguage, duration, errorText, setLanguage, t } from "./i18n.js";
import { drawSeen, listFaces } from "./seen.js";
import { makeSlider } from "./slider.js";
import { firstPhoto, makeZone } from "./zone.js";

const $ = (id) => document.getElementById(id);
const zoneOf = (field) => document.querySelector(`.zone[data-field=${field}]`);
const slider = makeSlider($("slider"));
let seen = null; // the preview of the target
let face = 0;
let looking = null; // the preview that is under way
let job = null; // the one that is queued or running
const mine = new Set(); // the ids of all jobs of this page whose photos the server may still have
let loaded = null; // the answer of /api/v1/models
let resultUrl = null;
let retellers = []; // what was said last, to be said again in another language

// Saying things

function say(key, make) {
  retellers = retellers.filter((entry) => entry.key !== key).concat({ key, make });
  make();
}

const noteOf = (zone, key, values) => say(zone.note.id, () => (zone.note.textContent = t(key, values)));
const hint = (key, strong = false) => {
  $("hint").classList.toggle("strong", strong);
  say("hint", () => ($("hint").textContent = t(key)));
};

function announce(text) {
  $("announce").textContent = text;
}

function showOnly(name) {
  for (const part of ["empty", "working", "done"]) $(part).hidden = part !== name;
  $("problem").hidden = true;
}

function showProblem(problem) {
  say("problem", () => {
    const wait = problem.retryAfter ? ` ${t("tryAgain", { seconds: problem.retryAfter })}` : "";
    $("problem").querySelector("strong").textContent = t("failed");
    $("problem").querySelector("p").textContent = errorText(problem) + wait;
  });
  $("problem").hidden = false;
}

const problemOf = (error) => error.problem ?? { code: "internal", detail: String(error.message ?? error) };

// Photos

const target = makeZone(zoneOf("target"), async (file) => {
  looking?.abort();
  seen = null;
  face = 0;
  $("faces").hidden = true;
  hint("private");
  noteOf(target, file ? "looking" : "targetNote");
  if (!file) return;
  looking = new AbortController();
  try {
    const answer = await api.preview(file, looking.signal);
    if (target.file !== file) return;
    seen = answer;
    await target.photo.decode();
    showSeen();
  } catch (error) {
    if (error.name === "AbortError" || target.file !== file) return;
    say(target.note.id, () => (target.note.textContent = errorText(problemOf(error))));
  }
});

const reference = makeZone(zoneOf("reference"), () => hint("private"));

function showSeen() {
  const count = seen.faces.length;
  noteOf(target, count === 0 ? "noFace" : count === 1 ? "oneFace" : "manyFaces", { count });
  drawSeen(target.canvas, seen, face);
  $("faces").hidden = count < 2;
  const choose = (index) => {
    face = index;
    drawSeen(target.canvas, seen, face);
  };
  say("faces", () => listFaces($("faces").querySelector(".face-list"), target.photo, seen ?? { faces: [] }, face, choose));
}

document.addEventListener("paste", (event) => {
  const file = firstPhoto(event.clipboardData);
  if (!file) return;
  const focused = document.activeElement?.closest(".zone")?.dataset.field;
  const zone = focused === "reference" || (focused !== "target" && target.file) ? reference : target;
  zone.set(file);
  event.preventDefault();
});
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault()); // a miss must not leave the page

// The job

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});

async function start() {
  if (!$("working").hidden) return;
  if (!target.file) return refuse("needTarget", "target");
  if (!reference.file && !$("prompt").value.trim()) return refuse("needWish", "reference");
  hint("private");
  showOnly("working");
  $("start").disabled = true;
  $("working-photo").src = target.url;
  showProgress(null, () => t("sending"));
  $("stage").scrollIntoView({ behavior: "smooth", block: "nearest" });
  try {
    const chosen = seen && seen.faces.length > 1 ? face : null;
    const fields = { target: target.file, reference: reference.file, prompt: $("prompt").value, seed: $("seed").value, steps: $("steps").value, face: chosen };
    job = await api.createJob(fields);
    mine.add(job.id);
    await finish(await api.follow(job.id, showState, showStep));
  } catch (error) {
    showOnly("empty");
    showProblem(problemOf(error));
  } finally {
    $("start").disabled = false;
  }
}

function refuse(key, field) {
  hint(key, true);
  announce(t(key));
  $(field).focus();
}

function showState(state) {
  if (state.state === "queued") showProgress(null, () => (state.position > 1 ? t("queued", { position: state.position }) : t("queuedFirst")));
  if (state.state === "running") showProgress(0, () => t("preparing"));
}

function showStep({ done, total, fraction, eta_s: eta }) {
  const left = eta === null ? "" : ` · ${t("left", { time: duration(eta) })}`;
  showProgress(fraction, () => (done === total ? t("finishing") : t("step", { done, total }) + left));
}

// Spoken at the quarters only: a reader that hears every step hears nothing else.
let spoken = -1;
function showProgress(fraction, text) {
  const percent = fraction === null ? null : Math.round(fraction * 100);
  say("status", () => ($("status").textContent = text()));
  $("bar").classList.toggle("waiting", percent === null);
  if (percent === null) $("bar").removeAttribute("aria-valuenow");
  else $("bar").setAttribute("aria-valuenow", String(percent));
  $("bar").style.setProperty("--done", `${percent ?? 0}%`);
  const quarter = percent === null ? -1 : Math.floor(percent / 25);
  if (percent === null || quarter !== spoken) announce(text());
  spoken = quarter;
}

async function finish(ended) {
  if (ended.state === "cancelled") {
    mine.delete(ended.id);
    showOnly("empty");
    announce(t("cancelled"));
    return;
  }
  if (ended.state === "failed") {
    showOnly("empty");
    showProblem(ended.error);
    return;
  }
  if (resultUrl) URL.revokeObjectURL(resultUrl);
  resultUrl = URL.createObjectURL(await api.result(ended.id));
  slider.show(target.url, resultUrl);
  $("download").href = resultUrl;
  $("delete").hidden = false;
  $("deleted").hidden = true;
  showOnly("done");
  announce(t("ready"));
  $("stage").focus({ preventScroll: true });
  $("stage").scrollIntoView({ behavior: "smooth", block: "nearest" });
}

$("cancel").addEventListener("click", async () => {
  if (job) await api.deleteJob(job.id).catch((error) => showProblem(problemOf(error)));
});

$("again").addEventListener("click", () => {
  $("seed").value = String(Math.floor(Math.random() * 2 ** 31));
  start();
});

$("delete").addEventListener("click", async () => {
  try {
    for (const id of mine) {
      await api.deleteJob(id).catch((error) => {
        if (error.problem?.code !== "not_found") throw error; // its time was up already
      });
      mine.delete(id);
    }
    $("delete").hidden = true;
    $("deleted").hidden = false;
    announce(t("deleted"));
  } catch (error) {
    showProblem(problemOf(error));
  }
});

// Around it

for (const idea of IDEAS) {
  const chip = Object.assign(document.createElement("button"), { type: "button", className: "chip" });
  chip.addEventListener("click", () => ($("prompt").value = idea.prompt));
  document.querySelector(".chips").append(chip);
}

api.onKeyWanted(
  () =>
    new Promise((resolve) => {
      const dialog = $("key-dialog");
      $("key-save").onclick = () => dialog.close($("key").value);
      dialog.onclose = () => resolve(dialog.returnValue || null);
      dialog.returnValue = "";
      if (!dialog.open) dialog.showModal();
    }),
);

function showModels() {
  $("miniature").hidden = !loaded?.miniature;
  $("miniature").textContent = t("miniature");
  if (!loaded?.loaded) $("weights").textContent = t("weightsNone");
  else $("weights").textContent = t("weightsLoaded", { bundle: loaded.bundle_sha256.slice(0, 12), weights: t(loaded.miniature ? "weightsMiniature" : "weightsFull") });
}

async function askModels() {
  loaded = await api.models().catch(() => null);
  showModels();
  if (!loaded?.loaded) setTimeout(askModels, 3000);
}

function speak(language) {
  setLanguage(language);
  localStorage.setItem("deephair-language", currentLanguage());
  document.querySelectorAll(".chip").forEach((chip, index) => (chip.textContent = IDEAS[index][currentLanguage()]));
  for (const { make } of retellers) make();
  slider.describe();
  showModels();
}

for (const button of document.querySelectorAll("[data-language]")) button.addEventListener("click", () => speak(button.dataset.language));
speak(localStorage.getItem("deephair-language") ?? (navigator.language.startsWith("vi") ? "vi" : "en"));
askModels();
