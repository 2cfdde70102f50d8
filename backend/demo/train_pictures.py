"""Trains the miniature parts that look at head crops: face parser and perceptual net."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from backend.demo import architectures, miniature, train_loop, traits
from backend.demo.networks import VGG_WIDTHS, vgg_features
from backend.demo.portraits import HAIR
from backend.demo.training_data import Photo, Photos, head_crop, jittered, relight
from backend.imaging import crop
from backend.training import keyed

if TYPE_CHECKING:
    pass

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARSER = train_loop.Schedule(steps=4800, batch_size=12, lr=1.5e-3, photos=1536, warmup=50, average=0.99, save_every=100)
PARSER_LONG = train_loop.Schedule(steps=4000, batch_size=32, lr=1.5e-3, photos=6144, warmup=200, average=0.998, save_every=500)
PERCEPTUAL = train_loop.Schedule(steps=600, batch_size=32, lr=2e-3, photos=640, warmup=50, average=0.98, save_every=100)
PERCEPTUAL_LONG = train_loop.Schedule(steps=2000, batch_size=96, lr=2e-3, photos=6144, warmup=100, average=0.995, save_every=500)
_ATTRIBUTES = {"curl": 4, "volume": 3, "length": 5, "colour": 9, "bangs": 5}


def normalised(images: Tensor) -> Tensor:
    """(B, S, S, 3) uint8 RGB to (B, 3, S, S) in ImageNet's normalisation."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.permute(0, 3, 1, 2).float().div(255) - mean) / std


# ---- parser --------------------------------------------------------------------


def train_parser(place: train_loop.Workplace) -> dict[str, Any]:
    """SegFormer on head crops from tight to the whole frame, faces blurred or intact, by cross entropy."""
    schedule = place.pick(PARSER, PARSER_LONG)
    photos = Photos(place.cache, "train", schedule.photos, workers=place.workers)
    model = architectures.parser()

    def loss_of(_: int, batch: train_loop.Batch) -> Tensor:
        labels = batch["labels"].long()
        logits = model(pixel_values=normalised(batch["images"])).logits
        return F.cross_entropy(F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False), labels)

    loss = train_loop.fit("parser", model, partial(_parser_batch, photos, schedule.batch_size, place.seed), loss_of, schedule, place)
    miniature.write_parser(place.weights, model)
    return {"steps": schedule.steps, "loss": round(loss, 4)}


def _parser_batch(photos: Photos, size: int, seed: int, step: int) -> train_loop.Batch:
    rng = keyed.numpy_generator(seed, "parser", step)
    samples = [_parser_sample(photos[int(rng.integers(len(photos)))], rng) for _ in range(size)]
    odd = step % 2
    labels = np.stack([parsing[odd::2, odd::2] for _, parsing in samples])  # twice the logits' side is enough
    return {"images": torch.from_numpy(np.stack([image for image, _ in samples])), "labels": torch.from_numpy(labels)}


