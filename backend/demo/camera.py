"""An orthographic camera that walks around the person, and the ray tracer that the head and the body share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, radians, sin

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Camera:
    """`yaw` turns the face to the image's right, `pitch` lifts the camera (degrees); `scale` is pixels per head unit."""

    yaw: float
    pitch: float
    scale: float
    centre: tuple[float, float]

    @property
    def rotation(self) -> Array:
        """(3, 3): rows are the camera's right, up and towards-the-camera axes in the person's coordinates."""
        c, s = cos(radians(self.yaw)), sin(radians(self.yaw))
        cp, sp = cos(radians(self.pitch)), sin(radians(self.pitch))
        return np.array([[c, 0, s], [s * sp, cp, -c * sp], [-s * cp, sp, c * cp]], np.float32)

    def project(self, points: Array) -> Array:
        """Person coordinates (..., 3) to (..., 3): column u, row v in pixels, and depth in head units (larger is nearer)."""
        turned = points @ self.rotation.T
        turned[..., 0] = self.centre[0] + self.scale * turned[..., 0]
        turned[..., 1] = self.centre[1] - self.scale * turned[..., 1]
        return turned

    def rays(self, top: int, left: int, height: int, width: int, step: float = 1.0) -> Array:
        """(height, width, 3): where the ray of each pixel of a window crosses the plane of depth 0, in person coordinates."""
        rows = (self.centre[1] - (top + (np.arange(height, dtype=np.float32) + 0.5) * step)) / self.scale
        columns = (left + (np.arange(width, dtype=np.float32) + 0.5) * step - self.centre[0]) / self.scale
        right, up, _ = self.rotation
        return columns[None, :, None] * right + rows[:, None, None] * up


@dataclass(frozen=True)
class Hits:
    """What the rays of a window met. Arrays share the window's shape; `gap` is the closest distance to the surface (head units)."""

    point: Array
    depth: Array
    gap: Array


def trace(rays: Array, towards: Array, near: Array, far: Array, distance: Callable[[Array], Array], steps: int, eps: float) -> Hits:
    """Sphere tracing (Hart 1996) of an implicit surface along parallel rays.

    `distance` maps (n, 3) points to (n,) signed distances that must not overestimate by much. `near` and `far` bound the
    depth of each ray; a ray with near <= far is skipped.
    """
    base = rays.reshape(-1, 3)
    best, stop = near.reshape(-1).copy(), far.reshape(-1)
    gap = np.full(best.shape, np.inf, np.float32)
    index = np.flatnonzero(best > stop)
    origin, depth, end = base[index], best[index], stop[index]
    closest, at = gap[index], best[index]
    for step in range(steps):
        f = distance(origin + depth[:, None] * towards)
        closer = f < closest
        closest, at = np.where(closer, f, closest), np.where(closer, depth, at)
        depth = depth - 0.85 * f
        if step % 3 == 2 or step == steps - 1:  # put finished rays away; doing it at every step costs more than it saves
            gap[index], best[index] = closest, at
            going = np.flatnonzero((f > eps) & (depth > end))
            if going.size == 0:
                break
            index, origin, depth, end = index[going], origin[going], depth[going], end[going]
            closest, at = closest[going], at[going]
    shape = rays.shape[:2]
    point = (base + best[:, None] * towards).reshape(rays.shape)
    return Hits(point, best.reshape(shape), gap.reshape(shape))


def lookup(table: NDArray[np.generic], columns: Array, rows: Array, interpolation: int = cv2.INTER_LINEAR) -> NDArray[np.generic]:
    """Sample `table` (H, W[, C]) at flat float coordinates (n,); the result is (n[, C])."""
    count = columns.size
    width = 1024
    padded = -(-count // width) * width
    grid = np.zeros((2, padded), np.float32)
    grid[0, :count], grid[1, :count] = columns, rows
    sampled = cv2.remap(table, grid[0].reshape(-1, width), grid[1].reshape(-1, width), interpolation, borderMode=cv2.BORDER_REPLICATE)
    return sampled.reshape(padded, *table.shape[2:])[:count]
