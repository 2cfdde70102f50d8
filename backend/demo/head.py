"""The head as a star-shaped surface: its radius over all directions is a smooth union of ellipsoids with carved features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from .camera import Array, Camera, Hits, lookup, trace
from .traits import Identity

ROWS, COLUMNS = 256, 512


@dataclass(frozen=True)
class HeadSurface:
    """Tables over direction (rows: latitude -90..90, columns: longitude -180..180, 0 is the face's front).

    radius (R, C) in head units; normal (R, C, 3) unit; cavity (R, C) 0..1 where 1 is open and less is sheltered from light.
    """

    radius: Array
    normal: Array
    cavity: Array

    def radius_at(self, points: Array) -> Array:
        """(n, 3) -> (n,): how far the surface lies from the centre in each point's direction."""
        return lookup(self.radius, *_table_coordinates(points))  # type: ignore[return-value]

    def distance(self, points: Array) -> Array:
        """(n, 3) -> (n,): radial distance to the surface, negative inside."""
        return np.sqrt((points * points).sum(axis=1)) - self.radius_at(points)

    def shading_at(self, points: Array) -> tuple[Array, Array]:
        """(n, 3) -> unit normals (n, 3) and cavity (n,)."""
        u, v = _table_coordinates(points)
        return lookup(self.normal, u, v), lookup(self.cavity, u, v)  # type: ignore[return-value]

    def trace(self, camera: Camera, top: int, left: int, height: int, width: int) -> Hits:
        """The visible surface in a window of the frame."""
        rays = camera.rays(top, left, height, width)
        room = float(self.radius.max()) ** 2 - (rays * rays).sum(axis=2)
        near = np.sqrt(np.maximum(room, 0))
        return trace(rays, camera.rotation[2], near, -near, self.distance, steps=34, eps=0.25 / camera.scale)


def _table_coordinates(points: Array) -> tuple[Array, Array]:
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    u = np.arctan2(x, z) * (COLUMNS / (2 * np.pi)) + COLUMNS / 2
    v = np.arctan2(y, np.sqrt(x * x + z * z)) * ((ROWS - 1) / np.pi) + (ROWS - 1) / 2
    return u, v


def directions(rows: int = ROWS, columns: int = COLUMNS) -> Array:
    """(rows, columns + 1, 3) unit vectors; the last column repeats the first so that sampling wraps around."""
    lat = np.linspace(-np.pi / 2, np.pi / 2, rows, dtype=np.float32)[:, None]
    lon = np.linspace(-np.pi, np.pi, columns + 1, dtype=np.float32)[None, :]
    return np.stack([np.cos(lat) * np.sin(lon), np.sin(lat) + 0 * lon, np.cos(lat) * np.cos(lon)], axis=2)


Vec = tuple[float, float, float]


def _ellipsoids(who: Identity) -> list[tuple[Vec, Vec, float]]:
    """Centre, semi-axes and how sharply each part joins the rest (1 soft; larger keeps its own edge)."""
    w, lg, jaw = who.face_width, who.face_length, who.jaw_width
    nose_tip = -0.36 * who.nose_length
    wings = 0.10 * who.nose_width
    mouth = -0.67 * lg + who.mouth_height
    lips = who.lip_thickness
    chin_z = 0.46 + who.chin_forward
    return [
        ((0, 0.27, -0.08), (0.77 * w, 0.86 * who.cranium_height, 0.98), 1),
        ((0, 0.36, 0.28 - who.forehead_slope), (0.60 * w, 0.55, 0.56), 1),
        ((0, -0.05, -0.5), (0.56, 0.52, 0.46), 1),
        ((0, -0.26, 0.20), (0.61 * w, 0.80 * lg, 0.64), 1),
        ((0, -0.60 * lg, 0.14), (0.53 * w * jaw, 0.38, 0.50), 1),
        ((0, -0.88 * lg, chin_z), (0.27 * who.chin_size, 0.24, 0.25), 0.7),
        ((-0.40 * w, -0.20, 0.46), (0.20, 0.22, 0.24 * who.cheekbones), 1),
        ((0.40 * w, -0.20, 0.46), (0.20, 0.22, 0.24 * who.cheekbones), 1),
        ((-0.22, 0.19 + who.brow_height, 0.60), (0.24, 0.11, 0.255), 1),
        ((0.22, 0.19 + who.brow_height, 0.60), (0.24, 0.11, 0.255), 1),
        ((0, nose_tip * 0.35, 0.76 + 0.5 * who.nose_forward), (0.085, 0.34, 0.10 + 0.06 * who.nose_bridge), 2.2),
        ((0, nose_tip, 0.85 + who.nose_forward), (0.12 * who.nose_width, 0.115, 0.135), 1.3),
        ((-wings, nose_tip - 0.02, 0.79), (0.085, 0.075, 0.115), 2.6),
        ((wings, nose_tip - 0.02, 0.79), (0.085, 0.075, 0.115), 2.6),
        ((0, mouth + 0.05, 0.71), (0.21 * who.mouth_width, 0.06 * lips, 0.15), 2.2),
        ((0, mouth - 0.055, 0.695), (0.175 * who.mouth_width, 0.07 * lips, 0.15), 2.2),
    ]


def _reach(d: Array, centre: Vec, axes: Vec) -> Array:
    """How far along each unit direction the ellipsoid's outer side lies; 0.3 where the ray misses it."""
    scaled = d / np.asarray(axes, np.float32)
    c = np.asarray(centre, np.float32) / np.asarray(axes, np.float32)
    a = (scaled * scaled).sum(axis=-1)
    b = scaled @ c
    root = b * b - a * (float(c @ c) - 1)
    return np.where(root > 0, (b + np.sqrt(np.maximum(root, 0))) / a, 0.3).astype(np.float32)


@lru_cache(maxsize=16)
def head_surface(who: Identity) -> HeadSurface:
    """Build the surface of one person (about 40 ms; kept for the other views of the same head)."""
    d = directions()
    softness = 22.0
    total = np.zeros(d.shape[:2], np.float32)
    for centre, axes, sharp in _ellipsoids(who):
        reach = _reach(d, centre, axes)
        total += np.exp(np.minimum(softness * sharp * (reach - 0.95), 40)) ** (1 / sharp)
    radius = np.log(np.maximum(total, 1e-6)) / softness + 0.95
    radius = _carve(radius.astype(np.float32), d, who)
    radius = cv2.GaussianBlur(radius, (0, 0), 1.1, borderType=cv2.BORDER_REPLICATE)
    wide = cv2.GaussianBlur(radius, (0, 0), 9)
    cavity = np.clip(1 - 5.0 * (wide - radius), 0.55, 1.08)
    return HeadSurface(radius, _normals(radius[..., None] * d), cavity.astype(np.float32))


def _carve(radius: Array, d: Array, who: Identity) -> Array:
    """Sink the eye sockets, lift the eyeballs and mark the line between the lips."""
    x, y = d[..., 0] * radius, d[..., 1] * radius
    front = d[..., 2] > 0
    for side in (-1, 1):
        ex = side * 0.315 * who.eye_spacing
        socket = np.exp(-(((x - ex) / 0.19) ** 2) - ((y - 0.015) / 0.12) ** 2)
        ball = np.exp(-(((x - ex) / 0.10) ** 2) - (y / 0.07) ** 2)
        radius = radius - front * (0.075 * who.eye_depth * socket - 0.030 * ball)
    mouth = -0.67 * who.face_length + who.mouth_height
    line = np.exp(-((x / (0.2 * who.mouth_width)) ** 2) - ((y - mouth) / 0.018) ** 2)
    groove = np.exp(-((x / 0.16) ** 2) - ((y - mouth + 0.15) / 0.05) ** 2)
    return (radius - front * (0.022 * line + 0.010 * groove)).astype(np.float32)


def _normals(points: Array) -> Array:
    along_lat, along_lon = np.gradient(points, axis=(0, 1))
    normal = np.cross(along_lon, along_lat)
    normal[0], normal[-1] = (0, -1, 0), (0, 1, 0)
    normal /= np.maximum(np.linalg.norm(normal, axis=2, keepdims=True), 1e-9)
    return normal.astype(np.float32)


_HAIRLINE_LON = np.array([0, 22, 42, 56, 66, 74, 82, 92, 106, 122, 145, 180], np.float32)
_HAIRLINE_LAT = np.array([41, 40.5, 38, 31, 19, 3, -6, 11, 9, -14, -31, -36], np.float32)


def scalp_margin(who: Identity, points: Array) -> Array:
    """(..., 3) -> (...): degrees of latitude above the hairline (negative on the face and neck)."""
    lon = np.degrees(np.abs(np.arctan2(points[..., 0], points[..., 2])))
    lat = np.degrees(np.arctan2(points[..., 1], np.sqrt(points[..., 0] ** 2 + points[..., 2] ** 2)))
    line = np.interp(lon, _HAIRLINE_LON, _HAIRLINE_LAT) + who.hairline * np.exp(-((lon / 50) ** 2))
    return (lat - line).astype(np.float32)


def ear_centre(who: Identity, side: int) -> Array:
    """(3,) middle of one ear (side -1: image-left in a frontal view)."""
    return np.array([side * 0.735 * who.face_width, -0.12, -0.10], np.float32)


def ear_hits(
    who: Identity, camera: Camera, side: int, top: int, left: int, height: int, width: int
) -> tuple[Hits, NDArray[np.float32], Array]:
    """One ear (side -1: image-left in a frontal view) as a tilted flat ellipsoid: hits, normals and its own (u, v) coordinates."""
    size = who.ear_size
    axes = np.array([0.055, 0.31 * size, 0.185 * size], np.float32)
    outward = np.array([side * np.cos(who.ear_out), 0.0, np.sin(who.ear_out)], np.float32)
    frame = np.stack([outward, np.array([0, np.cos(0.14), np.sin(-0.14)], np.float32), np.zeros(3, np.float32)])
    frame[2] = np.cross(frame[0], frame[1])
    local = (camera.rays(top, left, height, width) - ear_centre(who, side)) @ frame.T / axes
    towards = frame @ camera.rotation[2] / axes
    a = float(towards @ towards)
    b = local @ towards
    root = b * b - a * ((local * local).sum(axis=2) - 1)
    depth = ((-b + np.sqrt(np.maximum(root, 0))) / a).astype(np.float32)
    surface = local + depth[..., None] * towards
    normal = (surface / axes) @ frame
    normal /= np.maximum(np.linalg.norm(normal, axis=2, keepdims=True), 1e-9)
    gap = np.clip(-root * (0.1 / a), 0, 1).astype(np.float32)
    point = camera.rays(top, left, height, width) + depth[..., None] * camera.rotation[2]
    return Hits(point, depth, gap), normal.astype(np.float32), surface[..., 1:]
