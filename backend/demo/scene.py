"""Backgrounds, and the camera's last steps: white balance and sensor noise."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from .camera import Array
from .traits import Scene

_SMALL = 64


def backdrop(scene: Scene, size: int, seed: int) -> NDArray[np.uint8]:
    """(size, size, 3) uint8 RGB: a plain wall, a gradient, or a salon out of focus."""
    rng = np.random.default_rng([0xBAC, seed])
    first, second = (np.asarray(c, np.float32) for c in scene.backdrop)
    ramp = np.linspace(0, 1, _SMALL, dtype=np.float32)
    if scene.background == "plain":
        lamp = 1 - 0.12 * ((ramp[None, :] - 0.5 - 0.4 * scene.light[0]) ** 2 + (ramp[:, None] - 0.3) ** 2)
        small = first * lamp[..., None]
    else:
        lean = float(rng.uniform(-0.5, 0.5))
        mix = np.clip(ramp[:, None] + lean * (ramp[None, :] - 0.5), 0, 1)[..., None]
        small = first * (1 - mix) + second * mix
        if scene.background == "salon":
            small = _salon(small.astype(np.float32), rng)
    large = cv2.resize(small.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(large * (0.78 + 0.33 * scene.strength), 0, 255).astype(np.uint8)


def _salon(wall: Array, rng: np.random.Generator) -> Array:
    """Mirrors, shelves, chairs and lamps as blurred boxes and discs."""
    room = wall.copy()
    for _ in range(int(rng.integers(4, 9))):
        x, y = rng.integers(-8, _SMALL, 2)
        w, h = rng.integers(6, 26), rng.integers(8, 44)
        tone = np.clip(rng.uniform(30, 235) + rng.normal(0, 14, 3), 0, 255)
        cv2.rectangle(room, (int(x), int(y)), (int(x + w), int(y + h)), tuple(float(v) for v in 0.6 * tone + 0.4 * wall.mean((0, 1))), -1)
    for _ in range(int(rng.integers(0, 6))):
        x, y = rng.integers(0, _SMALL), rng.integers(0, _SMALL // 3)
        cv2.circle(room, (int(x), int(y)), int(rng.integers(1, 4)), (255.0, 246.0, 224.0), -1)
    return cv2.GaussianBlur(room, (0, 0), float(rng.uniform(1.4, 3.0)))


def finish(image: Array, scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """White balance, a slight tone curve and sensor noise; float or uint8 RGB in, uint8 RGB out."""
    height, width = image.shape[:2]
    warm = np.array([1 + scene.warmth, 1.0, 1 - 1.3 * scene.warmth], np.float32)
    grain = rng.integers(-128, 128, (height, width, 1), dtype=np.int8).astype(np.float32) * (scene.noise / 74.0)
    levels = np.arange(256, dtype=np.float32) / 255
    curve = 255 * (levels + 0.10 * levels * (1 - levels) * (2 * levels - 0.6))
    toned = cv2.LUT(np.clip(image, 0, 255).astype(np.uint8), curve.astype(np.float32)) * warm + grain
    return np.clip(np.rint(toned), 0, 255).astype(np.uint8)
