"""What goes into a try-on and what comes out. No torch here: the web server starts without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.errors import DeepHairError
from backend.imaging.crop import Box


class Cancelled(Exception):
    """The caller asked to stop; nothing was produced."""


class TryOnError(DeepHairError):
    """A photo that cannot be worked with, in words. Codes: no_face, many_faces, too_small, side_view, no_hair, flat_output."""


@dataclass(frozen=True)
class TryOnRequest:
    """target, reference: (H, W, 3) uint8 RGB, upright. At least one of reference and prompt. face: index into the preview's faces."""

    target: NDArray[np.uint8]
    reference: NDArray[np.uint8] | None
    prompt: str | None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    face: int | None = None


@dataclass(frozen=True)
class TryOnResult:
    """image: (H, W, 3) uint8 RGB of the target's size. mask: (H, W) float32; where it is 0 image equals target byte for byte."""

    image: NDArray[np.uint8]
    mask: NDArray[np.float32]
    info: dict[str, Any]


@dataclass(frozen=True)
class FaceInfo:
    """A detected face. box: x0, y0, x1, y1 and landmarks (5 x 2) in the picture's pixels."""

    box: Box
    confidence: float
    landmarks: list[list[float]]


@dataclass(frozen=True)
class Preview:
    """What would be worked on. hair_mask: (H, W) uint8 0/255 of the largest face's head; all zero without a face."""

    faces: list[FaceInfo]
    hair_mask: NDArray[np.uint8]
