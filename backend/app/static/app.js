// The page's start: what the server offers, the form, the dialogs, language and theme.
import * as api from "./api.js";
import { currentLanguage, setLanguage, t } from "./i18n.js";
import { readOffers } from "./offers.js";
import { $, announce, note, pause, problemOf, problemText, radios, say, sayAgain, segments } from "./page.js";
import { forgetPhotos, offerGallery, offerMask, onPhotoChange, photoFields, reference, target } from "./photos.js";
import { clearStage, describeStage, expect, hideProblem, MOST, showProblem } from "./stage.js";
import { cancel, eraseAll, remembered, takeUp, tryOn } from "./tryon.js";
import { offerSampling, offerWishes, sayAnything, wishes } from "./wish.js";

const LAST_SEED = 2 ** 32 - 1;
let count = 1; // variants of one run

// ---- the form ----

const hint = (key, strong = false) => {
  note($("hint"), key);
  $("hint").classList.toggle("bad", strong);
};
hint("private");
note($("empty-text"), "empty");
onPhotoChange(() => {
  hint("private");
  note($("empty-text"), "empty");
});
radios($("counts").querySelector(".segments"), "count", ["1", "2", "3", "4"], "1", (value) => value, (value) => (count = Number(value)));

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
$("retry").addEventListener("click", () => start());
$("again").addEventListener("click", () => {
  $("seed").value = String(wrapped(firstSeed() + count));
  start();
});
$("cancel").addEventListener("click", cancel);

const firstSeed = () => Math.min(LAST_SEED, Math.max(0, Math.floor(Number($("seed").value) || 0)));
const wrapped = (seed) => seed % (LAST_SEED + 1);

async function start() {
  if ($("start").disabled) return;
  const wanted = wishes();
  if (!target.file) return refuse("needTarget", "target");
  if (!reference.file && !sayAnything(wanted)) return refuse("needWish", "reference");
  hint("private");
  hideProblem();
  const seeds = Array.from({ length: count }, (_, index) => wrapped(firstSeed() + index));
  const shots = expect(seeds, URL.createObjectURL(target.file));
  const below = matchMedia("(max-width: 939px)").matches; // style.css puts the stage beside the form from there on
  $("stage").scrollIntoView({ behavior: "smooth", block: below ? "start" : "nearest" });
  $("stage").focus({ preventScroll: true });
  await alone(async () => {
    const { taken, refusal } = await tryOn({ ...(await photoFields()), ...wanted }, shots);
    if (!taken || !refusal) return;
    say("hint", () => ($("hint").textContent = t("notAll", { ready: taken, count: seeds.length, reason: problemText(refusal) })));
  });
}

// One run at a time.
async function alone(work) {
  $("start").disabled = true;
  try {
    await work();
  } catch (error) {
    showProblem(problemOf(error));
  } finally {
    $("start").disabled = false;
  }
}

// Goes on with what this tab had begun before the page was loaded again. The photo itself is not kept anywhere, so the picture stands alone.
async function resume() {
  const jobs = (await remembered()).slice(0, MOST);
  if (!jobs.length || $("start").disabled) return;
  await alone(() => takeUp(jobs, expect(jobs.map(() => null), null)));
}

function refuse(key, field) {
  hint(key, true);
  announce(t(key));
  $(field).focus();
}

// ---- dialogs ----

$("delete").addEventListener("click", () => $("delete-dialog").showModal());
$("delete-keep").addEventListener("click", () => $("delete-dialog").close());
$("delete-now").addEventListener("click", async () => {
  $("delete-dialog").close();
  try {
    await eraseAll();
    clearStage();
    forgetPhotos();
    note($("empty-text"), "deleted");
    announce(t("deleted"));
    $("stage").focus();
  } catch (error) {
    showProblem(problemOf(error));
  }
});

api.onKeyWanted(
  () =>
    new Promise((resolve) => {
      const dialog = $("key-dialog");
      let key = null;
      $("key-form").onsubmit = (event) => {
        event.preventDefault();
        key = $("key").value;
        dialog.close();
      };
      dialog.onclose = () => resolve(key);
      $("key").value = "";
      dialog.showModal();
    }),
);

// ---- the server ----

function sayWeights(models) {
  say("weights", () => {
    const weights = t(models?.miniature ? "weightsMiniature" : "weightsFull");
    const bundle = models?.bundle_sha256?.slice(0, 12);
    $("weights").textContent = models?.loaded ? t("weightsLoaded", { bundle, weights }) : t(models ? "weightsNone" : "weightsUnknown");
    $("miniature").textContent = t("miniature");
  });
  $("miniature").hidden = !models?.miniature;
}

async function watchModels() {
  for (;;) {
    const models = await api.models().catch(() => null);
    sayWeights(models);
    offerSampling(models?.sampling);
    if (models?.loaded) return;
    await pause(3000);
  }
}

async function askOffers() {
  const offers = await readOffers().catch(() => null);
  if (!offers) return; // two photos and words, which every version takes
  offerWishes(offers);
  if (offers.mask) offerMask();
  if (offers.gallery) await offerGallery().catch(() => {});
}

// ---- language and theme ----

const pressLanguage = segments([...document.querySelectorAll("[data-language]")], "language", speak);

function speak(language) {
  setLanguage(language);
  pressLanguage(currentLanguage());
  localStorage.setItem("deephair-language", currentLanguage());
  sayAgain();
  describeStage();
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

$("theme").addEventListener("click", () => {
  const shown = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  setTheme(shown === "dark" ? "light" : "dark");
  localStorage.setItem("deephair-theme", document.documentElement.dataset.theme);
});

setTheme(localStorage.getItem("deephair-theme"));
speak(localStorage.getItem("deephair-language") ?? (navigator.language.startsWith("vi") ? "vi" : "en"));
watchModels();
askOffers();
resume().catch((error) => showProblem(problemOf(error)));
