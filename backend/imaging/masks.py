"""Hair masks and the edit region: where the model may paint (DESIGN sections 4.3, 5 and 7, "mask = hair silhouette").

The silhouette of the hair tells the answer in training and is unknown when serving. So the edit region is anchored at the face: the
head, and curtains beside it down to the frame's lower edge, whether the hair is long or short. In training its measures are drawn at
random, independent of the hair; the hair itself, grown by a margin, is always inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging.crop import Box, mask_box

_SHIFT = 4  # sub-pixel bits of cv2.fillPoly


def rasterize(rings: Sequence[NDArray[np.float64]], height: int, width: int) -> NDArray[np.uint8]:
    """The union of polygon rings as a mask (height, width) uint8 0/255; rings may leave the frame or cross themselves."""
    mask = np.zeros((height, width), np.uint8)
    limit = 8.0 * max(height, width)
    for ring in rings:
        points = np.clip(np.asarray(ring, dtype=np.float64), -limit, limit)
        cv2.fillPoly(mask, [np.round(points * (1 << _SHIFT)).astype(np.int32)], 255, shift=_SHIFT)
    return mask


def grow(mask: NDArray[np.uint8], radius: float) -> NDArray[np.uint8]:
    """The mask dilated by a disc of ``radius`` pixels (below one half: unchanged)."""
    size = 2 * round(radius) + 1
    if size < 3:
        return mask
    return cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))).astype(np.uint8, copy=False)


def shrink(mask: NDArray[np.uint8], radius: float) -> NDArray[np.uint8]:
    """The mask eroded by a disc of ``radius`` pixels (below one half: unchanged)."""
    size = 2 * round(radius) + 1
    if size < 3:
        return mask
    return cv2.erode(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))).astype(np.uint8, copy=False)


@dataclass(frozen=True)
class RegionShape:
    """Measures of the edit region in units of the face box; the defaults are those of serving and the centre of training's."""

    head_width: float = 1.05  # half width of the head's part, in face widths
    head_top: float = 0.85  # height above the face box's upper edge, in face heights
    curtain: float = 1.15  # half width of the curtains, in face widths
    margin: float = 0.03  # growth of the present hair, share of the crop's side


def random_shape(rng: np.random.Generator) -> RegionShape:
    """Measures for one training sample; no draw looks at the hair."""
    return RegionShape(
        head_width=float(rng.uniform(0.95, 1.3)),
        head_top=float(rng.uniform(0.7, 1.1)),
        curtain=float(rng.uniform(1.0, 1.5)),
        margin=float(rng.uniform(0.015, 0.06)),
    )


def edit_region(hair: NDArray[np.uint8], face_box: Box | None, shape: RegionShape | None = None) -> NDArray[np.uint8]:
    """Where hair may be painted, (S, S) uint8 0/255, in the head crop.

    hair: the present hair's mask, (S, S) 0/255, may be empty. face_box: in the crop's pixels, from brows to chin as detectors give it;
    None for a back view, where the head is taken from the hair's own box. The face below the brows is left out.
    """
    shape = shape or RegionShape()
    side = hair.shape[0]
    grown = grow(hair, shape.margin * side)
    anchor = face_box or _face_from_hair(hair)
    if anchor is None:
        return grown
    region = _head_and_curtains(anchor, shape, side)
    if face_box is not None:
        region[_face_opening(face_box, side) > 0] = 0
    return np.maximum(region, grown)


def _face_from_hair(hair: NDArray[np.uint8]) -> Box | None:
    """Seen from behind, the head fills the upper hair: a box of its width stands in for the face."""
    box = mask_box(hair)
    if box is None:
        return None
    width = 0.55 * (box[2] - box[0])
    centre = (box[0] + box[2]) / 2
    return (centre - width / 2, box[1] + 0.6 * width, centre + width / 2, box[1] + 1.8 * width)


def _head_and_curtains(face: Box, shape: RegionShape, side: int) -> NDArray[np.uint8]:
    x0, y0, x1, y1 = face
    width, height, centre = x1 - x0, y1 - y0, (x0 + x1) / 2
    region = np.zeros((side, side), np.uint8)
    top = y0 - shape.head_top * height
    middle = y0 + 0.45 * height
    cv2.ellipse(region, (round(centre), round(middle)), (round(shape.head_width * width), round(middle - top)), 0, 180, 360, 255, -1)
    left, right = centre - shape.curtain * width, centre + shape.curtain * width
    crown_left, crown_right = centre - shape.head_width * width, centre + shape.head_width * width
    outline = np.array([(crown_left, middle), (crown_right, middle), (right, side), (left, side)])
    cv2.fillPoly(region, [np.round(outline).astype(np.int32)], 255)
    return region


def _face_opening(face: Box, side: int) -> NDArray[np.uint8]:
    """The face below the brows, chin and front of the neck: what is never repainted unless hair lies on it today."""
    x0, y0, x1, y1 = face
    width, height, centre = x1 - x0, y1 - y0, (x0 + x1) / 2
    opening = np.zeros((side, side), np.uint8)
    cv2.ellipse(opening, (round(centre), round(y0 + 0.58 * height)), (round(0.42 * width), round(0.5 * height)), 0, 0, 360, 255, -1)
    cv2.rectangle(opening, (round(centre - 0.22 * width), round(y0 + 0.9 * height)), (round(centre + 0.22 * width), side), 255, -1)
    opening[: max(0, round(y0 + 0.22 * height))] = 0
    return opening
