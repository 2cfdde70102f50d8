"""Rendered people: one call turns an identity, a hairstyle and a scene into a photo with its exact parsing and landmarks.

Text-book graphics with numpy and OpenCV only: a traced head and body, a painted face, and hair drawn strand by strand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from .camera import Array, Camera
from .hair import grow
from .person import Person, render_person
from .scene import backdrop, finish
from .strands import Pieces, close_gaps, cut, draw_layer
from .traits import HAIR_COLOURS, Hairstyle, Identity, Scene, sample_hairstyle, sample_identity, sample_scene

__all__ = [
    "CELEBA_CLASSES", "HAIR_COLOURS", "Hairstyle", "Identity", "Portrait", "Scene", "blur_face", "contact_sheet", "mask_rings",
    "render", "sample_hairstyle", "sample_identity", "sample_scene",
]  # fmt: skip

CELEBA_CLASSES: dict[int, str] = dict(enumerate((
    "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "mouth", "u_lip", "l_lip",
    "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
)))  # fmt: skip
"""CelebAMask-HQ's class ids; here `l_` is the image's left in a frontal view."""
HAIR = 13
_HEAD_HEIGHT = 2.3
_PITCH = {"mid": 3.0, "high": 24.0}


@dataclass(frozen=True)
class Portrait:
    """A rendered photo and its truth.

    image (S, S, 3) uint8 RGB; parsing (S, S) uint8 ids of CELEBA_CLASSES; face_box (x0, y0, x1, y1) pixels, None when the face
    is turned away; landmarks (5, 2) float32 pixels: eye, eye, nose, mouth corner, mouth corner, each pair image-left first.
    """

    image: NDArray[np.uint8]
    parsing: NDArray[np.uint8]
    face_box: tuple[float, float, float, float] | None
    landmarks: Array | None
    yaw: float


def render(identity: Identity, hairstyle: Hairstyle, scene: Scene, yaw: float, size: int, seed: int) -> Portrait:
    """Render one photo. Equal arguments give equal bytes.

    yaw: degrees; 0 frontal, +90 the face looks to the image's right, 180 the back. size: frame side in pixels, 128..1024.
    seed: places the strands; keep it for all views of one head. Raises ValueError for a size out of range.
    """
    if not 128 <= size <= 1024:
        raise ValueError(f"size is {size}; a portrait is 128 to 1024 px wide")
    work = round(size * (2.0 if size <= 256 else 1.25 if size <= 640 else 1.0))
    scale = scene.head * work / _HEAD_HEIGHT
    strands = grow(identity, hairstyle, scene.garment, seed, _detail(size))
    camera = Camera(yaw, _PITCH[scene.camera], scale, ((0.5 + scene.shift) * work, 0.0))
    projected = camera.project(strands.points)
    rise = 0.016 * work - float(projected[..., 1].min())
    projected[..., 1] += rise
    camera = replace(camera, centre=(camera.centre[0], rise))
    person = render_person(identity, hairstyle, scene, camera, work, seed)
    run = _run_length(hairstyle)
    pieces = cut(strands, projected, hairstyle, scene, camera, person.depth, run)
    image, hair = _compose(person, pieces, hairstyle, scene, camera, work, seed)
    parsing = np.where(hair, np.uint8(HAIR), person.classes)
    if work != size:
        parsing = cv2.resize(parsing, (size, size), interpolation=cv2.INTER_NEAREST)
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    box, landmarks = person.face(size / work)
    noise = np.random.default_rng([0x2015E, seed, round((yaw % 360) * 8)])
    return Portrait(finish(image, scene, noise), parsing, box, landmarks, yaw)


def _detail(size: int) -> float:
    """Strand density: full from 512 px, more above, less below."""
    return float(np.clip(size / 512, 0.55, 1.6))


def _run_length(style: Hairstyle) -> int:
    """Segments that share one colour: short enough to follow the highlights of a coil."""
    return 2 if style.curl >= 2 else 3


def _compose(
    person: Person, pieces: Pieces, style: Hairstyle, scene: Scene, camera: Camera, size: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Backdrop, hair behind, the person, hair before; returns the image and the hair mask."""
    image = backdrop(scene, size, seed)
    behind = draw_layer(image, pieces.where(~pieces.front), camera.scale, style.strand_width)
    front = pieces.where(pieces.front)
    lit = person.rgb * _hair_shadow(front, camera, size)[..., None]
    blended = image + person.cover[..., None] * (lit - image)
    image = np.clip(blended, 0, 255).astype(np.uint8)
    before = draw_layer(image, front, camera.scale, style.strand_width)
    hair = (before > 0.5) | ((behind > 0.5) & (person.cover < 0.5)) | (person.classes == HAIR)
    return image, _smooth(hair, camera.scale)


