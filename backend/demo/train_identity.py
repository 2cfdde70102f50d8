"""Trains the miniature identity net: rendered people classified with an additive margin (CosFace, arXiv 1801.09414)."""

from __future__ import annotations

from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from uniface.face_utils import face_alignment

from backend.demo import miniature, train_loop
from backend.demo.networks import IDENTITY_SIDE, IDENTITY_WIDTH, IdentityNet
from backend.demo.training_data import VIEWS_PER_HEAD, Photo, Photos, relight
from backend.training import keyed

SCHEDULE = train_loop.Schedule(
    steps=6000, batch_size=64, lr=1.5e-3, photos=4096, warmup=100, weight_decay=5e-2, average=0.995, save_every=100
)
LONG = train_loop.Schedule(steps=3000, batch_size=128, lr=2e-3, photos=6144, warmup=200, weight_decay=5e-2, average=0.998, save_every=500)
MAX_YAW = 60.0
MARGIN, SCALE = 0.3, 24.0
WORN = 0.75  # share of faces that wear another's hair
LANDMARKS = (0.005, 0.045)  # bounds of a photo's landmark noise, a standard deviation in face sizes; the detector's is about 0.042


class _Classifier(nn.Module):
    """The net and a class vector for each training head, which are left behind afterwards."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.net = IdentityNet()
        self.classes = nn.Parameter(torch.randn(heads, IDENTITY_WIDTH) * 0.05)

    def forward(self, faces: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(faces.device.type, torch.bfloat16):
            embeddings = self.net(faces)
        cosine = F.normalize(embeddings.float()) @ F.normalize(self.classes).T
        return F.cross_entropy(SCALE * (cosine - MARGIN * F.one_hot(labels, cosine.shape[1])), labels)


def train(place: train_loop.Workplace) -> dict[str, Any]:
    """Trains the identity net, writes it to the workplace's ``weights`` folder and returns its card's entries."""
    schedule = place.pick(SCHEDULE, LONG)
    photos = Photos(place.cache, "train", schedule.photos, workers=place.workers)
    usable = [k for k in range(len(photos)) if photos[k].landmarks is not None and abs(photos[k].view.yaw) <= MAX_YAW]
    heads = len({photos[k].view.identity.seed for k in usable})
    model = _Classifier(len(photos) // VIEWS_PER_HEAD)

    def loss_of(_: int, batch: train_loop.Batch) -> Tensor:
        return model(batch["faces"], batch["labels"])  # type: ignore[no-any-return]

    loss = train_loop.fit("identity", model, partial(_batch, photos, usable, schedule.batch_size, place.seed), loss_of, schedule, place)
    miniature.write_identity(place.weights, model.net)
    return {"steps": schedule.steps, "loss": round(loss, 4), "heads": heads}


def _batch(photos: Photos, usable: list[int], size: int, seed: int, step: int) -> train_loop.Batch:
    rng = keyed.numpy_generator(seed, "identity", step)
    chosen = [usable[int(k)] for k in rng.integers(len(usable), size=size)]
    others, worn = rng.integers(len(usable), size=size), rng.random(size) < WORN
    wearing = [photos[usable[int(k)]] if wears else None for k, wears in zip(others, worn, strict=True)]
    faces = [network_input(aligned_face(photos[k], rng, hair)) for k, hair in zip(chosen, wearing, strict=True)]
    return {"faces": torch.from_numpy(np.stack(faces)), "labels": torch.tensor([k // VIEWS_PER_HEAD for k in chosen])}


def aligned_face(photo: Photo, rng: np.random.Generator, hair_of: Photo | None = None) -> NDArray[np.uint8]:
    """The face as the product aligns it, with detector-like noise on its landmarks and another light: (112, 112, 3) uint8 RGB.

    hair_of: whose hair it wears instead of its own. A try-on changes the hair, so hair must not be what a person is known by.
    """
    assert photo.landmarks is not None and photo.box is not None
    size = float(max(photo.box[2:] - photo.box[:2]))
    landmarks = photo.landmarks + rng.normal(0, rng.uniform(*LANDMARKS) * size, (5, 2)).astype(np.float32)
    face, own = _aligned(photo, landmarks)
    if hair_of is not None:
        assert hair_of.landmarks is not None
        other, worn = _aligned(hair_of, hair_of.landmarks)
        if own.any() and not own.all():
            face[own] = face[~own].mean(axis=0)
        face[worn] = other[worn]
    face = relight(face, rng)
    if rng.random() < 0.5:  # as small as a face is in a head crop of 128 px
        small = int(rng.integers(24, 80))
        face = cv2.resize(cv2.resize(face, (small, small), interpolation=cv2.INTER_AREA), (IDENTITY_SIDE, IDENTITY_SIDE))
    if rng.random() < 0.3:
        _cover(face, rng)
    return face if rng.random() < 0.5 else np.ascontiguousarray(face[:, ::-1])


def _aligned(photo: Photo, landmarks: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The aligned face and where in it hair lies."""
    side = (IDENTITY_SIDE, IDENTITY_SIDE)
    face, _ = face_alignment(photo.image, landmarks, image_size=side)
    hair, _ = face_alignment(photo.hair(), landmarks, image_size=side)
    return np.ascontiguousarray(face), hair > 127


def network_input(face: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(112, 112, 3) RGB to (3, 112, 112) BGR in -1..1, as uniface's AdaFace prepares it."""
    return np.ascontiguousarray((face[..., ::-1].astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)


def _cover(face: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """A flat bar over a side or the forehead, as hair covers it, so that no single place decides."""
    depth = int(rng.integers(10, 34))
    colour = rng.integers(0, 255, 3)
    side = int(rng.integers(3))
    window = (np.s_[:depth], np.s_[:, :depth], np.s_[:, -depth:])[side]
    face[window] = colour
