"""Lighting and drawing of strands: Kajiya-Kay shading, far pieces first, split into what lies behind the person and before."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .camera import Array, Camera
from .hair import Strands
from .traits import Hairstyle, Scene

_SHIFT = 4
U8 = NDArray[np.uint8]


@dataclass(frozen=True)
class Pieces:
    """Short runs of strands ready to draw, sorted from far to near.

    pixels (M, Q, 2) int32 with 4 fractional bits; rgb (M, 3) 0..255; front (M,) whether it lies before the person.
    """

    pixels: NDArray[np.int32]
    rgb: Array
    front: NDArray[np.bool_]

    def where(self, chosen: NDArray[np.bool_]) -> Pieces:
        """The chosen pieces, in the same order."""
        return Pieces(self.pixels[chosen], self.rgb[chosen], self.front[chosen])


def light_in_person(scene: Scene, camera: Camera) -> Array:
    """The scene's light, fixed to the camera, in the person's coordinates."""
    return np.asarray(scene.light, np.float32) @ camera.rotation


def shade(strands: Strands, style: Hairstyle, scene: Scene, camera: Camera, run: int) -> Array:
    """(N, R, 3) colour of every run of `run` segments (Kajiya & Kay 1989 with a pseudo-normal for the mass of hair)."""
    start, end = strands.points[:, :-1:run], strands.points[:, run::run]
    runs = min(start.shape[1], end.shape[1])
    start, end = start[:, :runs], end[:, :runs]
    middle = 0.5 * (start + end)
    tangent = (strands.points[:, 1::run][:, :runs] - start) if run > 1 else end - start
    normal = middle * np.array([1, 1, 1], np.float32)
    normal[..., 1] = np.maximum(normal[..., 1], -0.25)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    tangent = tangent / np.maximum(np.linalg.norm(tangent, axis=2, keepdims=True), 1e-6)
    light = light_in_person(scene, camera)
    half = light + camera.rotation[2]
    half /= np.linalg.norm(half)
    lit = np.clip(0.35 + 0.65 * (normal @ light), 0, 1)
    across = np.sqrt(np.clip(1 - (tangent @ light) ** 2, 0, 1))
    shifted = tangent @ half + 0.10 * (strands.shade[:, None] - 1) * 3
    sheen = np.clip(1 - shifted**2, 0, 1) ** 24 * np.clip(normal @ half, 0, 1) ** 2
    arc = 0.5 * (strands.arc[:, :-1:run][:, :runs] + strands.arc[:, run::run][:, :runs])
    depth = 0.55 + 0.45 * strands.layer[:, None]
    nape = 1 - 0.35 * np.clip((-0.45 - middle[..., 1]) / 0.6, 0, 1) * (1 - strands.layer[:, None])
    root = 0.72 + 0.28 * np.clip(arc / 0.4, 0, 1)
    energy = (scene.ambient + scene.strength * (0.30 * across + 0.85 * across * lit)) * depth * nape * root * strands.shade[:, None]
    base = _pigment(strands, style, arc)
    gloss = (18 + 0.42 * base) * (sheen * scene.strength * (0.5 + 0.5 * strands.layer[:, None]))[..., None]
    return base * (1.12 * energy)[..., None] + gloss


def _pigment(strands: Strands, style: Hairstyle, arc: Array) -> Array:
    """(N, R, 3) unlit colour along each strand: darker roots, lighter tips, highlights, ombre and two-tone."""
    base = np.asarray(style.rgb, np.float32)
    along = arc / np.maximum(strands.tips[:, None], 1e-3)
    if style.tip is None:
        bright = np.minimum(base * 1.45 + 10, 245)
        mix = style.highlights * (0.35 + 0.65 * strands.accent[:, None]) * np.clip(along * 1.6 - 0.1, 0, 1)
        return base + mix[..., None] * (bright - base)
    tip = np.asarray(style.tip, np.float32)
    if style.colour == "ombre":
        mix = 1 / (1 + np.exp(-10 * (along - 0.52)))
    else:
        mix = np.where(strands.accent[:, None], np.clip(0.45 + 0.9 * along, 0, 1), 0.0)
    return base + mix[..., None] * (tip - base)


def cut(strands: Strands, projected: Array, colours: Array, surface: Array, run: int) -> Pieces:
    """Cut projected strands (N, P, 3) into runs, decide front or back against the person's depth map (H, W), sort by depth."""
    n, p, _ = projected.shape
    runs = colours.shape[1]
    index = np.arange(runs)[:, None] * run + np.arange(run + 1)[None, :]
    pixels = np.round(projected[..., :2] * (1 << _SHIFT)).astype(np.int32)[:, index]
    middle = projected[:, index[:, (run + 1) // 2]]
    height, width = surface.shape
    column = np.clip(middle[..., 0], 0, width - 1).astype(np.int32)
    row = np.clip(middle[..., 1], 0, height - 1).astype(np.int32)
    behind = surface[row, column]
    front = np.where(np.isfinite(behind), middle[..., 2] > behind - 0.035, middle[..., 2] > -0.15)
    order = np.argsort(middle[..., 2], axis=None, kind="stable")
    span = np.abs(np.diff(pixels.reshape(n * runs, run + 1, 2), axis=1)).sum(axis=(1, 2))
    order = order[span[order] > 0]
    return Pieces(pixels.reshape(n * runs, run + 1, 2)[order], colours.reshape(-1, 3)[order], front.reshape(-1)[order])


def draw_layer(image: U8, pieces: Pieces, scale: float, width: float) -> Array:
    """Draw one layer onto `image` (H, W, 3) in place: a soft underlay at half size, then fine lines. Returns cover (H, W) 0..1."""
    height, frame_width = image.shape[:2]
    cover_rgb, cover = _underlay(pieces, height, frame_width, scale, width)
    if cover is None:
        return np.zeros((height, frame_width), np.float32)
    blended = image + cover[..., None] * (cover_rgb.astype(np.float32) - image)
    image[:] = np.clip(blended, 0, 255).astype(np.uint8)
    thickness = max(1, round(0.011 * scale * width))
    colours = np.clip(pieces.rgb, 0, 255).tolist()
    for run, colour in zip(pieces.pixels, colours, strict=True):
        cv2.polylines(image, [run], False, colour, thickness, cv2.LINE_AA, _SHIFT)
    return cover


def _underlay(pieces: Pieces, height: int, width: int, scale: float, strand_width: float) -> tuple[U8, Array | None]:
    """Thick dark lines at half size: the mass of hair under the visible strands, and its cover."""
    half = ((height + 1) // 2, (width + 1) // 2)
    rgb = np.zeros((*half, 3), np.uint8)
    if len(pieces.rgb) == 0:
        return rgb, None
    thickness = max(2, round(0.025 * scale * strand_width))
    dark = np.clip(pieces.rgb * 0.62, 0, 255).tolist()
    mask = np.zeros(half, np.uint8)
    cv2.polylines(mask, list(pieces.pixels), False, 255, thickness, cv2.LINE_8, _SHIFT + 1)
    for run, colour in zip(pieces.pixels[::2], dark[::2], strict=True):
        cv2.polylines(rgb, [run], False, colour, thickness + 1, cv2.LINE_8, _SHIFT + 1)
    reach = max(1, round(0.02 * scale))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    closed = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel)
    solid = (rgb.any(axis=2)).astype(np.float32)
    near = cv2.GaussianBlur(rgb.astype(np.float32), (0, 0), 0.02 * scale + 0.6)
    weight = cv2.GaussianBlur(solid, (0, 0), 0.02 * scale + 0.6)
    filled = np.clip(near / np.maximum(weight, 0.02)[..., None], 0, 255).astype(np.uint8)
    cover = cv2.GaussianBlur(closed, (0, 0), 0.8).astype(np.float32) / 255
    full = (width, height)
    return cv2.resize(filled, full, interpolation=cv2.INTER_LINEAR), cv2.resize(cover, full, interpolation=cv2.INTER_LINEAR)
