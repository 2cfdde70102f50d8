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
_COVERED = 0.12
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


def cut(strands: Strands, projected: Array, style: Hairstyle, scene: Scene, camera: Camera, surface: Array, run: int) -> Pieces:
    """Cut projected strands (N, P, 3) into runs of `run` segments, drop the unseen ones, sort by depth and light the rest.

    `surface` (H, W) is the person's depth map, -inf beside the person: it tells front from back.
    """
    runs = (projected.shape[1] - 1) // run
    middle = projected[:, run // 2 : run // 2 + runs * run : run].reshape(-1, 3)
    order = np.argsort(middle[:, 2], kind="stable")
    depth = middle[order, 2]
    behind, edge = _person_at(surface, middle[order])
    front = np.where(np.isinf(behind), depth > -0.15, depth > behind - 0.07)
    strand, first = np.divmod(order, runs)
    first *= run
    moved = np.abs(strands.arc[strand, first + run] - strands.arc[strand, first]) > 1e-4
    seen = moved & (front | edge) & _uncovered(middle[order], camera.scale)
    strand, first, front = strand[seen], first[seen], front[seen]
    index = first[:, None] + np.arange(run + 1)
    pixels = np.round(projected[strand[:, None], index, :2] * (1 << _SHIFT)).astype(np.int32)
    return Pieces(pixels, _shade(strands, style, scene, camera, strand, first, run), front)


def _person_at(surface: Array, points: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Depth of the person at projected points, and whether a point lies beside the person or close to the edge."""
    height, width = surface.shape
    column = np.clip(points[:, 0], 0, width - 1).astype(np.int32)
    row = np.clip(points[:, 1], 0, height - 1).astype(np.int32)
    empty = cv2.dilate((~np.isfinite(surface)).astype(np.uint8), np.ones((7, 7), np.uint8))
    return surface[row, column], empty[row, column] > 0


def _uncovered(points: Array, scale: float) -> NDArray[np.bool_]:
    """Points sorted far to near: whether nothing lies much nearer in the same small cell. Half of a full head is never seen."""
    cell = max(2.0, 0.022 * scale)
    column, row = (points[:, 0] / cell).astype(np.int32), (points[:, 1] / cell).astype(np.int32)
    column -= column.min()
    row -= row.min()
    nearest = np.full((int(row.max()) + 1, int(column.max()) + 1), -np.inf, np.float32)
    nearest[row, column] = points[:, 2]
    return points[:, 2] > nearest[row, column] - _COVERED


def _shade(
    strands: Strands, style: Hairstyle, scene: Scene, camera: Camera, strand: NDArray[np.int64], first: NDArray[np.int64], run: int
) -> Array:
    """(M, 3) colour of runs (Kajiya & Kay 1989, with a pseudo-normal for the mass of hair)."""
    start, end = strands.points[strand, first], strands.points[strand, first + run]
    layer, jitter = strands.layer[strand], strands.shade[strand]
    arc = 0.5 * (strands.arc[strand, first] + strands.arc[strand, first + run])
    middle = 0.5 * (start + end)
    tangent = _unit(strands.points[strand, first + 1] - start)
    normal = middle.copy()
    normal[:, 1] = np.maximum(normal[:, 1], -0.25)
    normal = _unit(normal)
    light = light_in_person(scene, camera)
    half = light + camera.rotation[2]
    half /= np.linalg.norm(half)
    lit = np.clip(0.35 + 0.65 * (normal @ light), 0, 1)
    across = np.sqrt(np.clip(1 - (tangent @ light) ** 2, 0, 1))
    shifted = tangent @ half + 0.30 * (jitter - 1)
    sheen = np.clip(1 - shifted**2, 0, 1) ** 24 * np.clip(normal @ half, 0, 1) ** 2
    nape = 1 - 0.35 * np.clip((-0.45 - middle[:, 1]) / 0.6, 0, 1) * (1 - layer)
    root = 0.72 + 0.28 * np.clip(arc / 0.4, 0, 1)
    energy = (scene.ambient + scene.strength * across * (0.30 + 0.85 * lit)) * (0.55 + 0.45 * layer) * nape * root * jitter
    relief = strands.relief[strand, first + run // 2]
    energy *= 1 + 0.85 * relief
    base = _pigment(strands, style, strand, arc)
    gloss = (30 + 0.40 * base) * (sheen * scene.strength * (0.5 + 0.5 * layer))[:, None]
    glint = 80 * np.maximum(relief, 0) ** 3 * lit * scene.strength * (0.3 + 0.7 * layer)  # the crest of a curl catches the light
    return base * (1.12 * energy)[:, None] + gloss + glint[:, None]


def _unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.sqrt((vectors * vectors).sum(axis=1, keepdims=True)), 1e-6)


def _pigment(strands: Strands, style: Hairstyle, strand: NDArray[np.int64], arc: Array) -> Array:
    """(M, 3) unlit colour at `arc` along each strand: darker roots, lighter tips, highlights, ombre and two-tone."""
    base = np.asarray(style.rgb, np.float32)
    accent = strands.accent[strand]
    along = arc / np.maximum(strands.tips[strand], 1e-3)
    if style.tip is None:
        bright = np.minimum(base * 1.45 + 10, 245)
        mix = style.highlights * (0.35 + 0.65 * accent) * np.clip(along * 1.6 - 0.1, 0, 1)
        return base + mix[:, None] * (bright - base)
    tip = np.asarray(style.tip, np.float32)
    mix = 1 / (1 + np.exp(-10 * (along - 0.52))) if style.colour == "ombre" else np.where(accent, np.clip(0.45 + 0.9 * along, 0, 1), 0.0)
    return base + mix[:, None] * (tip - base)


def draw_layer(image: U8, pieces: Pieces, scale: float, width: float) -> Array:
    """Draw one layer onto `image` (H, W, 3) in place: a soft underlay at half size, then fine lines. Returns cover (H, W) 0..1."""
    height, frame_width = image.shape[:2]
    if len(pieces.rgb) == 0:
        return np.zeros((height, frame_width), np.float32)
    under, cover = _underlay(pieces, height, frame_width, scale, width)
    image[:] = cv2.blendLinear(under, image, cover, 1 - cover)
    thickness = max(1, round(0.011 * scale * width))
    colours = np.clip(pieces.rgb, 0, 255).astype(np.uint8).tolist()
    for run, colour in zip(pieces.pixels, colours, strict=True):
        cv2.polylines(image, [run], False, colour, thickness, cv2.LINE_AA, _SHIFT)
    return cover


def _underlay(pieces: Pieces, height: int, width: int, scale: float, strand_width: float) -> tuple[U8, Array]:
    """Thick dark lines at half size: the mass of hair under the visible strands, and its cover."""
    half = ((height + 1) // 2, (width + 1) // 2)
    thickness = max(2, round(0.014 * scale * (0.9 + 0.4 * strand_width)))
    mask = np.zeros(half, np.uint8)
    cv2.polylines(mask, list(pieces.pixels), False, 255, thickness, cv2.LINE_8, _SHIFT + 1)
    mass = np.zeros((*half, 4), np.uint8)
    every = 3 if len(pieces.rgb) > 4000 else 1
    dark = np.clip(pieces.rgb[::every] * 0.62, 0, 255).astype(np.uint8)
    for run, colour in zip(pieces.pixels[::every, :: pieces.pixels.shape[1] - 1].tolist(), dark.tolist(), strict=True):
        cv2.line(mass, run[0], run[1], (*colour, 255), thickness + 1, cv2.LINE_8, _SHIFT + 1)
    reach = max(1, round(0.02 * scale))
    closed = close_gaps(mask, reach)
    inset = cv2.erode(closed, np.ones((thickness // 2 * 2 + 1,) * 2, np.uint8))
    cover = cv2.GaussianBlur(inset, (0, 0), 0.7).astype(np.float32) / 255
    near = cv2.GaussianBlur(mass, (0, 0), 0.02 * scale + 0.6).astype(np.float32)
    filled = np.clip(near[..., :3] * (255 / np.maximum(near[..., 3:], 8)), 0, 255).astype(np.uint8)
    size = (width, height)
    return cv2.resize(filled, size, interpolation=cv2.INTER_LINEAR), cv2.resize(cover, size, interpolation=cv2.INTER_LINEAR)


def close_gaps(mask: U8, reach: int) -> U8:
    """Morphological closing by a disc of radius `reach` that does not grow onto the frame's border."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    pad = 2 * reach
    padded = cv2.copyMakeBorder(mask, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel)
    return closed[pad:-pad, pad:-pad]  # type: ignore[return-value]
