"""Hair patches for Stage 1 and the style picture for Stage 2, both cut at the photo's own scale (DESIGN 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging.crop import mask_box
from backend.imaging.masks import shrink

PATCH_SHARE = 1 / 8  # side of a patch over the head crop's side: 128 px of a 1024-px crop, and never starving at smaller ones
STYLE_SIDE = 224


@dataclass(frozen=True)
class Patch:
    """image: (P, P, 3) uint8 RGB. box: where it was cut, x0, y0, side in the native crop. hair: covered share, 0..1."""

    image: NDArray[np.uint8]
    box: tuple[int, int, int]
    hair: float


def cut_patches(image: NDArray[np.uint8], hair: NDArray[np.uint8], *, size: int, count: int, min_hair: float) -> list[Patch]:
    """The ``count`` best spread windows that hair covers to at least ``min_hair``, in reading order.

    image: the head crop at the photo's own scale, (S, S, 3) uint8 RGB; hair: (S, S) 0/255. Windows of S/8 stand on a grid of half
    their side; where more fit than are wanted, evenly spaced ones are taken. Written at ``size`` x ``size``.
    """
    side = max(8, round(image.shape[0] * PATCH_SHARE))
    step = max(1, side // 2)
    summed = cv2.integral((hair > 0).astype(np.uint8))
    starts = range(0, image.shape[0] - side + 1, step)
    windows = []
    for y in starts:
        for x in starts:
            covered = summed[y + side, x + side] - summed[y, x + side] - summed[y + side, x] + summed[y, x]
            if covered >= min_hair * side * side:
                windows.append((x, y, covered / side**2))
    chosen = windows if len(windows) <= count else [windows[i] for i in np.linspace(0, len(windows) - 1, count).round().astype(int)]
    shrinking = side > size
    return [
        Patch(
            cv2.resize(image[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC),
            (x, y, side),
            float(share),
        )
        for x, y, share in chosen
    ]


def style_picture(image: NDArray[np.uint8], hair: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The hair alone, aspect kept, padded to (224, 224, 3) uint8 RGB.

    What is not hair takes the hair's mean colour, so that face and background say nothing. image: (S, S, 3), hair: (S, S) 0/255 at any
    one scale. Raises ValueError when the mask is empty.
    """
    box = mask_box(hair)
    if box is None:
        raise ValueError("a style picture needs hair")
    x0, y0, x1, y1 = (int(v) for v in box)
    radius = max(1.0, 0.005 * hair.shape[0])
    edge = round(radius) + 1  # with a rim without hair the erosion sees what it would see in the whole picture
    window = np.s_[max(0, y0 - edge) : y1 + edge, max(0, x0 - edge) : x1 + edge]
    core = shrink(hair[window], radius)
    colour = mean_colour(image[window], core if core.any() else hair[window])
    cut = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
    cut[:] = np.round(colour)
    cv2.copyTo(image[y0:y1, x0:x1], hair[y0:y1, x0:x1], cut)
    scale = STYLE_SIDE / max(cut.shape[:2])
    size = (max(1, round(cut.shape[1] * scale)), max(1, round(cut.shape[0] * scale)))
    small = cv2.resize(cut, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    picture = np.empty((STYLE_SIDE, STYLE_SIDE, 3), np.uint8)
    picture[:] = np.round(colour)
    top, left = (STYLE_SIDE - size[1]) // 2, (STYLE_SIDE - size[0]) // 2
    picture[top : top + size[1], left : left + size[0]] = small
    return picture


def mean_colour(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The mean RGB over a mask, (3,) float64 in 0..255. Raises ValueError when the mask is empty."""
    if not mask.any():
        raise ValueError("the mean colour of an empty mask is not defined")
    total = cv2.sumElems(cv2.bitwise_and(image, image, mask=mask))  # whole numbers, exact; a tenth of the time of image[mask > 0].mean()
    return np.array(total[:3], np.float64) / np.count_nonzero(mask)
