"""Rendered photos to train the miniature parts from: planned by number, rendered once, kept in a temporary folder.

Identity seeds of this module: TRAIN_HEADS and HELD_OUT_HEADS. The miniature sets of ``khairstyle_set`` draw theirs from
100,000 on and below 1,000,000, so no head of the demo or the bench set has been seen here.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.demo import portraits, traits
from backend.imaging import crop
from backend.training import keyed

logger = logging.getLogger(__name__)

Split = Literal["train", "held_out"]
TRAIN_HEADS = range(1_000_000, 1_900_000)
HELD_OUT_HEADS = range(1_900_000, 2_000_000)
VIEWS_PER_HEAD = 4
FRAME = 320
_SHARD = 32
_COLUMNS = ("image", "parsing", "box", "landmarks")
_LAST = f"{_COLUMNS[-1]}.npy"  # written last: a shard that has it is whole
_YAW_REACH = (15.0, 50.0, 100.0, 180.0)
"""Largest yaw of a head's four views: nearly frontal, half side, side, anything."""


@dataclass(frozen=True)
class View:
    """What one photo shows; everything follows from (split, number)."""

    identity: traits.Identity
    hairstyle: traits.Hairstyle
    scene: traits.Scene
    yaw: float
    seed: int


@dataclass(frozen=True)
class Photo:
    """A rendered frame and its truth: image (S, S, 3) uint8 RGB, parsing (S, S) uint8, box (4,) and landmarks (5, 2) or None."""

    view: View
    image: NDArray[np.uint8]
    parsing: NDArray[np.uint8]
    box: NDArray[np.float32] | None
    landmarks: NDArray[np.float32] | None

    def square(self) -> crop.Square:
        """The head square of the product."""
        return crop.head_square(
            crop.mask_box(self.hair()), None if self.box is None else tuple(map(float, self.box)), self.image.shape[1::-1]
        )  # type: ignore[arg-type]

    def hair(self) -> NDArray[np.uint8]:
        """The hair mask, (S, S) uint8 0/255."""
        return hair_mask(self.parsing)

    def box_in(self, square: crop.Square, side: int) -> crop.Box | None:
        """The face box in pixels of a square's crop of ``side`` px; None where there is no face."""
        return None if self.box is None else square.scaled_box(tuple(map(float, self.box)), side)  # type: ignore[arg-type]

    def with_blurred_face(self) -> Photo:
        """The same photo with its face hidden as in the released set; itself where there is no face."""
        if self.box is None:
            return self
        return replace(self, image=portraits.blur_face(self.image, face_ring(self.box)))


