// Where a board of fixed size lies in its viewport: zoom, pan, and from a place on the screen to a place on the board.

const MOST = 12; // times the size that fits

export class View {
  constructor(viewport, board, onChange) {
    Object.assign(this, { viewport, board, onChange, width: 1, height: 1, scale: 1, x: 0, y: 0 });
  }

  show(width, height) {
    Object.assign(this, { width, height });
    this.board.style.width = `${width}px`;
    this.board.style.height = `${height}px`;
    this.fit();
  }

  get fitting() {
    return Math.min(this.viewport.clientWidth / this.width, this.viewport.clientHeight / this.height);
  }

  get zoom() {
    return this.scale / this.fitting;
  }

  fit() {
    this.scale = this.fitting;
    this.settle();
  }

  // Zooms about a place of the viewport, which stays where it is.
  zoomAt({ x, y }, factor) {
    const scale = Math.min(MOST * this.fitting, Math.max(this.fitting, this.scale * factor));
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.settle();
  }

  moveBy(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.settle();
  }

  // Moves as far as it takes to see a place of the viewport's coordinates with some room around it.
  reveal({ x, y }, room = 24) {
    const { clientWidth: width, clientHeight: height } = this.viewport;
    const before = { x: this.x, y: this.y };
    this.moveBy(Math.max(0, room - x) - Math.max(0, x - width + room), Math.max(0, room - y) - Math.max(0, y - height + room));
    return { x: x + this.x - before.x, y: y + this.y - before.y };
  }

  settle() {
    this.x = within(this.x, this.viewport.clientWidth, this.width * this.scale);
    this.y = within(this.y, this.viewport.clientHeight, this.height * this.scale);
    this.board.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.scale})`;
    this.onChange();
  }

  toBoard({ x, y }) {
    return { x: (x - this.x) / this.scale, y: (y - this.y) / this.scale };
  }
}

// A board smaller than the room is centred, a larger one leaves no gap.
function within(start, room, size) {
  return size <= room ? (room - size) / 2 : Math.min(0, Math.max(room - size, start));
}
