"""One picture's hair in the colour of another's: mean and spread of L*, a*, b* (Reinhard et al., Color Transfer between Images, 2001)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

BAND = 512  # rows converted at a time: CIELAB in float32 is four times the picture


@dataclass(frozen=True)
class ColourStatistics:
    """Mean and standard deviation of L*, a*, b* over some pixels, two (3,) float32; L* in 0..100."""

    mean: NDArray[np.float32]
    spread: NDArray[np.float32]


def colour_statistics(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> ColourStatistics:
    """The colours of ``image`` (H, W, 3) uint8 RGB where ``mask`` (H, W) is not zero. Raises ValueError where it is zero everywhere."""
    pixels = image[mask > 0]
    if not len(pixels):
        raise ValueError("there are no pixels to take the colour from")
    values = _to_lab(pixels[None])[0].astype(np.float64)
    return ColourStatistics(values.mean(axis=0).astype(np.float32), values.std(axis=0).astype(np.float32))


def recoloured(
    image: NDArray[np.uint8], own: ColourStatistics, wanted: ColourStatistics, *, max_gain: float = float("inf")
) -> NDArray[np.uint8]:
    """The picture (H, W, 3) uint8 RGB with the statistics ``own`` moved onto ``wanted``; colours that no screen shows are clipped.

    max_gain: the spread is multiplied or divided by this much at most; the noise of nearly black hair would be seen otherwise.
    """
    gain = np.clip(wanted.spread / np.maximum(own.spread, 1e-6), 1.0 / max_gain, max_gain).astype(np.float32)
    done = np.empty_like(image)
    for top in range(0, image.shape[0], BAND):
        lab = (_to_lab(image[top : top + BAND]) - own.mean) * gain + wanted.mean
        np.clip(lab[..., 0], 0, 100, out=lab[..., 0])
        rgb = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
        done[top : top + BAND] = np.clip(rgb * 255.0, 0, 255).round().astype(np.uint8)
    return done


def _to_lab(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    return cv2.cvtColor(image.astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB).astype(np.float32, copy=False)
