"""Paste-back at the original resolution: outside the feathered mask every byte is the upload's (DESIGN 5.6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging.crop import Square, mask_box
from backend.imaging.masks import shrink


@dataclass(frozen=True)
class Pasted:
    """image: (H, W, 3) uint8 RGB. mask: (H, W) float32 in [0, 1]; where it is 0, image equals the original byte for byte."""

    image: NDArray[np.uint8]
    mask: NDArray[np.float32]


Edges = tuple[bool, bool, bool, bool]


def feathered(region: NDArray[np.uint8], width: float, soft_edges: Edges = (False, False, False, False)) -> NDArray[np.float32]:
    """A soft mask that rises from 0 at the region's edge to 1 at ``width`` pixels inside: never above 0 outside the region.

    region: (S, S) uint8 0/255; returns (S, S) float32 in [0, 1]. soft_edges: at which of the square's own edges (left, top, right, bottom) the
    region ends, too; at the others it is taken to go on.
    """
    if width < 1:
        return (region > 0).astype(np.float32)
    left, top, right, bottom = (round(2 * width) * edge for edge in soft_edges)
    padded = cv2.copyMakeBorder(region, top, bottom, left, right, cv2.BORDER_CONSTANT, value=0).astype(np.uint8, copy=False)
    soft = cv2.GaussianBlur(shrink(padded, width / 2).astype(np.float32) / 255.0, (0, 0), max(width / 4, 0.3))
    soft = soft[top : top + region.shape[0], left : left + region.shape[1]]
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
    where the original stays whatever the others say. Parts beyond the frame are dropped; an edge of the square that lies inside the frame is
    soft, too. Memory goes with what changes, not with the square, which may be many times the frame.
    """
    height, width = original.shape[:2]
    soft = feathered(region, feather * region.shape[0], square.inner_edges((width, height)))
    mask, image = np.zeros((height, width), np.float32), original.copy()
    window = _window(soft, square, width, height)
    if window is None:
        return Pasted(image, mask)
    x0, y0, x1, y1 = window
    here = np.s_[y0:y1, x0:x1]
    alpha = np.clip(_part(soft, square, window), 0, 1)
    if allowed is not None:
        alpha = np.where(allowed[here] > 0, alpha, np.float32(0))
    mask[here] = alpha
    under = original[here].astype(np.float32)
    blended = under + (_part(generated, square, window).astype(np.float32) - under) * alpha[..., None]
    image[here] = np.where(alpha[..., None] > 0, np.clip(blended.round(), 0, 255), under).astype(np.uint8)
    return Pasted(image, mask)


def _window(soft: NDArray[np.float32], square: Square, width: int, height: int) -> tuple[int, int, int, int] | None:
    """The part of the frame that a soft mask of the square reaches: x0, y0, x1, y1; None where that is nothing."""
    box = mask_box((soft > 0).astype(np.uint8))
    if box is None:
        return None
    scale = square.side / soft.shape[0]
    reach = (-1, -1, 1, 1)  # enlarging blends a pixel farther
    left, top, right, bottom = ((v + beyond) * scale for v, beyond in zip(box, reach, strict=True))
    x0, y0 = max(0, square.x0 + max(0, int(left))), max(0, square.y0 + max(0, int(top)))
    x1 = min(width, square.x0 + min(square.side, int(right) + 1))
    y1 = min(height, square.y0 + min(square.side, int(bottom) + 1))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _part(image: NDArray[Any], square: Square, window: tuple[int, int, int, int]) -> NDArray[Any]:
    """A window of the frame from the square's picture (S, S[, C]) brought to the square's side: enlarged there alone, averaged when it shrinks."""
    x0, y0, x1, y1 = window
    scale = image.shape[0] / square.side
    if scale >= 1:
        sized = image if scale == 1 else cv2.resize(image, (square.side, square.side), interpolation=cv2.INTER_AREA)
        return sized[y0 - square.y0 : y1 - square.y0, x0 - square.x0 : x1 - square.x0]
    inverse = np.array([[scale, 0, (x0 - square.x0 + 0.5) * scale - 0.5], [0, scale, (y0 - square.y0 + 0.5) * scale - 0.5]])
    flags = (cv2.INTER_LINEAR if image.ndim == 2 else cv2.INTER_CUBIC) | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, inverse, (x1 - x0, y1 - y0), flags=flags, borderMode=cv2.BORDER_REPLICATE)
