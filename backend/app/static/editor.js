// The dialog in which the area that may change is painted: brush, eraser, undo, zoom and pan, by mouse, pen, fingers and keyboard.
import { t } from "./i18n.js";
import { History, tint } from "./mask.js";
import { $, segments } from "./page.js";
import { View } from "./view.js";

const TOOLS = { b: "brush", e: "eraser", h: "move" };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const dialog = $("editor");
const viewport = $("viewport");
const canvas = $("editor-mask");
const size = $("brush-size");
const view = new View(viewport, $("board"), onView);
const pointers = new Map(); // the fingers or the mouse on the viewport, by id
let mask = null;
let detected = null;
let history = null;
let tool = "brush";
let action = null; // what the pointers do: "paint", "move" or "pinch"
let cursor = { x: 0, y: 0 }; // of the keyboard and of the pointer seen last
let penDown = false; // the keyboard's brush touches the photo
let close = () => {};

// Opens the editor on a photo; resolves to the painted mask when it is closed. `start` is what is shown, `base` what "as detected" gives.
export async function editArea(url, start, base) {
  detected = base;
  mask = start.copy();
  history = new History();
  penDown = false;
  $("editor-photo").src = url;
  canvas.width = mask.width;
  canvas.height = mask.height;
  choose("brush");
  dialog.showModal();
  view.show(mask.width, mask.height);
  cursor = { x: viewport.clientWidth / 2, y: viewport.clientHeight / 2 };
  redraw();
  viewport.focus();
  await new Promise((resolve) => (close = resolve));
  return mask;
}

dialog.addEventListener("close", () => close());
$("editor-done").addEventListener("click", () => dialog.close());

// ---- painting ----

function paint(from, to) {
  const [a, b] = [from, to].map((place) => view.toBoard(place));
  tint(canvas, mask, mask.stroke(a, b, size.value / 2 / view.scale, tool === "eraser" ? 0 : 1));
}

function redraw() {
  tint(canvas, mask);
  $("undo").disabled = !history.past.length;
  $("redo").disabled = !history.future.length;
}

function keep() {
  history.keep(mask);
  $("undo").disabled = false;
  $("redo").disabled = true;
}

const undo = () => history.undo(mask) && redraw();
const redo = () => history.redo(mask) && redraw();

function reset() {
  keep();
  mask.data = detected.data.slice();
  redraw();
  tell("areaReset");
}

function tell(key) {
  $("editor-say").textContent = t(key);
}

const pressTool = segments([...dialog.querySelectorAll("[data-tool]")], "tool", choose);
function choose(chosen) {
  tool = chosen;
  pressTool(tool);
  viewport.dataset.tool = tool;
  drawCursor();
}

$("undo").addEventListener("click", undo);
$("redo").addEventListener("click", redo);
$("editor-reset").addEventListener("click", reset);
size.addEventListener("input", () => {
  cursor = { x: viewport.clientWidth / 2, y: viewport.clientHeight / 2 }; // shows the size in the middle
  drawCursor(true);
});

// ---- zoom and pan ----

const middle = () => ({ x: viewport.clientWidth / 2, y: viewport.clientHeight / 2 });
$("zoom-in").addEventListener("click", () => view.zoomAt(middle(), 1.5));
$("zoom-out").addEventListener("click", () => view.zoomAt(middle(), 1 / 1.5));
$("zoom-fit").addEventListener("click", () => view.fit());
new ResizeObserver(() => dialog.open && view.zoomAt(middle(), 1)).observe(viewport);

function onView() {
  $("zoom").textContent = t("percent", { n: Math.round(view.zoom * 100) });
}

viewport.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    view.zoomAt(placeOf(event), Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)));
  },
  { passive: false },
);

// ---- mouse, pen and fingers ----

function placeOf(event) {
  const box = viewport.getBoundingClientRect();
  return { x: event.clientX - box.left - viewport.clientLeft, y: event.clientY - box.top - viewport.clientTop };
}

