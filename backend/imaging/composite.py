"""Paste-back at the original resolution: outside the feathered mask every byte is the upload's (DESIGN 5.6)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging.crop import Square
from backend.imaging.masks import shrink


@dataclass(frozen=True)
class Pasted:
    """image: (H, W, 3) uint8 RGB. mask: (H, W) float32 in [0, 1]; where it is 0, image equals the original byte for byte."""

    image: NDArray[np.uint8]
    mask: NDArray[np.float32]


def feathered(region: NDArray[np.uint8], width: float) -> NDArray[np.float32]:
    """A soft mask that rises from 0 at the region's edge to 1 at ``width`` pixels inside: never above 0 outside the region.

    region: (S, S) uint8 0/255; returns (S, S) float32 in [0, 1].
    """
    if width < 1:
        return (region > 0).astype(np.float32)
    inner = shrink(region, width / 2)
    sigma = max(width / 4, 0.3)
    soft = cv2.GaussianBlur(inner.astype(np.float32) / 255.0, (0, 0), sigma)
    return np.where(region > 0, np.where(soft < 1e-3, 0.0, soft), 0.0).astype(np.float32)


def paste_back(
    original: NDArray[np.uint8],
    generated: NDArray[np.uint8],
    region: NDArray[np.uint8],
    square: Square,
    feather: float,
    allowed: NDArray[np.uint8] | None = None,
) -> Pasted:
    """Lays a generated head crop over the upload.

    original: (H, W, 3) uint8 RGB. generated: (S, S, 3) uint8, the crop of ``square`` at any resolution. region: (R, R) uint8 0/255,
    what may change, at any resolution. feather: width of the soft edge as a share of the crop's side. allowed: (H, W) uint8, zero
    where the original stays whatever the others say. Parts beyond the frame are dropped.
    """
    height, width = original.shape[:2]
    side = square.side
    enlarged = cv2.resize(generated, (side, side), interpolation=cv2.INTER_AREA if generated.shape[0] > side else cv2.INTER_CUBIC)
    soft_small = feathered(region, feather * region.shape[0])
    soft = np.clip(cv2.resize(soft_small, (side, side), interpolation=cv2.INTER_LINEAR), 0, 1)
    x0, y0 = max(0, square.x0), max(0, square.y0)
    x1, y1 = min(width, square.x0 + side), min(height, square.y0 + side)
    mask = np.zeros((height, width), np.float32)
    image = original.copy()
    if x1 > x0 and y1 > y0:
        window = np.s_[y0 - square.y0 : y1 - square.y0, x0 - square.x0 : x1 - square.x0]
        alpha = soft[window]
        if allowed is not None:
            alpha = np.where(allowed[y0:y1, x0:x1] > 0, alpha, np.float32(0))
        mask[y0:y1, x0:x1] = alpha
        under = original[y0:y1, x0:x1].astype(np.float32)
        blended = under + (enlarged[window].astype(np.float32) - under) * alpha[..., None]
        image[y0:y1, x0:x1] = np.where(alpha[..., None] > 0, np.clip(blended.round(), 0, 255), under).astype(np.uint8)
    return Pasted(image, mask)
