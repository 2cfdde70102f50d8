// Before/after comparison: by mouse and touch anywhere on the picture, by keyboard on the handle.
import { t } from "./i18n.js";

const KEYS = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 };

export function makeSlider(root) {
  const handle = root.querySelector(".handle");
  let position = 50;

  function moveTo(percent) {
    position = Math.min(100, Math.max(0, percent));
    root.style.setProperty("--position", `${position}%`);
    describe();
  }

  // The handle stands where "after" begins, so the share of the new picture is what lies to the right of it.
  function describe() {
    root.querySelector(".before").alt = root.classList.contains("alone") ? "" : t("beforePhoto");
    root.querySelector(".after").alt = t("afterPhoto");
    handle.setAttribute("aria-valuenow", String(Math.round(position)));
    handle.setAttribute("aria-valuetext", t("showing", { percent: Math.round(100 - position) }));
  }

  function followPointer(event) {
    const box = root.getBoundingClientRect();
    moveTo(((event.clientX - box.left) / box.width) * 100);
  }

  root.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    root.setPointerCapture(event.pointerId);
    followPointer(event);
    handle.focus({ preventScroll: true });
    event.preventDefault();
  });
  root.addEventListener("pointermove", (event) => {
    if (root.hasPointerCapture(event.pointerId)) followPointer(event);
  });
  handle.addEventListener("keydown", (event) => {
    const step = KEYS[event.key];
    if (step === undefined) return;
    moveTo(position + (event.shiftKey ? step * 5 : step));
    event.preventDefault();
  });

  return {
    // before: null where only the picture is there; it then stands alone.
    show(before, after) {
      root.classList.toggle("alone", !before);
      root.querySelector(".before").src = before ?? after;
      root.querySelector(".after").src = after;
      moveTo(50);
    },
    describe,
  };
}