function drawCursor(visible = !$("cursor").hidden) {
  const ring = $("cursor");
  ring.hidden = !visible || tool === "move";
  ring.style.width = ring.style.height = `${size.value}px`;
  ring.style.transform = `translate(${cursor.x - size.value / 2}px, ${cursor.y - size.value / 2}px)`;
  ring.classList.toggle("down", penDown);
}

viewport.addEventListener("contextmenu", (event) => event.preventDefault());
viewport.addEventListener("pointerdown", (event) => {
  event.preventDefault();
  viewport.focus();
  viewport.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, placeOf(event));
  cursor = placeOf(event);
  if (pointers.size === 2) {
    if (action === "paint") {
      history.drop(mask); // what the first finger did before the second came was no stroke
      redraw();
    }
    action = "pinch";
  } else if (pointers.size === 1) {
    action = tool === "move" || event.button > 0 ? "move" : "paint";
    if (action === "paint") {
      keep();
      paint(cursor, cursor);
    }
  }
  drawCursor(event.pointerType !== "touch");
});

viewport.addEventListener("pointermove", (event) => {
  cursor = placeOf(event);
  drawCursor(event.pointerType !== "touch");
  const before = pointers.get(event.pointerId);
  if (!before) return;
  if (action === "paint") paint(before, cursor);
  if (action === "move") view.moveBy(cursor.x - before.x, cursor.y - before.y);
  if (action === "pinch") pinch(event.pointerId, before, cursor);
  pointers.set(event.pointerId, cursor);
});

function pinch(id, before, now) {
  const other = [...pointers].find(([key]) => key !== id)?.[1];
  if (!other) return;
  const distance = (place) => Math.max(8, Math.hypot(place.x - other.x, place.y - other.y));
  view.moveBy((now.x - before.x) / 2, (now.y - before.y) / 2);
  view.zoomAt({ x: (now.x + other.x) / 2, y: (now.y + other.y) / 2 }, distance(now) / distance(before));
}

for (const name of ["pointerup", "pointercancel"])
  viewport.addEventListener(name, (event) => {
    pointers.delete(event.pointerId);
    if (!pointers.size) action = null;
  });
viewport.addEventListener("pointerleave", () => document.activeElement !== viewport && drawCursor(false));

// ---- keyboard ----

dialog.addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "z" && !event.shiftKey) undo();
  else if (key === "y" || key === "z") redo();
  else return;
  event.preventDefault();
});

viewport.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in ARROWS) moveCursor(ARROWS[event.key], event.shiftKey ? 32 : 6);
  else if (event.key === " ") lowerOrLift();
  else if (event.key.toLowerCase() in TOOLS) choose(TOOLS[event.key.toLowerCase()]);
  else if (event.key === "[") size.value = Number(size.value) - 8;
  else if (event.key === "]") size.value = Number(size.value) + 8;
  else if (event.key === "+" || event.key === "=") view.zoomAt(cursor, 1.5);
  else if (event.key === "-") view.zoomAt(cursor, 1 / 1.5);
  else if (event.key === "0") view.fit();
  else return;
  event.preventDefault();
  drawCursor(true);
});

function moveCursor([dx, dy], step) {
  if (tool === "move") return view.moveBy(-dx * step, -dy * step);
  const from = cursor;
  const to = { x: cursor.x + dx * step, y: cursor.y + dy * step };
  if (penDown) paint(from, to);
  cursor = view.reveal(to);
  cursor = { x: Math.min(viewport.clientWidth, Math.max(0, cursor.x)), y: Math.min(viewport.clientHeight, Math.max(0, cursor.y)) };
}

function lowerOrLift() {
  if (tool === "move") return;
  penDown = !penDown;
  if (penDown) {
    keep();
    paint(cursor, cursor);
  }
  tell(penDown ? "penDown" : "penUp");
}
