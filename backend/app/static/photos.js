// The two photos: what is chosen, what the server sees in the person's photo, and the area that may change.
import * as api from "./api.js";
import { editArea } from "./editor.js";
import { word } from "./i18n.js";
import { Mask } from "./mask.js";
import { $, make, note, noteProblem, pause, problemOf, say } from "./page.js";
import { greyPng } from "./png.js";
import { drawSeen, listFaces } from "./seen.js";
import { firstPhoto, makeZone } from "./zone.js";

const LONGEST = 1024; // pixels of the painted mask's longer side
const MARGIN = 0.02; // of that side: the edge of hair that a detection misses

const zoneOf = (field) => document.querySelector(`.zone[data-field=${field}]`);
let onChange = () => {};
let offersMask = false;
let looking = null; // the preview that is under way
let seen = null; // its answer
let hair = null; // Mask: where the server sees hair, that of the largest face, which is the first
let area = null; // Mask: what the person painted; null: the server decides
let face = 0;

export const target = makeZone(zoneOf("target"), "user", look);
export const reference = makeZone(zoneOf("reference"), "environment", (file) => {
  note(reference.note, file ? "referenceChosen" : "referenceNote");
  for (const button of document.querySelectorAll("#gallery button")) button.setAttribute("aria-pressed", "false");
  onChange();
});
note(target.note, "targetNote");
note(reference.note, "referenceNote");

export function onPhotoChange(tell) {
  onChange = tell;
}

// The form fields that the photos give.
export async function photoFields() {
  const chosen = seen && seen.faces.length > 1 ? face : null;
  const mask = area && (await greyPng(seen.width, seen.height, (y) => area.row(y, seen.width, seen.height)));
  return { target: target.file, reference: reference.file, face: chosen, mask };
}

export function forgetPhotos() {
  target.set(null);
  reference.set(null);
}

async function look(file) {
  looking?.abort();
  seen = hair = area = null;
  face = 0;
  $("faces").hidden = true;
  $("edit").hidden = true;
  onChange();
  note(target.note, file ? "looking" : "targetNote");
  if (!file) return;
  looking = new AbortController();
  const { signal } = looking;
  try {
    const answer = await previewPatiently(file, signal);
    const mask = await Mask.read(answer.hair_mask_png, answer.width, answer.height, LONGEST);
    await target.photo.decode().catch(() => {}); // what the browser cannot show the server may still read
    if (signal.aborted) return;
    [seen, hair] = [answer, mask];
    showSeen();
  } catch (error) {
    if (!signal.aborted) noteProblem(target.note, problemOf(error));
  }
}

// A server that is busy or still starting is asked again; every other problem is the photo's.
async function previewPatiently(file, signal) {
  for (;;) {
    try {
      return await api.preview(file, signal);
    } catch (error) {
      if (!["busy", "starting"].includes(error.problem?.code) || signal.aborted) throw error;
      note(target.note, "waitingToLook");
      await pause(1000 * (Number(error.problem.retryAfter) || 2));
      signal.throwIfAborted();
    }
  }
}

function showSeen() {
  tellSeen();
  $("faces").hidden = seen.faces.length < 2;
  const choose = (index) => {
    face = index;
    area = null;
    tellSeen();
  };
  say("faces", () => listFaces($("faces").querySelector(".face-list"), target.photo, seen ?? { faces: [] }, face, choose));
}

function tellSeen() {
  const count = seen.faces.length;
  note(target.note, area ? "areaMarked" : count === 0 ? "noFace" : count === 1 ? "oneFace" : "manyFaces", { count });
  target.note.classList.toggle("bad", !count);
  $("edit").hidden = !offersMask || !count;
  drawSeen(target.canvas, area ?? detected(), seen, face);
}

const detected = () => (face === 0 ? hair : new Mask(hair.width, hair.height));

// ---- the area that may change ----

export function offerMask() {
  offersMask = true;
  if (seen) tellSeen();
}

$("edit").addEventListener("click", async () => {
  const base = detected().grown(MARGIN * LONGEST);
  const painted = await editArea(target.url, area ?? base, base);
  area = painted.equals(base) || painted.empty ? null : painted;
  tellSeen();
  $("edit").focus();
});

// ---- the reference gallery ----

export async function offerGallery() {
  const looks = await api.gallery();
  const pictures = await Promise.all(looks.map(({ url }) => api.picture(url).catch(() => null)));
  const items = looks.flatMap((look, index) => (pictures[index] ? [galleryItem(look, pictures[index])] : []));
  $("gallery").querySelector(".strip").replaceChildren(...items);
  $("gallery").hidden = !items.length;
}

function galleryItem(look, blob) {
  const picture = make("img", { src: URL.createObjectURL(blob), alt: "", width: 88, height: 88 });
  const button = make("button", { type: "button", className: "look" }, picture);
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    reference.set(new File([blob], "gallery", { type: blob.type }));
    button.setAttribute("aria-pressed", "true");
  });
  const stem = look.name.replace(/\.\w+$/, "");
  say(`look-${stem}`, () => {
    button.title = word("looks", stem, look.title);
    button.setAttribute("aria-label", button.title);
  });
  return make("li", {}, button);
}

// ---- from anywhere on the page ----

document.addEventListener("paste", (event) => {
  const file = firstPhoto(event.clipboardData);
  if (!file || document.querySelector("dialog[open]")) return;
  const focused = document.activeElement?.closest(".zone")?.dataset.field;
  const zone = focused === "reference" || (focused !== "target" && target.file) ? reference : target;
  zone.set(file);
  event.preventDefault();
});
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault()); // a miss must not leave the page