def _hair_shadow(front: Pieces, camera: Camera, size: int) -> Array:
    """(H, W) factor below 1 where hair keeps the light from skin and clothes."""
    small = max(32, size // 4)
    mask = np.zeros((small, small), np.uint8)
    cv2.polylines(mask, list(front.pixels[::3]), False, 255, max(1, round(0.05 * camera.scale / 4)), cv2.LINE_8, 6)
    drop = round(0.05 * camera.scale / 4)
    lowered = np.zeros_like(mask)
    lowered[drop:] = mask[: small - drop]
    soft = cv2.GaussianBlur(lowered, (0, 0), max(0.8, 0.07 * camera.scale / 4)).astype(np.float32) / 255
    return 1 - 0.42 * cv2.resize(soft, (size, size), interpolation=cv2.INTER_LINEAR)


def _smooth(mask: NDArray[np.bool_], scale: float) -> NDArray[np.bool_]:
    """Drop specks and gaps thinner than a lock, as an annotator's polygon does."""
    reach = max(1, round(0.025 * scale))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    return cv2.morphologyEx(close_gaps(mask.astype(np.uint8), reach), cv2.MORPH_OPEN, kernel) > 0


def blur_face(image: NDArray[np.uint8], ring: Array) -> NDArray[np.uint8]:
    """A copy of `image` (H, W, 3) with the inside of `ring` (n, 2) replaced by one smooth gradient of its own colours.

    This is how released K-Hairstyle hides faces inside `polygon2` (facts: khairstyle.md 1.1).
    """
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.round(np.asarray(ring)).astype(np.int32)], 255)
    x, y, w, h = cv2.boundingRect(mask)
    if w == 0:
        return image.copy()
    window = np.s_[y : y + h, x : x + w]
    weight = mask[window].astype(np.float32) / 255
    sigma = 0.22 * max(w, h)
    spread = [cv2.GaussianBlur(a, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT) for a in (image[window] * weight[..., None], weight)]
    gradient = spread[0] / np.maximum(spread[1], 1e-4)[..., None]
    out = image.copy()
    out[window] = np.where(mask[window][..., None] > 0, np.clip(np.rint(gradient), 0, 255).astype(np.uint8), image[window])
    return out


def mask_rings(mask: NDArray[np.bool_] | NDArray[np.uint8], epsilon: float) -> list[Array]:
    """Polygon rings (n, 2) float32 x, y of a mask, simplified to within `epsilon` pixels (Douglas-Peucker), largest first.

    A hole is joined to its outer ring by a bridge of no width, since the labels know outer rings only. Rings smaller than
    0.02 % of the frame are dropped.
    """
    area = 0.0002 * mask.size
    contours, tree = cv2.findContours((np.asarray(mask) > 0).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = []
    for k, contour in enumerate(contours):
        if tree[0][k][3] >= 0 or cv2.contourArea(contour) < area:
            continue
        ring = cv2.approxPolyDP(contour, epsilon, True)[:, 0].astype(np.float32)
        for j, inner in enumerate(contours):
            if tree[0][j][3] == k and cv2.contourArea(inner) >= area:
                hole = cv2.approxPolyDP(inner, epsilon, True)[:, 0].astype(np.float32)
                ring = _bridge(ring, hole) if len(hole) >= 3 else ring
        if len(ring) >= 3:
            rings.append((cv2.contourArea(contour), ring))
    return [ring for _, ring in sorted(rings, key=lambda pair: -pair[0])]


def _bridge(outer: Array, hole: Array) -> Array:
    """Join a hole to its outer ring between their closest vertices."""
    apart = ((outer[:, None] - hole[None]) ** 2).sum(axis=2)
    i, j = np.unravel_index(int(apart.argmin()), apart.shape)
    loop = np.concatenate([hole[j:], hole[: j + 1]])
    return np.concatenate([outer[: i + 1], loop, outer[i:]])


def contact_sheet(portraits: Sequence[Portrait | NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Tile equally sized portraits or RGB pictures, row by row, into one RGB picture."""
    pictures = [p.image if isinstance(p, Portrait) else p for p in portraits]
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for k, picture in enumerate(pictures):
        r, c = divmod(k, columns)
        sheet[r * height : (r + 1) * height, c * width : (c + 1) * width] = picture
    return sheet
