"""The person without hair: traced head, ears, neck and clothes, lit and put together with depth and class ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor

import cv2
import numpy as np
from numpy.typing import NDArray

from .body import BodySurface, body_surface, cloth_folds, garment_cover
from .camera import Array, Camera
from .face import eye_centre, paint_face
from .head import ear_centre, ear_hits, head_surface, scalp_margin
from .strands import light_in_person
from .traits import Hairstyle, Identity, Scene

_FACE_TURN = 100.0


@dataclass(frozen=True)
class Person:
    """rgb (H, W, 3) float32 0..255; cover (H, W) 0..1; depth (H, W) head units, -inf beside the person; classes (H, W) uint8;
    head (H, W) 0..1 cover of the head alone; box and points: face box and landmarks in these pixels, None when turned away."""

    rgb: Array
    cover: Array
    depth: Array
    classes: NDArray[np.uint8]
    head: Array
    box: tuple[float, float, float, float] | None
    points: Array | None

    def face(self, ratio: float) -> tuple[tuple[float, float, float, float] | None, Array | None]:
        """Face box and landmarks scaled by `ratio`."""
        if self.box is None or self.points is None:
            return None, None
        x0, y0, x1, y1 = (v * ratio for v in self.box)
        return (x0, y0, x1, y1), (self.points * ratio).astype(np.float32)


@dataclass
class _Layers:
    rgb: Array
    cover: Array
    depth: Array
    classes: NDArray[np.uint8]

    def put(self, window: tuple[slice, slice], rgb: Array, cover: Array, depth: Array, classes: NDArray[np.uint8]) -> None:
        """Blend a window over what is there, wherever it is nearer."""
        here = self.depth[window]
        visible = cover * (depth >= here - 1e-3)
        below = self.cover[window] * (1 - visible)
        total = below + visible
        share = (visible / np.maximum(total, 1e-6))[..., None]
        self.rgb[window] += share * (rgb - self.rgb[window])
        self.cover[window] = total
        solid = visible > 0.5
        self.depth[window] = np.where(solid, depth, here)
        self.classes[window] = np.where(solid, classes, self.classes[window])


def render_person(who: Identity, style: Hairstyle, scene: Scene, camera: Camera, size: int, seed: int) -> Person:
    """Render head and body into a `size` x `size` frame."""
    layers = _Layers(
        np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.float32),
        np.full((size, size), -np.inf, np.float32), np.zeros((size, size), np.uint8),
    )  # fmt: skip
    head_cover = np.zeros((size, size), np.float32)
    window = _window(camera, size, -1.35, 1.35, -1.45, 1.35)
    _body(layers, who, scene, camera, size, seed)
    _neck_shadow(layers, camera, size)
    face_pixels = _head(layers, head_cover, window, who, style, scene, camera, seed)
    for side in (-1, 1):
        _ear(layers, who, scene, camera, side)
    box, points = _face_truth(who, camera, face_pixels)
    return Person(layers.rgb, layers.cover, layers.depth, layers.classes, head_cover, box, points)


def _window(camera: Camera, size: int, left: float, right: float, bottom: float, top: float) -> tuple[slice, slice]:
    u, v = camera.centre
    rows = slice(max(0, floor(v - top * camera.scale)), min(size, ceil(v - bottom * camera.scale)))
    columns = slice(max(0, floor(u + left * camera.scale)), min(size, ceil(u + right * camera.scale)))
    return rows, columns


def _light(normal: Array, scene: Scene, camera: Camera, wrap: float) -> tuple[Array, Array]:
    """Diffuse light (n,) with soft terminator and the facing ratio (n,)."""
    light = light_in_person(scene, camera)
    facing = np.clip(normal @ camera.rotation[2], 0, 1)
    diffuse = np.clip((normal @ light + wrap) / (1 + wrap), 0, 1)
    sky = 0.5 + 0.5 * normal[:, 1]
    return scene.ambient * (0.75 + 0.35 * sky) + scene.strength * diffuse, facing


def _skin_colour(albedo: Array, gloss: Array, normal: Array, cavity: Array, scene: Scene, camera: Camera) -> Array:
    energy, facing = _light(normal, scene, camera, 0.35)
    half = light_in_person(scene, camera) + camera.rotation[2]
    half /= np.linalg.norm(half)
    shine = np.clip(normal @ half, 0, 1) ** 28
    # light that travels under the skin comes out redder where it is dim
    warm = np.stack([energy**0.86, energy, energy**1.07], axis=1)
    rim = (1 - 0.18 * (1 - facing) ** 2) * (0.35 + 0.65 * cavity)
    rgb = albedo * warm * rim[:, None]
    return rgb + (shine * (0.10 + 0.55 * gloss) * scene.strength)[:, None] * np.array([255, 248, 240], np.float32)


def _head(
    layers: _Layers,
    head_cover: Array,
    window: tuple[slice, slice],
    who: Identity,
    style: Hairstyle,
    scene: Scene,
    camera: Camera,
    seed: int,
) -> tuple[Array, Array]:
    """Draw the bare head with cropped hair on the scalp; returns the face's pixel coordinates and their surface points."""
    surface = head_surface(who)
    rows, columns = window
    hits = surface.trace(camera, rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
    cover = np.clip(1.2 - hits.gap * camera.scale, 0, 1)
    index = np.flatnonzero(cover > 0)
    points = hits.point.reshape(-1, 3)[index]
    normal, cavity = surface.shading_at(points)
    albedo, gloss, classes = paint_face(who, _paint_scale(camera.scale)).at(points)
    margin = scalp_margin(who, points)
    rng = np.random.default_rng([0x5CA1, seed])
    grain = rng.normal(0, 1, 4096).astype(np.float32)[(index * 2654435761 % 4096).astype(np.int64)]
    crop = np.clip((margin + 0.7 * grain) / 3.5, 0, 1) * 0.88
    hair = np.asarray(style.rgb, np.float32) * (0.62 + 0.10 * grain)[:, None]
    albedo = albedo + crop[:, None] * (hair - albedo)
    rgb = np.zeros((cover.size, 3), np.float32)
    rgb[index] = _skin_colour(albedo, gloss * (1 - crop), normal, cavity, scene, camera)
    ids = np.zeros(cover.size, np.uint8)
    ids[index] = np.where(margin > 1.0, 13, classes)
    layers.put(window, rgb.reshape(*cover.shape, 3), cover, hits.depth, ids.reshape(cover.shape))
    head_cover[window] = cover
    turn = np.abs(np.arctan2(points[:, 0], points[:, 2]))
    face = (turn < np.radians(72)) & (points[:, 1] < 0.5) & (points[:, 1] > -1.12 * who.face_length)
    v, u = np.divmod(index[face], cover.shape[1])
    return np.stack([u + columns.start, v + rows.start], axis=1).astype(np.float32), points[face]


def _paint_scale(scale: float) -> float:
    """Texture density near the frame's own, in steps so that the few sizes in use share their paintings."""
    return float(max(48, 16 * round(scale * 1.15 / 16)))


def _ear(layers: _Layers, who: Identity, scene: Scene, camera: Camera, side: int) -> None:
    at = camera.project(ear_centre(who, side))
    near = replace(camera, centre=(float(at[0]), float(at[1])))
    window = _window(near, len(layers.cover), -0.4, 0.4, -0.4, 0.4)
    rows, columns = window
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    hits, normal, own = ear_hits(who, camera, side, rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start)
    cover = (hits.gap == 0).astype(np.float32)
    index = np.flatnonzero(cover > 0)
    if index.size == 0:
        return
    u, v = own.reshape(-1, 2)[index].T
    inner = np.exp(-(((u - 0.02) / 0.45) ** 2) - (((v * side) / 0.42) ** 2))
    ridge = np.exp(-(((np.sqrt(u * u + v * v) - 0.66) / 0.12) ** 2))
    skin = np.asarray(who.skin, np.float32) * np.array([1.0, 0.92, 0.89], np.float32)
    albedo = skin * (1 - 0.30 * inner - 0.16 * ridge)[:, None]
    rgb = np.zeros((cover.size, 3), np.float32)
    flat = np.zeros(index.size, np.float32)
    rgb[index] = _skin_colour(albedo, flat, normal.reshape(-1, 3)[index], flat + 0.95, scene, camera)
    ids = np.full(cover.shape, 8 if side < 0 else 9, np.uint8)
    layers.put(window, rgb.reshape(*cover.shape, 3), cover, hits.depth, ids)


def _body(layers: _Layers, who: Identity, scene: Scene, camera: Camera, size: int, seed: int) -> None:
    """Neck and clothes, traced at a half or a third of the size and enlarged."""
    surface = body_surface(who, scene.garment)
    step = 2 if size < 900 else 3
    top = max(0, floor(camera.centre[1] + 0.3 * camera.scale))
    if size - top < 8:
        return
    small = (-(-(size - top) // step), -(-size // step))
    hits = surface.trace(camera, top, 0, *small, step=step)
    cover = np.clip(1.4 - hits.gap * camera.scale / step, 0, 1)
    index = np.flatnonzero(cover > 0)
    points = hits.point.reshape(-1, 3)[index]
    rgb, cloth = _body_colour(points, surface, who, scene, camera, seed)
    frame = np.zeros((cover.size, 5), np.float32)
    frame[index, :3], frame[index, 3], frame[index, 4] = rgb, cloth, 1
    frame = _spread(frame.reshape(*cover.shape, 5))
    large, soft, depth = (
        cv2.resize(a, (small[1] * step, small[0] * step), interpolation=cv2.INTER_LINEAR)[: size - top, :size]
        for a in (frame, cover, hits.depth)
    )
    ids = np.where(large[..., 3] > 0.5, np.uint8(18), np.uint8(17))
    edge = np.clip((soft - 0.5) * step + 0.5, 0, 1)
    layers.put((slice(top, size), slice(0, size)), large[..., :3], edge, depth, ids)


def _spread(frame: Array) -> Array:
    """Carry colours one pixel over the silhouette so that enlarging does not darken the edge."""
    weight = frame[..., 4:]
    blurred = cv2.blur(frame, (5, 5))
    return np.where(weight > 0, frame, blurred / np.maximum(blurred[..., 4:], 1e-3)).astype(np.float32)


def _body_colour(points: Array, surface: BodySurface, who: Identity, scene: Scene, camera: Camera, seed: int) -> tuple[Array, Array]:
    normal = surface.normals(points).astype(np.float32)
    below = garment_cover(points, scene)
    cloth = np.clip(below * camera.scale * 0.5 + 0.5, 0, 1).astype(np.float32)
    flat = np.zeros(len(points), np.float32)
    skin = np.asarray(who.skin, np.float32) * np.array([0.97, 0.93, 0.91], np.float32)
    bone = np.exp(-(((points[:, 1] + 1.70 + 0.12 * np.abs(points[:, 0])) / 0.035) ** 2)) * (points[:, 2] > 0)
    neck = _skin_colour(np.repeat(skin[None], len(points), 0) * (1 - 0.10 * bone)[:, None], flat, normal, flat + 0.95, scene, camera)
    energy, _ = _light(normal, scene, camera, 0.25)
    seam = 1 - 0.28 * np.exp(-((below / 0.045) ** 2))
    folds = cloth_folds(points, surface.cape, float(seed % 628) / 100) * seam
    fabric = np.repeat(np.asarray(scene.garment_rgb, np.float32)[None], len(points), 0)
    if surface.cape:
        strip = np.clip((0.16 - below) * 30, 0, 1)[:, None]
        fabric = fabric + strip * (np.array([228, 228, 226], np.float32) - fabric)
    worn = fabric * (energy * folds)[:, None]
    return neck + cloth[:, None] * (worn - neck), cloth


def _neck_shadow(layers: _Layers, camera: Camera, size: int) -> None:
    """The head keeps the light from the neck: a soft blob under the chin."""
    u, v = camera.centre
    height, width = layers.cover.shape
    y = (np.arange(height, dtype=np.float32) - v) / camera.scale
    x = (np.arange(width, dtype=np.float32) - u) / camera.scale
    shade = np.clip((1.78 - y) / 0.65, 0, 1)[:, None] * np.exp(-((x / 0.85) ** 4))[None, :]
    rows = slice(max(0, int(v)), min(size, int(v + 1.9 * camera.scale)))
    layers.rgb[rows] *= (1 - 0.42 * shade[rows])[..., None]


def _face_truth(who: Identity, camera: Camera, face: tuple[Array, Array]) -> tuple[tuple[float, float, float, float] | None, Array | None]:
    pixels, _ = face
    turned = abs((camera.yaw + 180) % 360 - 180) > _FACE_TURN
    if turned or len(pixels) < 0.12 * camera.scale**2:
        return None, None
    surface = head_surface(who)
    mouth_y = -0.67 * who.face_length + who.mouth_height
    half = 0.255 * who.mouth_width
    flat = [
        (*eye_centre(who, -1), 1.0),
        (*eye_centre(who, 1), 1.0),
        (0.0, -0.36 * who.nose_length, 1.0),
        (-half, mouth_y, 1.0),
        (half, mouth_y, 1.0),
    ]
    points = np.array([_onto(surface, np.array(p, np.float32)) for p in flat], np.float32)
    landmarks = camera.project(points)[:, :2]
    for a, b in ((0, 1), (3, 4)):
        if landmarks[a, 0] > landmarks[b, 0]:
            landmarks[[a, b]] = landmarks[[b, a]]
    low, high = np.minimum(pixels.min(0), landmarks.min(0)), np.maximum(pixels.max(0) + 1, landmarks.max(0))
    return (float(low[0]), float(low[1]), float(high[0]), float(high[1])), landmarks.astype(np.float32)


def _onto(surface: object, point: Array) -> Array:
    """Move a point of the front plane along z until it lies on the head."""
    for _ in range(12):
        gap = surface.distance(point[None])[0]  # type: ignore[attr-defined]
        point = point + np.array([0, 0, -gap], np.float32)
    return point
