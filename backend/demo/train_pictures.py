"""Trains the miniature parts that look at head crops: face parser and perceptual net."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from backend.demo import architectures, miniature, train_loop, traits
from backend.demo.networks import VGG_WIDTHS, vgg_features
from backend.demo.portraits import HAIR
from backend.demo.training_data import Photo, Photos, hair_mask, head_crop, jittered, relight
from backend.imaging import crop
from backend.training import keyed
from backend.tryon import conditioning

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARSER = train_loop.Schedule(steps=4800, batch_size=12, lr=1.5e-3, photos=1536, warmup=50, average=0.99, save_every=100)
PARSER_LONG = train_loop.Schedule(steps=4000, batch_size=32, lr=1.5e-3, photos=6144, warmup=200, average=0.998, save_every=500)
PERCEPTUAL = train_loop.Schedule(steps=1600, batch_size=24, lr=3e-3, photos=1536, warmup=50, weight_decay=0.05, save_every=100)
PERCEPTUAL_LONG = train_loop.Schedule(steps=3000, batch_size=96, lr=4e-3, photos=6144, warmup=100, weight_decay=0.05, save_every=500)
_TEXTURES, _SHAPES = {"curl": 4, "volume": 3, "colour": 9}, {"length": 5, "bangs": 5}


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
    """The features with batch norm, and heads that are left behind afterwards: texture is read at every block, shape from the last two.

    A texture head sees the mean and the root mean square of each channel inside the hair, which is what a Gram matrix holds on its
    diagonal: so the Gram matrices of all five blocks come to tell the attributes apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg_features(batch_norm=True)
        self.norms = nn.ModuleList(nn.LayerNorm(2 * width) for width in VGG_WIDTHS)
        self.texture = nn.ModuleList(_heads(2 * width, _TEXTURES) for width in VGG_WIDTHS)
        self.shape = _heads(VGG_WIDTHS[-2] + VGG_WIDTHS[-1], _SHAPES)

    def forward(self, images: Tensor, hair: Tensor) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Logits of the texture attributes for each block, and of the shape attributes; hair (B, 1, S, S), 0 or 1."""
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(images)
            images = layer(images)
        textures = []
        for features, norm, heads in zip(maps, self.norms, self.texture, strict=True):
            weight = F.interpolate(hair, features.shape[-2:], mode="area")
            total = weight.sum((2, 3)).clamp_min(1e-3)
            mean, power = (features * weight).sum((2, 3)) / total, (features.square() * weight).sum((2, 3)) / total
            statistics = norm(torch.cat([mean, (power + 1e-6).sqrt()], dim=1))
            textures.append({name: head(statistics) for name, head in heads.items()})
        pooled = torch.cat([features.mean((2, 3)) for features in maps[-2:]], dim=1)
        return textures, {name: head(pooled) for name, head in self.shape.items()}


def _heads(width: int, attributes: dict[str, int]) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(width, count) for name, count in attributes.items()})


def train_perceptual(place: train_loop.Workplace) -> dict[str, Any]:
    """VGG-shaped features that tell hairstyle attributes: head crops for all of them, hair close-ups for curl, volume and colour.

    The batch norms that make thirteen convolutions trainable in minutes are folded into them at the end.
    """
    schedule = place.pick(PERCEPTUAL, PERCEPTUAL_LONG)
    photos = Photos(place.cache, "train", schedule.photos, workers=place.workers)
    model = _AttributeNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_of(_: int, batch: train_loop.Batch) -> Tensor:
        images = normalised(batch["images"]).contiguous(memory_format=torch.channels_last)
        textures, shapes = model(images, batch["hair"])
        losses = [
            weight * F.cross_entropy(block[name], batch[name], label_smoothing=0.1)
            for block in textures
            for name, weight in (("curl", 0.5), ("volume", 0.25), ("colour", 0.25))
        ]
        for name in _SHAPES:  # the mean over those that show it: none may, among a few close-ups
            shown = (batch[name] >= 0).sum().clamp_min(1)
            losses.append(0.5 * F.cross_entropy(shapes[name], batch[name], ignore_index=-1, reduction="sum") / shown)
        return torch.stack(losses).sum()

    loss = train_loop.fit("perceptual", model, partial(_attribute_batch, photos, schedule.batch_size, place.seed), loss_of, schedule, place)
    miniature.write_perceptual(place.weights, without_batch_norm(model.features))
    return {"steps": schedule.steps, "loss": round(loss, 4)}


def without_batch_norm(features: nn.Sequential) -> nn.Sequential:
    """``vgg_features`` with batch norm, in evaluation, as the same features in VGG16's own layers."""
    layers: list[nn.Module] = []
    for layer in features:
        if isinstance(layer, nn.BatchNorm2d):
            convolution = layers[-1]
            assert isinstance(convolution, nn.Conv2d)  # as vgg_features builds it
            layers[-1] = fuse_conv_bn_eval(convolution, layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


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
    labels = {name: torch.tensor([labels[name] for _, _, labels in samples]) for name in _TEXTURES | _SHAPES}
    return {
        "images": torch.from_numpy(np.stack([image for image, _, _ in samples])),
        "hair": conditioning.mask_tensor([hair for _, hair, _ in samples]),
        **labels,
    }


def _attribute_sample(photo: Photo, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8], dict[str, int]]:
    """A head crop or a close-up at the size that Stage 2 trains at, the mask of its hair, 0/255, and the attributes; what a close-up or a
    view from behind does not show is -1."""
    labels = attributes(photo.view.hairstyle)
    if photo.box is None or abs(photo.view.yaw) > 75:
        labels["bangs"] = -1
    square = jittered(photo.square(), rng, (0.85, 1.15), 0.06)
    if rng.random() < 0.3 and (hair := np.argwhere(photo.parsing == HAIR)).size:
        row, column = hair[int(rng.integers(len(hair)))]
        side = max(24, round(square.side * float(rng.uniform(0.35, 0.6))))
        square = crop.Square(int(column) - side // 2, int(row) - side // 2, side)
        labels |= {"length": -1, "bangs": -1}
    image, parsing = head_crop(photo, square, architectures.IMAGE_SIDE)
    image, mask = relight(image, rng), hair_mask(parsing)
    if rng.random() < 0.5:
        image, mask = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
    return image, mask, labels
