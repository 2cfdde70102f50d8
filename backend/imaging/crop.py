"""The square head crop: the same function for training photos and for uploads (DESIGN 4.1, section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive

HAIR_MARGIN = 1.2  # side of the crop over the larger extent of hair and face together
FACE_SHARE = 3.0  # side of the crop over the face's size, at least: room for hair that is longer than today's
TOP_MARGIN = 0.1  # share of the side above the hair; the rest of the room lies below, where hair falls


@dataclass(frozen=True)
class Square:
    """A square of the frame; it may reach beyond the frame's edges. Integer pixels: a crop at its own side is exact."""

    x0: int
    y0: int
    side: int

    def scaled(self, points: NDArray[np.floating], resolution: int) -> NDArray[np.float64]:
        """Frame points (N, 2) in the crop's own pixels at ``resolution``."""
        return (np.asarray(points, dtype=np.float64) - (self.x0, self.y0)) * (resolution / self.side)

    def scaled_box(self, box: Box, resolution: int) -> Box:
        """A frame box in the crop's own pixels at ``resolution``."""
        (x0, y0), (x1, y1) = self.scaled(np.array([box[:2], box[2:]]), resolution)
        return (float(x0), float(y0), float(x1), float(y1))


def union(*boxes: Box | None) -> Box | None:
    """The smallest box around all that are given."""
    given = [box for box in boxes if box is not None]
    if not given:
        return None
    x0, y0, x1, y1 = zip(*given, strict=True)
    return (min(x0), min(y0), max(x1), max(y1))


def mask_box(mask: NDArray[np.uint8]) -> Box | None:
    """The bounding box of a mask's non-zero pixels, None when it is empty."""
    x, y, width, height = cv2.boundingRect(mask)
    return (float(x), float(y), float(x + width), float(y + height)) if width and height else None


def rings_box(rings: list[NDArray[np.float64]] | tuple[NDArray[np.float64], ...]) -> Box | None:
    """The bounding box of polygon rings, None when there is none."""
    if not rings:
        return None
    points = np.concatenate(rings)
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return (float(x0), float(y0), float(x1), float(y1))


def head_square(hair_box: Box | None, face_box: Box | None, frame: tuple[int, int]) -> Square:
    """The square around hair and face. Without a face (a back view) it follows the hair alone.

    frame: the photo's (width, height); a square that fits is moved inside it, so that little has to be made up beyond the edge (heads
    often touch the upper one). Raises ValueError when both boxes are None.
    """
    box = union(hair_box, face_box)
    if box is None:
        raise ValueError("a head crop needs a hair box or a face box")
    extent = max(box[2] - box[0], box[3] - box[1])
    face = max(face_box[2] - face_box[0], face_box[3] - face_box[1]) if face_box else 0.0
    side = max(HAIR_MARGIN * extent, FACE_SHARE * face, 8.0)
    whole = round(side)
    left, top = round((box[0] + box[2]) / 2 - side / 2), round(box[1] - TOP_MARGIN * side)
    return Square(_inside(left, whole, frame[0]), _inside(top, whole, frame[1]), whole)


def _inside(start: int, side: int, limit: int) -> int:
    """The nearest start at which a side of that length lies within 0..limit; the start as it is where it cannot."""
    return start if side > limit else min(max(start, 0), limit - side)


def crop_square(image: NDArray[np.uint8], square: Square) -> NDArray[np.uint8]:
    """The square at the frame's own scale, (side, side[, C]); what lies beyond the frame repeats its edge (masks: zero)."""
    height, width = image.shape[:2]
    left, top = max(0, -square.x0), max(0, -square.y0)
    right, bottom = max(0, square.x0 + square.side - width), max(0, square.y0 + square.side - height)
    x0, y0 = max(0, square.x0), max(0, square.y0)
    inner = image[y0 : max(y0, square.y0 + square.side - bottom), x0 : max(x0, square.x0 + square.side - right)]
    if inner.size == 0:
        raise ValueError(f"the head square {square} lies outside the {width} x {height} frame")
    if not (left or top or right or bottom):
        return inner
    border = cv2.BORDER_CONSTANT if image.ndim == 2 else cv2.BORDER_REPLICATE
    return cv2.copyMakeBorder(inner, top, bottom, left, right, border).astype(np.uint8, copy=False)


def resize(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A square picture at another side: area averaging down, cubic up. Masks stay 0/255 (threshold at one half)."""
    if image.shape[0] == side:
        return image
    shrinking = image.shape[0] > side
    if image.ndim == 2:
        soft = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
        return np.where(soft > 127, 255, 0).astype(np.uint8)
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC).astype(np.uint8, copy=False)
