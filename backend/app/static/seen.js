// What the server sees in a photo, drawn over it: the area tinted, the faces framed, the chosen one strongest.
import { t } from "./i18n.js";
import { tint } from "./mask.js";
import { make } from "./page.js";

// mask: the area to tint, on any scale of the photo; it gives the canvas its size.
export function drawSeen(canvas, mask, seen, chosen) {
  canvas.width = mask.width;
  canvas.height = mask.height;
  tint(canvas, mask);
  const pen = canvas.getContext("2d");
  const scale = mask.width / seen.width;
  seen.faces.forEach((face, index) => {
    const [left, top, right, bottom] = face.box.map((value) => value * scale);
    pen.strokeStyle = index === chosen ? "#ffffff" : "rgba(255,255,255,.55)";
    pen.lineWidth = (index === chosen ? 0.009 : 0.005) * Math.max(canvas.width, canvas.height);
    pen.shadowColor = "rgba(0,0,0,.6)";
    pen.shadowBlur = 4;
    pen.beginPath();
    pen.roundRect(left, top, right - left, bottom - top, (right - left) * 0.12);
    pen.stroke();
  });
}

// Radio buttons with a picture of each face; calls onChoose(index).
export function listFaces(list, photo, seen, chosen, onChoose) {
  list.replaceChildren(
    ...seen.faces.map((face, index) => {
      const radio = make("input", { type: "radio", name: "face", value: String(index), checked: index === chosen });
      radio.addEventListener("change", () => onChoose(index));
      const name = make("span", { textContent: t("face", { number: index + 1 }) });
      return make("label", { className: "face" }, radio, thumbnail(photo, face.box, seen.width), name);
    }),
  );
}

function thumbnail(photo, [left, top, right, bottom], width) {
  const canvas = make("canvas", { width: 96, height: 96 });
  canvas.setAttribute("aria-hidden", "true");
  const scale = photo.naturalWidth / width;
  const side = Math.max(right - left, bottom - top) * 1.4;
  const corner = [(left + right - side) / 2, (top + bottom - side) / 2].map((value) => value * scale);
  canvas.getContext("2d").drawImage(photo, ...corner, side * scale, side * scale, 0, 0, 96, 96);
  return canvas;
}