def _parser_sample(photo: Photo, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    square = jittered(photo.square(), rng, (0.7, 1.7), 0.12) if rng.random() < 0.85 else crop.Square(0, 0, photo.image.shape[0])
    small = int(rng.choice([64, 96, 128, architectures.PARSER_SIDE], p=[0.05, 0.15, 0.4, 0.4]))
    if photo.box is not None and rng.random() < 0.5:
        photo = photo.with_blurred_face()
    image, _ = head_crop(photo, square, small)
    _, parsing = head_crop(photo, square, architectures.PARSER_SIDE)
    image = crop.resize(relight(image, rng), architectures.PARSER_SIDE)
    if rng.random() < 0.5:
        image, parsing = image[:, ::-1], _MIRROR[parsing[:, ::-1]]
    return np.ascontiguousarray(image), np.ascontiguousarray(parsing)


def _mirror_table() -> NDArray[np.uint8]:
    """Class ids after mirroring: left and right change places."""
    names = list(architectures.FACE_PARTS)
    swapped = [
        name.replace("l_", "r_", 1)
        if name.startswith("l_") and name != "l_lip"
        else name.replace("r_", "l_", 1)
        if name.startswith("r_")
        else name
        for name in names
    ]
    return np.array([names.index(name) for name in swapped], np.uint8)


_MIRROR = _mirror_table()


# ---- perceptual net --------------------------------------------------------------


class _AttributeNet(nn.Module):
    """The features and one linear head for each attribute on their mean, which are left behind afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg_features()
        self.norm = nn.LayerNorm(VGG_WIDTHS[-1] + VGG_WIDTHS[-2])
        self.heads = nn.ModuleDict({name: nn.Linear(VGG_WIDTHS[-1] + VGG_WIDTHS[-2], count) for name, count in _ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        block4 = self.features[:23](images)
        pooled = torch.cat([block4.mean((2, 3)), self.features[23:](block4).mean((2, 3))], dim=1)
        return {name: head(self.norm(pooled)) for name, head in self.heads.items()}


def train_perceptual(place: train_loop.Workplace) -> dict[str, Any]:
    """VGG-shaped features that tell hairstyle attributes: head crops for all of them, hair close-ups for curl, volume and colour."""
    schedule = place.pick(PERCEPTUAL, PERCEPTUAL_LONG)
    photos = Photos(place.cache, "train", schedule.photos, workers=place.workers)
    model = _AttributeNet()

    def loss_of(_: int, batch: train_loop.Batch) -> Tensor:
        predicted = model(normalised(batch["images"]))
        return torch.stack([F.cross_entropy(predicted[name], batch[name], ignore_index=-1) for name in _ATTRIBUTES]).sum()

    loss = train_loop.fit("perceptual", model, partial(_attribute_batch, photos, schedule.batch_size, place.seed), loss_of, schedule, place)
    miniature.write_perceptual(place.weights, model.features)
    return {"steps": schedule.steps, "loss": round(loss, 4)}


def attributes(style: traits.Hairstyle) -> dict[str, int]:
    """Class numbers of a hairstyle, in the order of ``traits``."""
    return {
        "curl": style.curl,
        "volume": style.volume,
        "length": traits.LENGTHS.index(style.length),
        "colour": list(traits.HAIR_COLOURS).index(style.colour),
        "bangs": traits.BANGS.index(style.bangs),
    }


def _attribute_batch(photos: Photos, size: int, seed: int, step: int) -> train_loop.Batch:
    rng = keyed.numpy_generator(seed, "perceptual", step)
    samples = [_attribute_sample(photos[int(rng.integers(len(photos)))], rng) for _ in range(size)]
    labels = {name: torch.tensor([labels[name] for _, labels in samples]) for name in _ATTRIBUTES}
    return {"images": torch.from_numpy(np.stack([image for image, _ in samples])), **labels}


def _attribute_sample(photo: Photo, rng: np.random.Generator) -> tuple[NDArray[np.uint8], dict[str, int]]:
    """A head crop or a close-up, 96 px; what a close-up or a view from behind does not show is -1."""
    labels = attributes(photo.view.hairstyle)
    if photo.box is None or abs(photo.view.yaw) > 75:
        labels["bangs"] = -1
    square = jittered(photo.square(), rng, (0.85, 1.15), 0.06)
    if rng.random() < 0.35 and (hair := np.argwhere(photo.parsing == HAIR)).size:
        row, column = hair[int(rng.integers(len(hair)))]
        side = max(24, round(square.side * float(rng.uniform(0.25, 0.5))))
        square = crop.Square(int(column) - side // 2, int(row) - side // 2, side)
        labels |= {"length": -1, "bangs": -1}
    image, _ = head_crop(photo, square, 96)
    image = relight(image, rng)
    return (image if rng.random() < 0.5 else np.ascontiguousarray(image[:, ::-1])), labels
