"""A first schooling for the miniature ResNet, in place of ImageNet: drawn strands, whose width, waves, direction and colour it measures.

From random weights Stage 1 spends most of its time on learning what a strand is; regression on endless drawings teaches that in minutes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from backend.demo import train_loop
from backend.demo.networks import RESNET_LAYERS
from backend.training import keyed
from backend.training.models.texture_encoder import new_encoder
from backend.training.texture_data import to_unit

SIDE = 64
SCHEDULE = train_loop.Schedule(steps=600, batch_size=32, lr=1e-3, photos=6000, warmup=50, save_every=100)
LONG = train_loop.Schedule(steps=2000, batch_size=64, lr=1e-3, photos=0, warmup=100, save_every=500)  # each step draws its own
TARGETS = 13
_OVERSAMPLED = 2


class Drawing(NamedTuple):
    """image (64, 64, 3) uint8; truth (13,) float32: log width, log gap, waves or not, log amplitude, log wavelength, log slope, direction
    as (cos, sin) of its double, spread, mean colour, contrast. What a straight strand does not have is 0."""

    image: NDArray[np.uint8]
    truth: NDArray[np.float32]


def draw(rng: np.random.Generator) -> Drawing:
    """Strands across a square: parallel or ruffled, straight or sinuous, in one colour with lighter and darker ones among them."""
    side = SIDE * _OVERSAMPLED
    width = _log_uniform(rng, 1.0, 7.0)
    gap = width * math.exp(rng.uniform(-0.7, 0.6))
    waved = bool(rng.integers(2))
    amplitude, wavelength = (_log_uniform(rng, 0.6, 7.0) if waved else 0.0), _log_uniform(rng, 5.0, 50.0)
    direction, spread = rng.uniform(0, math.pi), rng.uniform(0, 0.25)
    colour, contrast = rng.uniform(10, 220, 3), rng.uniform(0.1, 0.6)
    lighter = rng.uniform(0.5, 1.6, 3)
    image = np.empty((side, side, 3), np.float32)
    image[:] = colour * rng.uniform(0.3, 0.9)
    along = np.arange(-0.75 * side, 0.75 * side, 2 * _OVERSAMPLED)
    places = np.arange(-0.75 * side, 0.75 * side, gap * _OVERSAMPLED)
    for place in rng.permutation(places):
        turn = direction + rng.normal(0, spread)
        phase = rng.uniform(0, 2 * math.pi)
        wave = amplitude * _OVERSAMPLED * np.sin(2 * math.pi * along / (wavelength * _OVERSAMPLED * rng.uniform(0.85, 1.15)) + phase)
        across = place + rng.normal(0, 0.5 * gap * _OVERSAMPLED) + wave
        points = np.stack([along * math.cos(turn) - across * math.sin(turn), along * math.sin(turn) + across * math.cos(turn)], axis=1)
        first, last = sorted(int(v) for v in rng.integers(0, len(points), 2)) if rng.random() < 0.5 else (0, len(points))
        if last - first < 4:
            continue
        shade = np.clip(colour * (1 + contrast * rng.normal()) * (lighter if rng.random() < 0.15 else 1.0), 0, 255)
        line = (side / 2 + points[first:last]).round().astype(np.int32)
        cv2.polylines(image, [line], False, tuple(map(float, shade)), max(1, round(width * _OVERSAMPLED)), cv2.LINE_AA)
    if rng.random() < 0.3:
        image *= np.linspace(rng.uniform(0.6, 1), rng.uniform(0.6, 1), side, dtype=np.float32)[:, None, None]
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.3, 1.5)) * _OVERSAMPLED).astype(np.float32)
    small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA) + rng.normal(0, rng.uniform(0, 5), (SIDE, SIDE, 3))
    out = small.clip(0, 255).round().astype(np.uint8)
    waves = [math.log(amplitude) - 0.7, math.log(wavelength) - 2.7, math.log(amplitude / wavelength) + 1] if waved else [0.0, 0.0, 0.0]
    truth = [math.log(width), math.log(gap) - 1, float(waved), *waves, math.cos(2 * direction), math.sin(2 * direction), 4 * spread,
             *(out.reshape(-1, 3).mean(0) / 128 - 1), float(out.std()) / 40 - 1]  # fmt: skip
    return Drawing(out, np.array(truth, np.float32))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


class _Measurer(nn.Module):
    """The encoder's ResNet and a linear reading of it, which is left behind."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.encoder = new_encoder(RESNET_LAYERS, dropout=0.0, seed=keyed.key(seed, "strands"))
        self.reading = nn.Linear(2048, TARGETS)

    def forward(self, images: Tensor) -> Tensor:
        return self.reading(self.encoder.encode(images))  # type: ignore[no-any-return]


def school(place: train_loop.Workplace) -> dict[str, Tensor]:
    """Trains on drawings and returns the ResNet's tensors in torchvision's names."""
    schedule = place.pick(SCHEDULE, LONG)
    kept = [draw(keyed.numpy_generator(place.seed, "strands", number)) for number in range(schedule.photos)]
    model = _Measurer(place.seed).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, parameter in model.named_parameters():  # projection and class heads are not trained here
        parameter.requires_grad_(name.startswith(("encoder.backbone.", "reading.")))

    def loss_of(_: int, batch: train_loop.Batch) -> Tensor:
        found = model(to_unit(batch["images"]))
        return F.smooth_l1_loss(found, batch["truths"], reduction="none").mean(0).sum()

    train_loop.fit("strands", model, partial(_batch, kept, schedule.batch_size, place.seed), loss_of, schedule, place)
    return dict(model.encoder.backbone.state_dict())


def _batch(kept: list[Drawing], size: int, seed: int, step: int) -> train_loop.Batch:
    """Of the drawings that are kept, or where there are none, of new ones."""
    rng = keyed.numpy_generator(seed, "strand batch", step)
    chosen = [kept[int(rng.integers(len(kept)))] if kept else draw(rng) for _ in range(size)]
    images = torch.from_numpy(np.stack([one.image for one in chosen]))
    return {"images": images, "truths": torch.from_numpy(np.stack([one.truth for one in chosen]))}
