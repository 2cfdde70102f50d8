"""The head-structure map that a ControlNet reads: where skull, face and features are, and nothing about hair (DESIGN 5.5).

It is drawn from the detector's box and landmarks alone, so it is the same whatever hair a head has or gets.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging.crop import Box

FEATURE = 0.09  # radius of a feature's disc, in face widths


def head_structure(
    side: int, face_box: Box | None, landmarks: Sequence[Sequence[float]] | NDArray[np.floating] | None
) -> NDArray[np.uint8]:
    """The map of a head crop, (side, side, 3) uint8 RGB: red the skull, green the face, blue eyes, nose and corners of the mouth.

    face_box and landmarks (5, 2) are in the crop's pixels. Without a face (a view from behind) the map is black.
    """
    drawn = np.zeros((side, side, 3), np.uint8)
    if face_box is None:
        return drawn
    x0, y0, x1, y1 = face_box
    width, height, centre = x1 - x0, y1 - y0, (x0 + x1) / 2
    skull, face, features = (np.zeros((side, side), np.uint8) for _ in range(3))
    cv2.ellipse(skull, (round(centre), round(y0 + 0.35 * height)), (round(0.56 * width), round(0.78 * height)), 0, 0, 360, 255, -1)
    cv2.ellipse(face, (round(centre), round(y0 + 0.5 * height)), (round(0.45 * width), round(0.5 * height)), 0, 0, 360, 255, -1)
    for x, y in [] if landmarks is None else np.asarray(landmarks, np.float64):
        cv2.circle(features, (round(float(x)), round(float(y))), max(1, round(FEATURE * width)), 255, -1)
    return np.stack([skull, face, features], axis=2)
