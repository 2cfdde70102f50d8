"""The face as a painting: albedo and class ids over the front plane of the head (x to the right, y up, head units)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from .camera import Array, lookup
from .traits import Identity

X0, X1, Y0, Y1 = -0.85, 0.85, -1.25, 0.75
_SHIFT = 5


@dataclass(frozen=True)
class FacePaint:
    """albedo (H, W, 3) float32 0..255 multiplies the light; gloss (H, W) 0..1 adds wet highlights; classes (H, W) uint8."""

    albedo: Array
    gloss: Array
    classes: NDArray[np.uint8]
    per_unit: float

    def at(self, points: Array) -> tuple[Array, Array, NDArray[np.uint8]]:
        """(n, 3) surface points -> albedo (n, 3), gloss (n,), class ids (n,)."""
        u = (points[:, 0] - X0) * self.per_unit - 0.5
        v = (Y1 - points[:, 1]) * self.per_unit - 0.5
        behind = points[:, 2] < 0.05
        u, v = np.where(behind, 0, u), np.where(behind, 0, v)
        classes = lookup(self.classes, u, v, cv2.INTER_NEAREST)
        return lookup(self.albedo, u, v), lookup(self.gloss, u, v), classes  # type: ignore[return-value]


class _Canvas:
    """Anti-aliased shapes in head units on float layers."""

    def __init__(self, per_unit: float, albedo: Array) -> None:
        self.per_unit = per_unit
        self.albedo = albedo
        self.classes = np.ones(albedo.shape[:2], np.uint8)
        self.gloss = np.zeros(albedo.shape[:2], np.float32)

    def pixels(self, points: Array) -> NDArray[np.int32]:
        p = np.asarray(points, np.float64).reshape(-1, 2)
        uv = np.stack([(p[:, 0] - X0) * self.per_unit - 0.5, (Y1 - p[:, 1]) * self.per_unit - 0.5], axis=1)
        return np.round(uv * (1 << _SHIFT)).astype(np.int32)

    def cover(self, polygon: Array, blur: float = 0.0) -> Array:
        """Coverage 0..1 of a filled polygon, optionally softened by `blur` head units."""
        layer = np.zeros(self.classes.shape, np.uint8)
        cv2.fillPoly(layer, [self.pixels(polygon)], 255, cv2.LINE_AA, _SHIFT)
        return self._soften(layer, blur)

    def stroke(self, line: Array, width: float, blur: float = 0.0) -> Array:
        """Coverage 0..1 of a polyline of `width` head units; thinner than a pixel becomes fainter."""
        layer = np.zeros(self.classes.shape, np.uint8)
        pixels = width * self.per_unit
        cv2.polylines(layer, [self.pixels(line)], False, 255, max(1, round(pixels)), cv2.LINE_AA, _SHIFT)
        return self._soften(layer, blur) * min(1.0, pixels)

    def spot(self, x: float, y: float, rx: float, ry: float) -> Array:
        """A soft round spot, 1 at its centre."""
        height, width = self.classes.shape
        xs = X0 + (np.arange(width, dtype=np.float32) + 0.5) / self.per_unit
        ys = Y1 - (np.arange(height, dtype=np.float32) + 0.5) / self.per_unit
        return np.exp(-(((xs[None, :] - x) / rx) ** 2) - ((ys[:, None] - y) / ry) ** 2)

    def tint(self, cover: Array, rgb: tuple[float, ...] | Array, opacity: float = 1.0) -> None:
        self.albedo += (cover * opacity)[..., None] * (np.asarray(rgb, np.float32) - self.albedo)

    def mark(self, cover: Array, class_id: int) -> None:
        self.classes[cover > 0.5] = class_id

    def _soften(self, layer: NDArray[np.uint8], blur: float) -> Array:
        cover = layer.astype(np.float32) / 255
        sigma = blur * self.per_unit
        return cv2.GaussianBlur(cover, (0, 0), sigma) if sigma > 0.3 else cover


@lru_cache(maxsize=16)
def paint_face(who: Identity, per_unit: float) -> FacePaint:
    """Paint one face at `per_unit` pixels per head unit."""
    height, width = round((Y1 - Y0) * per_unit), round((X1 - X0) * per_unit)
    rng = np.random.default_rng([0xFACE, who.seed])
    skin = np.asarray(who.skin, np.float32)
    mottle = cv2.resize(rng.normal(0, 1, (24, 20, 1)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    canvas = _Canvas(per_unit, skin + mottle[..., None] * np.array([2.2, 1.6, 1.4], np.float32))
    _paint_skin(canvas, who, skin)
    _paint_nose(canvas, who, skin)
    _paint_mouth(canvas, who, skin)
    for side in (-1, 1):
        _paint_eye(canvas, who, skin, side)
        _paint_brow(canvas, who, side, rng)
    return FacePaint(np.clip(canvas.albedo, 2, 255), canvas.gloss, canvas.classes, per_unit)


def _paint_skin(c: _Canvas, who: Identity, skin: Array) -> None:
    rosy = skin * np.array([1.02, 0.80, 0.78], np.float32)
    for side in (-1, 1):
        c.tint(c.spot(side * 0.36, -0.28, 0.2, 0.17), rosy, 0.5 * who.blush)
        age = max(0.0, (who.age - 32) / 30)
        fold = np.array([[side * 0.17, -0.36], [side * 0.27, -0.5], [side * 0.31, -0.64]])
        c.tint(c.stroke(fold, 0.014, 0.012), skin * 0.70, 0.15 + 0.5 * age)
        c.tint(c.spot(side * 0.31, -0.14, 0.14, 0.045), skin * np.array([0.84, 0.76, 0.78]), 0.35 + 0.35 * age)
        c.tint(c.spot(side * 0.31 * who.eye_spacing, 0.07, 0.17, 0.06), skin * np.array([0.86, 0.76, 0.72]), 0.55)
    if who.stubble > 0.15:
        beard = np.maximum(c.spot(0, -0.95, 0.42, 0.24), c.spot(0, -0.53, 0.2, 0.05))
        c.tint(beard, skin * np.array([0.58, 0.60, 0.63]), 0.6 * who.stubble)
    for x, y in who.moles:
        c.tint(np.minimum(1, 1.6 * c.spot(x, y, 0.015, 0.015)), (70, 44, 36), 0.9)
    c.gloss += 0.35 * (c.spot(0, 0.42, 0.25, 0.12) + c.spot(0, -0.3, 0.045, 0.09))


def _paint_nose(c: _Canvas, who: Identity, skin: Array) -> None:
    tip, half = -0.36 * who.nose_length, 0.165 * who.nose_width
    outline = np.array([
        [-0.06, 0.06], [0.06, 0.06], [0.075, -0.12], [half, tip + 0.02], [half, tip - 0.07], [0.05, tip - 0.10],
        [-0.05, tip - 0.10], [-half, tip - 0.07], [-half, tip + 0.02], [-0.075, -0.12],
    ])  # fmt: skip
    c.mark(c.cover(outline), 2)
    for side in (-1, 1):
        c.tint(c.spot(side * half * 0.47, tip - 0.085, 0.036, 0.017), skin * np.array([0.30, 0.20, 0.18]), 0.9)
        wing = np.array(
            [
                [side * half * 0.85, tip + 0.06],
                [side * half * 1.08, tip],
                [side * half * 1.02, tip - 0.06],
                [side * half * 0.75, tip - 0.09],
            ]
        )
        c.tint(c.stroke(wing, 0.016, 0.010), skin * 0.55, 0.55)
        bridge = np.array([[side * 0.085, 0.12], [side * 0.075, -0.12], [side * 0.10, tip + 0.06]])
        c.tint(c.stroke(bridge, 0.03, 0.02), skin * np.array([0.78, 0.70, 0.66]), 0.35)


def _paint_mouth(c: _Canvas, who: Identity, skin: Array) -> None:
    y, half, curve = -0.67 * who.face_length + who.mouth_height, 0.255 * who.mouth_width, who.lip_curve
    t = np.linspace(-1, 1, 17)
    seam = y + curve * (t * t) - 0.010 * np.cos(np.pi * t * 2)
    bow = 0.088 * who.lip_thickness * (1 - t * t) ** 0.8 * (1 - 0.20 * np.exp(-((t / 0.16) ** 2)))
    belly = 0.105 * who.lip_thickness * (1 - t * t) ** 0.75
    x = t * half
    upper = np.concatenate([np.stack([x, seam + bow], 1), np.stack([x, seam], 1)[::-1]])
    lower = np.concatenate([np.stack([x, seam], 1), np.stack([x, seam - belly], 1)[::-1]])
    lip = np.asarray(who.lip, np.float32)
    for shape, shade, class_id in ((upper, 0.90, 11), (lower, 1.05, 12)):
        c.tint(c.cover(shape, 0.006), lip * shade, 0.85)
        c.mark(c.cover(shape), class_id)
    c.tint(c.stroke(np.stack([x, seam], 1)[1:-1], 0.013, 0.005), lip * 0.34, 0.85)
    c.mark(c.stroke(np.stack([x, seam], 1), 0.014), 10)
    c.tint(c.spot(0, y - 0.15, 0.12, 0.025), skin * 0.82, 0.5)
    c.gloss += 0.7 * c.spot(0, y - 0.055, 0.1, 0.02)


def eye_centre(who: Identity, side: int) -> tuple[float, float]:
    """(x, y) of one eye on the front plane."""
    return side * 0.315 * who.eye_spacing, 0.0


def _paint_eye(c: _Canvas, who: Identity, skin: Array, side: int) -> None:
    ex, ey = eye_centre(who, side)
    half, open_ = 0.150 * who.eye_width, 0.060 * who.eye_open
    t = np.linspace(-1, 1, 21)
    outward = t * side
    tilt = who.eye_tilt * half * outward
    lid = ey + tilt + open_ * (1 - np.abs(t) ** 2.3) * (1 + 0.12 * outward)
    rim = ey + tilt - 0.72 * open_ * (1 - np.abs(t) ** 2.0) * (1 + 0.1 * outward)
    x = ex + t * half
    upper, lower = np.stack([x, lid], 1), np.stack([x, rim], 1)
    opening = c.cover(np.concatenate([upper, lower[::-1]]))
    c.tint(opening, (226, 222, 218))
    c.tint(opening * c.spot(ex, ey + open_ * 1.3, half, open_ * 0.8), (150, 140, 138), 0.7)
    angles = np.linspace(0, 2 * np.pi, 25)
    ring = np.stack([np.cos(angles), np.sin(angles)], 1)
    iris = np.asarray(who.iris, np.float32)
    for radius, rgb in ((0.074, iris * 0.45), (0.066, iris), (0.034, iris * 0.12)):
        c.tint(opening * c.cover(np.array([ex, ey + 0.008]) + radius * ring), rgb)
    c.tint(opening * c.spot(ex, ey - 0.035, 0.04, 0.022), np.minimum(iris * 1.9, 255), 0.55)
    c.tint(opening * np.minimum(1, 1.7 * c.spot(ex - 0.026, ey + 0.034, 0.015, 0.014)), (255, 255, 255), 0.95)
    c.mark(opening, 4 if side < 0 else 5)
    lash = (34, 26, 24)
    c.tint(c.stroke(upper, 0.026 if who.sex == "female" else 0.019, 0.004), lash, 0.92)
    corner = np.array(
        [[ex + side * half * 0.9, lid[-2 if side > 0 else 1]], [ex + side * half * 1.22, ey + tilt[-1 if side > 0 else 0] + 0.035]]
    )
    c.tint(c.stroke(corner, 0.018, 0.004), lash, 0.8 if who.sex == "female" else 0.3)
    c.tint(c.stroke(lower, 0.012, 0.006), skin * np.array([0.52, 0.38, 0.36]), 0.6)
    if who.double_lid:
        crease = upper + np.array([0, 0.038]) - np.stack([0 * t, 0.012 * t * t], 1)
        c.tint(c.stroke(crease, 0.012, 0.004), skin * 0.52, 0.7)


def _paint_brow(c: _Canvas, who: Identity, side: int, rng: np.random.Generator) -> None:
    ex, _ = eye_centre(who, side)
    t = np.linspace(0, 1, 13)
    x = ex + side * (-0.145 + 0.33 * t)
    arch = who.brow_arch * 4 * t * (1 - t) * (0.6 + t)
    y = 0.185 + who.brow_height + arch + who.brow_tilt * (t - 0.5) * 0.4
    thick = 0.036 * who.brow_thickness * (1 - 0.75 * t**2.2) * (0.72 + 0.28 * np.minimum(1, t * 6))
    body = np.concatenate([np.stack([x, y + thick], 1), np.stack([x, y - thick], 1)[::-1]])
    ink = np.array([120, 92, 76], np.float32) * who.brow_shade
    c.tint(c.cover(body, 0.012), ink * 1.35, 0.62)
    c.mark(c.cover(body), 6 if side < 0 else 7)
    hairs = np.zeros(c.classes.shape, np.uint8)
    for k in range(46):
        s = (k + rng.random()) / 46
        at = np.array([np.interp(s, t, x), np.interp(s, t, y) + rng.uniform(-0.9, 0.7) * np.interp(s, t, thick)])
        way = np.array([side * (0.25 + 0.75 * s), 0.75 - 0.95 * s])
        cv2.polylines(hairs, [c.pixels(np.stack([at, at + 0.05 * way]))], False, 255, 1, cv2.LINE_AA, _SHIFT)
    c.tint(hairs.astype(np.float32) / 255, ink * 0.8, 0.8)
