"""The bald image: hair taken out and the hole filled from what surrounds it (DESIGN section 7, "cv2.inpaint").

``telea`` and ``ns`` are OpenCV's inpainting; ``two_part`` fills the skull with skin and the rest with background, so that neither the
hair's colour nor its outline shows through. All work at reduced size: the fill is smooth, and full size costs 8 times the time.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging.crop import Box
from backend.imaging.masks import any_coverage, grow, shrink

Method = Literal["telea", "ns", "two_part"]

WORK_SIDE = 256  # the fill is computed at this side at most, px
FACE_BLUR = 0.2  # sigma that leaves a face without features, in its sizes
STRAY_MARGIN = 0.012  # strays beside the mask are kept out of what the fill is made from, share of the side


def remove_hair(
    image: NDArray[np.uint8], region: NDArray[np.uint8], face_box: Box | None, method: Method = "two_part"
) -> NDArray[np.uint8]:
    """The crop with ``region`` filled; every pixel outside ``region`` is the input's own.

    image: (S, S, 3) uint8 RGB. region: (S, S) uint8 0/255, the hair or a larger edit region. face_box: in the crop's pixels or None.
    """
    if not region.any():
        return image.copy()
    side = image.shape[0]
    work = min(side, WORK_SIDE)
    small = cv2.resize(image, (work, work), interpolation=cv2.INTER_AREA)
    hole = grow(any_coverage(region, work), STRAY_MARGIN * work)
    scale = work / side
    face = None if face_box is None else tuple(v * scale for v in face_box)
    fill = _two_part(small, hole, face) if method == "two_part" else _opencv(small, hole, method)
    filled = image.copy()
    cv2.copyTo(cv2.resize(fill, (side, side), interpolation=cv2.INTER_CUBIC), region, filled)
    return filled


def _opencv(image: NDArray[np.uint8], hole: NDArray[np.uint8], method: Literal["telea", "ns"]) -> NDArray[np.uint8]:
    if hole.all():
        return np.full_like(image, 127)
    flag = cv2.INPAINT_TELEA if method == "telea" else cv2.INPAINT_NS
    return cv2.inpaint(image, hole, 3, flag).astype(np.uint8, copy=False)


def _two_part(image: NDArray[np.uint8], hole: NDArray[np.uint8], face: tuple[float, ...] | None) -> NDArray[np.uint8]:
    side = image.shape[0]
    skin_area = np.zeros((side, side), np.uint8)
    skull = np.zeros((side, side), np.uint8)
    if face is not None:
        x0, y0, x1, y1 = face
        width, height, centre = x1 - x0, y1 - y0, (x0 + x1) / 2
        cv2.ellipse(skull, (round(centre), round(y0 + 0.35 * height)), (round(0.56 * width), round(0.78 * height)), 0, 0, 360, 255, -1)
        cv2.ellipse(skin_area, (round(centre), round(y0 + 0.6 * height)), (round(0.36 * width), round(0.34 * height)), 0, 0, 360, 255, -1)
        skin_area[hole > 0] = 0
    known = shrink(np.where(hole > 0, 0, 255).astype(np.uint8), 0)
    background = push_pull(image, known & ~grow(skull, 0.01 * side) if face is not None else known)
    if not skin_area.any():
        return background
    skin = push_pull(image, skin_area)
    soft = cv2.GaussianBlur(skull, (0, 0), max(0.01 * side, 0.8)).astype(np.float32)[..., None] / 255.0
    return np.clip(skin * soft + background * (1 - soft), 0, 255).round().astype(np.uint8)


def push_pull(image: NDArray[np.uint8], known: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Fills the unknown smoothly from the known by an image pyramid (Gortler et al., The Lumigraph, 1996, section 3.4).

    image: (S, S, 3) uint8; known: (S, S) uint8 0/255. Known pixels keep their value; with nothing known the result is mid-grey.
    """
    if not known.any():
        return np.full_like(image, 127)
    return np.clip(filled(image.astype(np.float32), known), 0, 255).round().astype(np.uint8)


def filled(values: NDArray[np.float32], known: NDArray[np.uint8]) -> NDArray[np.float32]:
    """``push_pull`` of any values, (S, S, C) float32; something must be known."""
    weight = (known > 0).astype(np.float32)[..., None]
    levels = [(values * weight, weight)]
    while min(levels[-1][0].shape[:2]) > 1:
        colour, share = levels[-1]
        size = ((colour.shape[1] + 1) // 2, (colour.shape[0] + 1) // 2)
        levels.append(
            (
                cv2.resize(colour, size, interpolation=cv2.INTER_AREA),
                cv2.resize(share, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], 1),
            )
        )
    colour, share = levels[-1]
    found = colour.reshape(share.shape[0], share.shape[1], 3) / np.maximum(share, 1e-6)
    for colour, share in reversed(levels[:-1]):
        above = cv2.resize(found, (colour.shape[1], colour.shape[0]), interpolation=cv2.INTER_LINEAR).reshape(colour.shape)
        trust = np.clip(share, 0, 1)
        found = above * (1 - trust) + colour / np.maximum(share, 1e-6) * trust
    return np.asarray(found, np.float32)


def smooth_face(image: NDArray[np.uint8], face_box: Box, hair: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The crop with its face made a smooth gradient of its own skin, as the released training photos have it inside ``polygon2`` (DESIGN 5.4).

    image: (S, S, 3) uint8 RGB; face_box in its pixels; hair: (S, S) uint8 0/255. Hair gives no colour, in the face or around it: the bald
    image takes the skull's from this skin. Outside an ellipse in the box every pixel is kept.
    """
    side = image.shape[0]
    x0, y0, x1, y1 = face_box
    face = np.zeros((side, side), np.uint8)
    centre = (round((x0 + x1) / 2), round(y0 + 0.58 * (y1 - y0)))
    cv2.ellipse(face, centre, (max(1, round(0.40 * (x1 - x0))), max(1, round(0.40 * (y1 - y0)))), 0, 0, 360, 255, -1)
    work = min(side, WORK_SIDE)
    small = cv2.resize(image, (work, work), interpolation=cv2.INTER_AREA)
    bare = grow(any_coverage(hair, work), STRAY_MARGIN * work) == 0
    inside = any_coverage(face, work) > 0
    skin = np.where(inside & bare, 255, 0).astype(np.uint8)
    if not skin.any():  # the hair covers it all: what is left is what lies around
        skin = np.where(~inside & bare, 255, 0).astype(np.uint8)
    sigma = FACE_BLUR * max(x1 - x0, y1 - y0) * work / side
    fill = cv2.GaussianBlur(push_pull(small, skin), (0, 0), max(sigma, 0.5))
    return np.where(face[..., None] > 0, cv2.resize(fill, (side, side), interpolation=cv2.INTER_CUBIC), image).astype(np.uint8, copy=False)
