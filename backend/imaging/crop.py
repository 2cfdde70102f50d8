"""The square head crop: the same function for training photos and for uploads (DESIGN 4.1, section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive

FACE_SHARE = 3.3  # side of the crop over the face's size: the longest hair has room, whatever today's is
FACE_TOP = 0.8  # room above the face box, in its sizes; the rest lies below, where hair falls
HAIR_MARGIN = 1.2  # seen from behind: side of the crop over the hair's larger extent, at least
HAIR_SHARE = 2.1  # and over its width, at least: about what FACE_SHARE gives, long hair or short
TOP_MARGIN = 0.1  # seen from behind: share of the side above the hair


@dataclass(frozen=True)
class Square:
    """A square of the frame; it may reach beyond the frame's edges. Integer pixels: a crop at its own side is exact."""

    x0: int
    y0: int
    side: int

    def scaled(self, points: NDArray[np.floating], resolution: int) -> NDArray[np.float64]:
        """Frame points (N, 2) in the crop's own pixels at ``resolution``."""
        return (np.asarray(points, dtype=np.float64) - (self.x0, self.y0)) * (resolution / self.side)

    def inner_edges(self, frame: tuple[int, int]) -> tuple[bool, bool, bool, bool]:
        """Which of its edges, left, top, right and bottom, lie inside a frame of (width, height)."""
        return self.x0 > 0, self.y0 > 0, self.x0 + self.side < frame[0], self.y0 + self.side < frame[1]

    def scaled_box(self, box: Box, resolution: int) -> Box:
        """A frame box in the crop's own pixels at ``resolution``."""
        (x0, y0), (x1, y1) = self.scaled(np.array([box[:2], box[2:]]), resolution)
        return (float(x0), float(y0), float(x1), float(y1))


def mask_box(mask: NDArray[np.uint8]) -> Box | None:
    """The bounding box of a mask's non-zero pixels, None when it is empty."""
    x, y, width, height = cv2.boundingRect(mask)
    return (float(x), float(y), float(x + width), float(y + height)) if width and height else None


def scaled_box(box: Box, scale: float) -> Box:
    """The box of the same place in a picture that is ``scale`` times as large."""
    return (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale)


def rings_box(rings: list[NDArray[np.float64]] | tuple[NDArray[np.float64], ...]) -> Box | None:
    """The bounding box of polygon rings, None when there is none."""
    if not rings:
        return None
    points = np.concatenate(rings)
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    return (float(x0), float(y0), float(x1), float(y1))


def head_square(hair_box: Box | None, face_box: Box | None, frame: tuple[int, int]) -> Square:
    """The square around a head, anchored at the face: its place and scale say nothing about the hair that is to be learnt or replaced.

    Hair that would leave the square enlarges it. Without a face (a view from behind) it follows the hair's width.
    frame: the photo's (width, height); a square that fits is moved inside it, so that little has to be made up beyond the edge (heads
    often touch the upper one). Raises ValueError when both boxes are None.
    """
    if face_box is not None:
        size = max(face_box[2] - face_box[0], face_box[3] - face_box[1])
        side = max(FACE_SHARE * size, 8.0)
        left, top = (face_box[0] + face_box[2] - side) / 2, face_box[1] - FACE_TOP * size
        if hair_box is not None:
            beyond = max(left - hair_box[0], hair_box[2] - left - side, top - hair_box[1], hair_box[3] - top - side, 0.0)
            side, left, top = side + 2 * beyond, left - beyond, top - beyond
    elif hair_box is not None:
        width, height = hair_box[2] - hair_box[0], hair_box[3] - hair_box[1]
        side = max(HAIR_SHARE * width, HAIR_MARGIN * height, 8.0)
        left, top = (hair_box[0] + hair_box[2] - side) / 2, hair_box[1] - TOP_MARGIN * side
    else:
        raise ValueError("a head crop needs a hair box or a face box")
    whole = round(side)
    return Square(inside(round(left), whole, frame[0]), inside(round(top), whole, frame[1]), whole)


def inside(start: int, side: int, limit: int) -> int:
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
        return (soft > 127).astype(np.uint8) * np.uint8(255)
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC).astype(np.uint8, copy=False)
