"""Hair masks and the edit region: where the model may paint (DESIGN sections 4.3, 5 and 7, "mask = hair silhouette").

The silhouette of the hair tells the answer in training and is unknown when serving. So the edit region is anchored at the face: the
head, and curtains beside it down to the frame's lower edge, whether the hair is long or short. In training its measures are drawn at
random, independent of the hair; the hair itself, grown by a margin (a smaller one in the face), is always inside, and so are
silhouettes of other people's hair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging.crop import Box, mask_box

OPENING = (0.3, 0.36)  # half axes of the part of the face that is spared, in face widths and heights
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


SPECKS = 0.05  # share of the largest part's area below which a part of a parsed hairstyle is taken for an error


def without_specks(hair: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A parser's hair mask (H, W) uint8 0/255 without the parts that are far smaller than the largest one.

    A shirt's fold taken for hair below a short haircut made the whole style seem long and thin (docs/method.md). For hair that is to be
    replaced they are kept: a strand by itself must go too.
    """
    count, numbered, stats, _ = cv2.connectedComponentsWithStats(hair, connectivity=8)
    if count <= 2:
        return hair
    areas = stats[1:, cv2.CC_STAT_AREA]
    large = np.r_[False, areas >= SPECKS * areas.max()]
    return np.where(large[numbered], 255, 0).astype(np.uint8)


def any_coverage(mask: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A square mask at another side, (side, side) uint8 0/255: a pixel is set where any part of it was."""
    if mask.shape[0] == side:
        return mask
    return np.where(cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA) > 0, 255, 0).astype(np.uint8)


@dataclass(frozen=True)
class RegionShape:
    """Measures of the edit region in units of the face box; the defaults are those of serving, inside the ranges of training."""

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
        margin=float(rng.uniform(0.01, 0.03)),
    )


@dataclass(frozen=True)
class Silhouette:
    """Somebody's hair for ``edit_region`` to borrow: hair (S, S) uint8 0/255 with its face box in the same pixels, or None."""

    hair: NDArray[np.uint8]
    face_box: Box | None


BORROWED = 8  # silhouettes joined to each training region
FACE_MARGIN = 0.012  # growth of the present hair where it lies on eyes, nose and mouth, share of the crop's side
FRINGES = 1  # of those, how many also cover the face where they lie on it


def borrow(pool: Sequence[Silhouette], face_box: Box | None, rng: np.random.Generator) -> list[Silhouette]:
    """Silhouettes of the larger half of those in ``pool`` that have a face as the head does, or none as it; none where there are none."""
    alike = [one for one in pool if (one.face_box is None) == (face_box is None)]
    ranked = sorted(alike, key=lambda one: int((one.hair > 0).sum()) / one.hair.size)
    large = ranked[len(ranked) // 2 :]
    return [large[int(k)] for k in rng.integers(len(large), size=BORROWED)] if large else []


def edit_region(
    hair: NDArray[np.uint8], face_box: Box | None, shape: RegionShape | None = None, borrowed: Sequence[Silhouette] = ()
) -> NDArray[np.uint8]:
    """Where hair may be painted, (S, S) uint8 0/255, in the head crop.

    hair: the present hair's mask, (S, S) 0/255, may be empty. face_box: in the crop's pixels, from brows to chin as detectors give it;
    None for a back view, where the head is taken from the hair's own box. The face below the brows is left out.

    borrowed: hair of other people, laid over this head, for training. When serving, the region holds the hair that goes, which says
    nothing about the hair that comes; in training they are the same hair, and its outline beyond the curtains told its length
    (docs/method.md).
    """
    shape = shape or RegionShape()
    side = hair.shape[0]
    grown = grow(hair, shape.margin * side)
    anchor = face_box or _face_from_hair(hair)
    if anchor is None:
        return grown
    region = _head_and_curtains(anchor, shape, side)
    laid = [
        grow(_laid_over(other, anchor, side), shape.margin * side) for other in borrowed if (other.face_box is None) == (face_box is None)
    ]
    for other in laid:
        region = np.maximum(region, other)
    if face_box is not None:
        opening = _face_opening(face_box, side)
        for other in laid[:FRINGES]:  # hair in the face tells of length too
            opening[other > 0] = 0
        region[opening > 0] = 0
        grown = np.where(opening > 0, grow(hair, FACE_MARGIN * side), grown)  # half a turned face is within the margin of its hair
    return np.maximum(region, grown)


def _laid_over(other: Silhouette, anchor: Box, side: int) -> NDArray[np.uint8]:
    """The hair moved and scaled so that its face lies on ``anchor``."""
    own = other.face_box or _face_from_hair(other.hair)
    if own is None:
        return np.zeros((side, side), np.uint8)
    scale = max(anchor[2] - anchor[0], anchor[3] - anchor[1]) / max(own[2] - own[0], own[3] - own[1], 1e-6)
    across = (anchor[0] + anchor[2]) / 2 - scale * (own[0] + own[2]) / 2
    matrix = np.array([[scale, 0, across], [0, scale, anchor[1] - scale * own[1]]], np.float32)
    return cv2.warpAffine(other.hair, matrix, (side, side), flags=cv2.INTER_NEAREST).astype(np.uint8, copy=False)


CHANGED_MARGIN = 0.02  # growth of the old and the new hair, share of the crop's side
SPECK = 0.016  # half width of what is too thin to be hair in the face, share of the crop's side


def changed_region(
    region: NDArray[np.uint8], before: NDArray[np.uint8], after: NDArray[np.uint8], face_box: Box | None
) -> NDArray[np.uint8]:
    """The part of the edit region that is pasted back: where hair was or has come, with a margin. All (S, S) uint8 0/255.

    What was painted beside the hair (clothes, background) is thrown away for the photo's own. On the face below the brows there is no
    margin, and single specks of new hair do not count: it is what the person is known by. Without any new hair the whole region stands: then the
    painting is to be seen as it is.
    """
    if not after.any():
        return region
    side = region.shape[0]
    hair = np.maximum(before, after)
    wide = grow(hair, CHANGED_MARGIN * side)
    if face_box is not None:
        face = _face_below_the_brows(face_box, side) > 0
        wide[face] = np.maximum(before, grow(shrink(after, SPECK * side), SPECK * side))[face]
    return np.minimum(region, wide)


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
    """Eyes, nose and mouth: what is never repainted unless hair lies on it today. Hair at the cheeks, the neck and over the chest comes with
    length, so those are always inside the region."""
    x0, y0, x1, y1 = face
    width, height, centre = x1 - x0, y1 - y0, (x0 + x1) / 2
    opening = np.zeros((side, side), np.uint8)
    axes = round(OPENING[0] * width), round(OPENING[1] * height)
    cv2.ellipse(opening, (round(centre), round(y0 + 0.6 * height)), axes, 0, 0, 360, 255, -1)
    return opening


def _face_below_the_brows(face: Box, side: int) -> NDArray[np.uint8]:
    x0, y0, x1, y1 = face
    width, height, centre = x1 - x0, y1 - y0, (x0 + x1) / 2
    drawn = np.zeros((side, side), np.uint8)
    cv2.ellipse(drawn, (round(centre), round(y0 + 0.55 * height)), (round(0.46 * width), round(0.52 * height)), 0, 0, 360, 255, -1)
    drawn[: max(0, round(y0 + 0.1 * height))] = 0
    return drawn
