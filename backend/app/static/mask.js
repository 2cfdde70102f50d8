// The area that may change, as one byte per pixel (0 or 1), and the steps to undo.

export class Mask {
  constructor(width, height, data = new Uint8Array(width * height)) {
    Object.assign(this, { width, height, data });
  }

  // From a mask picture (white is in), not larger than `longest` on its longer side.
  static async read(base64, width, height, longest) {
    const scale = Math.min(1, longest / Math.max(width, height));
    const mask = new Mask(Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale)));
    const picture = new Image();
    picture.src = `data:image/png;base64,${base64}`;
    await picture.decode();
    const canvas = Object.assign(document.createElement("canvas"), { width: mask.width, height: mask.height });
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.drawImage(picture, 0, 0, mask.width, mask.height);
    const { data } = pen.getImageData(0, 0, mask.width, mask.height);
    for (let i = 0; i < mask.data.length; i += 1) mask.data[i] = data[4 * i] > 127 ? 1 : 0;
    return mask;
  }

  copy() {
    return new Mask(this.width, this.height, this.data.slice());
  }

  equals(other) {
    return this.data.every((value, i) => value === other.data[i]);
  }

  get empty() {
    return !this.data.includes(1);
  }

  // Sets every pixel whose centre is within `radius` of the line from a to b; returns the rectangle {x, y, width, height} that was touched.
  stroke(a, b, radius, value) {
    const left = Math.max(0, Math.floor(Math.min(a.x, b.x) - radius));
    const right = Math.min(this.width, Math.ceil(Math.max(a.x, b.x) + radius) + 1);
    const top = Math.max(0, Math.floor(Math.min(a.y, b.y) - radius));
    const bottom = Math.min(this.height, Math.ceil(Math.max(a.y, b.y) + radius) + 1);
    const along = { x: b.x - a.x, y: b.y - a.y };
    const length2 = along.x ** 2 + along.y ** 2;
    for (let y = top; y < bottom; y += 1) {
      for (let x = left; x < right; x += 1) {
        const from = { x: x + 0.5 - a.x, y: y + 0.5 - a.y };
        const share = length2 ? Math.min(1, Math.max(0, (from.x * along.x + from.y * along.y) / length2)) : 0;
        if ((from.x - share * along.x) ** 2 + (from.y - share * along.y) ** 2 <= radius ** 2) this.data[y * this.width + x] = value;
      }
    }
    return { x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top) };
  }

  // The same area with a border of `radius` pixels around it.
  grown(radius) {
    const result = this.copy();
    const { width, height, data } = this;
    for (let y = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1) {
        const i = y * width + x;
        if (!data[i]) continue;
        const inside = x > 0 && x < width - 1 && y > 0 && y < height - 1 && data[i - 1] && data[i + 1] && data[i - width] && data[i + width];
        if (!inside) result.stroke({ x: x + 0.5, y: y + 0.5 }, { x: x + 0.5, y: y + 0.5 }, radius, 1);
      }
    }
    return result;
  }

  // Row y of this mask stretched over a picture of width x height, 0 or 255 per pixel.
  row(y, width, height) {
    const start = Math.floor(((y + 0.5) * this.height) / height) * this.width;
    return Uint8Array.from({ length: width }, (_, x) => 255 * this.data[start + Math.floor(((x + 0.5) * this.width) / width)]);
  }
}

const TINT = [226, 62, 140, 128];

// Draws a rectangle of the mask (all of it by default) as a tint on a canvas of the mask's size.
export function tint(canvas, mask, area = { x: 0, y: 0, width: mask.width, height: mask.height }) {
  if (!area.width || !area.height) return;
  const pen = canvas.getContext("2d");
  const pixels = pen.createImageData(area.width, area.height);
  for (let y = 0; y < area.height; y += 1) {
    for (let x = 0; x < area.width; x += 1) {
      if (mask.data[(area.y + y) * mask.width + area.x + x]) pixels.data.set(TINT, 4 * (y * area.width + x));
    }
  }
  pen.putImageData(pixels, area.x, area.y);
}

// Steps back and forth between states of a mask; `keep` before each change.
export class History {
  constructor(limit = 40) {
    Object.assign(this, { limit, past: [], future: [] });
  }

  keep(mask) {
    this.past.push(mask.data.slice());
    if (this.past.length > this.limit) this.past.shift();
    this.future = [];
  }

  undo(mask) {
    return swap(mask, this.past, this.future);
  }

  redo(mask) {
    return swap(mask, this.future, this.past);
  }

  // Takes the last change back as if it had never been.
  drop(mask) {
    mask.data = this.past.pop();
  }
}

function swap(mask, from, to) {
  if (!from.length) return false;
  to.push(mask.data);
  mask.data = from.pop();
  return true;
}