def hair_mask(parsing: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The hair of a class map, uint8 0/255 of its shape."""
    return np.where(parsing == portraits.HAIR, np.uint8(255), np.uint8(0))


def view(split: Split, number: int) -> View:
    """Photo ``number`` of a split: four views of each head, two hairstyles, each view in a light of its own."""
    head, k = divmod(number, VIEWS_PER_HEAD)
    heads = TRAIN_HEADS if split == "train" else HELD_OUT_HEADS
    rng = keyed.numpy_generator(heads[head], "view", k)
    style_seed = heads[head] * 2 + k // 2
    return View(
        identity=portraits.sample_identity(heads[head]),
        hairstyle=portraits.sample_hairstyle(keyed.numpy_generator(style_seed, "hairstyle")),
        scene=portraits.sample_scene(rng),
        yaw=float(rng.uniform(-_YAW_REACH[k], _YAW_REACH[k])),
        seed=style_seed,
    )


class Photos:
    """``count`` photos of a split, rendered on first use in ``workers`` processes and then read from ``cache``."""

    def __init__(self, cache: Path, split: Split, count: int, *, workers: int = 1, frame: int = FRAME) -> None:
        self.count = count
        self._split: Split = split
        self._folders = [cache / f"{split}_{frame}_{renderer_version()}_{first:06d}" for first in range(0, count, _SHARD)]
        jobs = [(str(folder), split, k * _SHARD, frame) for k, folder in enumerate(self._folders) if not (folder / _LAST).is_file()]
        if jobs:
            logger.info("rendering %d photos of %s in %d processes", len(jobs) * _SHARD, split, workers)
            # A fork of a process in which torch already has threads can hang.
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
                for done, _ in enumerate(pool.map(_render_shard, jobs), 1):
                    if done % 8 == 0:
                        logger.info("rendered %d of %d photos", done * _SHARD, len(jobs) * _SHARD)
        self._shards: dict[int, dict[str, NDArray[np.uint8]]] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Photo:
        shard = self._shard(number // _SHARD)
        k = number % _SHARD
        faced = bool(np.isfinite(shard["box"][k, 0]))
        return Photo(
            view=_cached_view(self._split, number),
            image=shard["image"][k],
            parsing=shard["parsing"][k],
            box=shard["box"][k] if faced else None,
            landmarks=shard["landmarks"][k] if faced else None,
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_shards": {}}

    def _shard(self, number: int) -> dict[str, NDArray[np.uint8]]:
        if number not in self._shards:
            files = {name: self._folders[number] / f"{name}.npy" for name in _COLUMNS}
            # Mapped, not read: the processes that draw batches share one copy.
            self._shards[number] = {name: np.asarray(np.load(file, mmap_mode="r", allow_pickle=False)) for name, file in files.items()}
        return self._shards[number]


_cached_view = functools.lru_cache(maxsize=None)(view)


@functools.lru_cache(maxsize=1)
def renderer_version() -> str:
    """Changes with the source of the renderer, so that a cache of an older one is not used."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for name in ("portraits", "person", "head", "face", "body", "hair", "strands", "scene", "camera", "traits"):
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()[:10]


def _one_thread() -> None:
    cv2.setNumThreads(1)
    os.nice(5)


def _render_shard(job: tuple[str, Split, int, int]) -> None:
    folder, split, first, frame = job
    rows: dict[str, list[NDArray[np.generic]]] = {"image": [], "parsing": [], "box": [], "landmarks": []}
    for number in range(first, first + _SHARD):
        what = view(split, number)
        drawn = portraits.render(what.identity, what.hairstyle, what.scene, what.yaw, frame, what.seed)
        rows["image"].append(drawn.image)
        rows["parsing"].append(drawn.parsing)
        rows["box"].append(np.full(4, np.nan, np.float32) if drawn.face_box is None else np.array(drawn.face_box, np.float32))
        rows["landmarks"].append(np.full((5, 2), np.nan, np.float32) if drawn.landmarks is None else drawn.landmarks.astype(np.float32))
    for name in _COLUMNS:
        with artifacts.replacing(Path(folder) / f"{name}.npy") as temporary, temporary.open("wb") as handle:
            np.save(handle, np.stack(rows[name]))


# ---- cuts and changes ----------------------------------------------------------


def jittered(square: crop.Square, rng: np.random.Generator, scale: tuple[float, float], shift: float) -> crop.Square:
    """The square at a random size (factor within ``scale``) and place (moved by up to ``shift`` sides)."""
    side = square.side * float(rng.uniform(*scale))
    centre = np.array([square.x0, square.y0]) + square.side / 2 + rng.uniform(-shift, shift, 2) * square.side
    return crop.Square(round(float(centre[0]) - side / 2), round(float(centre[1]) - side / 2), max(8, round(side)))


def head_crop(photo: Photo, square: crop.Square, side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A square of the photo at ``side`` pixels: image (side, side, 3) and parsing (side, side); background beyond the frame."""
    image = crop.resize(crop.crop_square(photo.image, square), side)
    parsing = cv2.resize(crop.crop_square(photo.parsing, square), (side, side), interpolation=cv2.INTER_NEAREST)
    return image, parsing.astype(np.uint8, copy=False)


def face_ring(box: NDArray[np.float32], points: int = 24) -> NDArray[np.float32]:
    """A ring (points, 2) over brows to chin inside a face box, as ``polygon2`` of the released photos."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return (centre + 0.95 * half * np.stack([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)


def relight(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random exposure, contrast, colour cast and, at times, softness; shapes and dtypes stay."""
    gain = rng.uniform(0.75, 1.25) * rng.uniform(0.94, 1.06, 3)
    out = np.clip((image.astype(np.float32) - 127) * gain + 127 + rng.uniform(-20, 20), 0, 255)
    if rng.random() < 0.3:
        out = cv2.GaussianBlur(out, (0, 0), float(rng.uniform(0.4, 1.2)))
    return (out + rng.normal(0, rng.uniform(0, 4), image.shape)).clip(0, 255).astype(np.uint8)
