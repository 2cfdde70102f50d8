"""Neck, shoulders and clothes: a stack of ellipses around a vertical axis, traced at reduced size because it is smooth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .camera import Array, Camera, Hits, trace
from .traits import Identity, Scene

_TOP, _BOTTOM, _SAMPLES = -0.45, -6.5, 1024
# height, half width, half depth, centre depth (head units); the neck starts inside the head
_NECK = ((-0.45, 0.44, 0.44, -0.16), (-0.9, 0.455, 0.46, -0.16), (-1.25, 0.47, 0.475, -0.2), (-1.5, 0.54, 0.52, -0.24))
_TORSO = (
    (-1.62, 0.70, 0.56, -0.26), (-1.75, 0.98, 0.61, -0.25), (-1.9, 1.32, 0.67, -0.22), (-2.1, 1.62, 0.75, -0.19),
    (-2.45, 1.84, 0.84, -0.14), (-3.2, 1.93, 0.92, -0.06), (-4.4, 2.0, 0.94, -0.04), (-6.5, 2.05, 0.94, -0.04),
)  # fmt: skip
_CAPE = (
    (-1.62, 0.74, 0.64, -0.24), (-1.8, 1.18, 0.82, -0.2), (-1.95, 1.58, 0.94, -0.16), (-2.15, 1.90, 1.06, -0.12),
    (-2.5, 2.14, 1.2, -0.06), (-3.2, 2.34, 1.42, 0.0), (-4.4, 2.62, 1.7, 0.05), (-6.5, 3.0, 2.0, 0.05),
)  # fmt: skip


@dataclass(frozen=True)
class BodySurface:
    """`table` (1024, 4): half width, half depth, centre depth and slope factor over heights _TOP.._BOTTOM."""

    table: Array
    cape: bool

    def section(self, y: Array) -> Array:
        """(n,) heights -> (n, 4) rows of the table."""
        index = (y - _TOP) * ((_SAMPLES - 1) / (_BOTTOM - _TOP))
        return self.table[np.clip(index, 0, _SAMPLES - 1).astype(np.int32)]

    def distance(self, points: Array) -> Array:
        """(n, 3) -> (n,): a conservative distance; above the neck's top the points are outside."""
        half_width, half_depth, centre, slope = self.section(points[:, 1]).T
        ring = np.sqrt((points[:, 0] / half_width) ** 2 + ((points[:, 2] - centre) / half_depth) ** 2)
        return np.maximum((ring - 1) * np.minimum(half_width, half_depth) * slope, points[:, 1] - _TOP)

    def normals(self, points: Array) -> Array:
        """(n, 3) -> unit normals (n, 3)."""
        eps = 0.03
        half_width, half_depth, centre, _ = self.section(points[:, 1]).T
        nx = points[:, 0] / half_width**2
        nz = (points[:, 2] - centre) / half_depth**2
        below, above = self.section(points[:, 1] - eps), self.section(points[:, 1] + eps)
        ring = [np.sqrt((points[:, 0] / s[:, 0]) ** 2 + ((points[:, 2] - s[:, 2]) / s[:, 1]) ** 2) for s in (above, below)]
        normal = np.stack([nx, (ring[0] - ring[1]) / (2 * eps), nz], axis=1)
        return normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)

    def trace(self, camera: Camera, top: int, left: int, height: int, width: int, step: int) -> Hits:
        """The visible surface in a window of the frame, one ray per `step` x `step` pixels."""
        rays = camera.rays(top, left, height, width, step)
        reach = np.full(rays.shape[:2], 3.2, np.float32)
        return trace(rays, camera.rotation[2], reach, -reach, self.distance, steps=26, eps=0.4 / camera.scale)


@lru_cache(maxsize=32)
def body_surface(who: Identity, garment: str) -> BodySurface:
    """The surface of one person in one kind of garment."""
    cape = garment == "cape"
    rows = np.array(_NECK + (_CAPE if cape else _TORSO), np.float64)
    heights = np.linspace(_TOP, _BOTTOM, _SAMPLES)
    columns = [np.interp(-heights, -rows[:, 0], rows[:, k]) for k in (1, 2, 3)]
    kernel = np.hanning(41) / np.hanning(41).sum()
    smooth = [np.convolve(np.pad(c, 20, mode="edge"), kernel, mode="valid") for c in columns]
    neck = 1.08 if who.sex == "male" else 0.93
    wide = np.interp(-heights, [1.3, 2.1], [neck, who.shoulders])
    smooth[0], smooth[1] = smooth[0] * wide, smooth[1] * np.interp(-heights, [1.3, 2.1], [neck, 1.0])
    growth = np.abs(np.gradient(smooth[0], heights)) * 0.55 + np.abs(np.gradient(smooth[1], heights)) * 0.45
    table = np.stack([*smooth, 1 / np.sqrt(1 + growth**2)], axis=1)
    return BodySurface(table.astype(np.float32), cape)


def garment_cover(points: Array, scene: Scene) -> Array:
    """(n, 3) -> (n,): head units below the neckline (positive where cloth lies)."""
    angle = np.arctan2(points[:, 0], points[:, 2] + 0.25)
    front = np.exp(-((angle / 0.75) ** 2))
    drop = {"cape": 0.02, "round": 0.34, "vneck": 0.0, "collar": 0.1}[scene.garment] * front
    if scene.garment == "vneck":
        drop = 0.75 * np.maximum(0, 1 - np.abs(points[:, 0]) / 0.42) * (points[:, 2] > 0)
    edge = {"cape": -1.32, "collar": -1.40}.get(scene.garment, -1.62)
    return edge - drop - points[:, 1]


def cloth_folds(points: Array, cape: bool, phase: float) -> Array:
    """(n, 3) -> (n,): brightness of folds, about 1."""
    angle = np.arctan2(points[:, 0], points[:, 2] + 0.1)
    depth = np.clip((-1.7 - points[:, 1]) / 1.2, 0, 1)
    if cape:
        wave = np.sin(9 * angle + phase + 1.3 * np.sin(3 * angle + phase)) + 0.5 * np.sin(17 * angle + 2 * phase + points[:, 1])
        return 1 + 0.13 * depth * wave
    arm = np.exp(-(((np.abs(points[:, 0]) - 1.30 - 0.05 * points[:, 1] - 0.16) / 0.045) ** 2)) * np.clip((-2.85 - points[:, 1]) * 0.8, 0, 1)
    crease = np.sin(5 * points[:, 0] + 3.5 * points[:, 1] + phase) * np.sin(2.2 * points[:, 1] - phase)
    return 1 - 0.35 * arm + 0.05 * depth * crease
