// What the server sees in a photo, drawn over it: the hair tinted, the faces framed, the chosen one strongest.
import { t } from "./i18n.js";

const LONGEST = 900; // pixels of the overlay's longer side; it is stretched over the photo

export async function drawSeen(canvas, seen, chosen) {
  const scale = Math.min(1, LONGEST / Math.max(seen.width, seen.height));
  canvas.width = Math.round(seen.width * scale);
  canvas.height = Math.round(seen.height * scale);
  const pen = canvas.getContext("2d");
  pen.drawImage(await tinted(seen.hair_mask_png, canvas.width, canvas.height), 0, 0);
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

async function tinted(base64, width, height) {
  const mask = new Image();
  mask.src = `data:image/png;base64,${base64}`;
  await mask.decode();
  const layer = document.createElement("canvas");
  layer.width = width;
  layer.height = height;
  const pen = layer.getContext("2d", { willReadFrequently: true });
  pen.drawImage(mask, 0, 0, width, height);
  const pixels = pen.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const amount = pixels.data[i];
    pixels.data.set([226, 62, 140, amount * 0.5], i);
  }
  pen.putImageData(pixels, 0, 0);
  return layer;
}

// Radio buttons with a picture of each face; calls onChoose(index).
export function listFaces(list, photo, seen, chosen, onChoose) {
  list.replaceChildren(
    ...seen.faces.map((face, index) => {
      const label = document.createElement("label");
      label.className = "face";
      const radio = Object.assign(document.createElement("input"), { type: "radio", name: "face", value: String(index), checked: index === chosen });
      radio.addEventListener("change", () => onChoose(index));
      const name = Object.assign(document.createElement("span"), { textContent: t("face", { number: index + 1 }) });
      label.append(radio, thumbnail(photo, face.box, seen.width), name);
      return label;
    }),
  );
}

function thumbnail(photo, [left, top, right, bottom], width) {
  const canvas = Object.assign(document.createElement("canvas"), { width: 96, height: 96 });
  canvas.setAttribute("aria-hidden", "true");
  const scale = photo.naturalWidth / width;
  const side = Math.max(right - left, bottom - top) * 1.4;
  const corner = [(left + right - side) / 2, (top + bottom - side) / 2].map((value) => value * scale);
  canvas.getContext("2d").drawImage(photo, ...corner, side * scale, side * scale, 0, 0, 96, 96);
  return canvas;
}
