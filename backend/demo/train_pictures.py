"""Trains the miniature parts that look at head crops: face parser, perceptual net, autoencoder."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from backend.demo import architectures, miniature, train_loop, traits
from backend.demo.networks import VGG_WIDTHS, vgg_features
from backend.demo.portraits import HAIR
from backend.demo.training_data import Photo, Photos, hair_mask, head_crop, jittered, relight
from backend.imaging import bald, crop
from backend.training import keyed
from backend.training.models import losses
from backend.training.models.perceptual import load_perceptual
from backend.tryon import conditioning

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARSER = train_loop.Schedule(steps=4800, batch_size=12, lr=1.5e-3, photos=1536, warmup=50, average=0.99, save_every=100)
PARSER_LONG = train_loop.Schedule(steps=4000, batch_size=32, lr=1.5e-3, photos=6144, warmup=200, average=0.998, save_every=500)
PERCEPTUAL = train_loop.Schedule(steps=600, batch_size=32, lr=2e-3, photos=640, warmup=50, average=0.98, save_every=100)
PERCEPTUAL_LONG = train_loop.Schedule(steps=2000, batch_size=96, lr=2e-3, photos=6144, warmup=100, average=0.995, save_every=500)
VAE = train_loop.Schedule(steps=2000, batch_size=12, lr=2e-3, photos=1536, warmup=100, weight_decay=1e-3, average=0.99, save_every=100)
VAE_LONG = train_loop.Schedule(
    steps=5000, batch_size=64, lr=1.5e-3, photos=6144, warmup=200, weight_decay=1e-3, average=0.998, save_every=500
)
KL_WEIGHT = 1e-6
LPIPS_WEIGHT, GRAM_WEIGHT = 1.0, 0.15
SDXL_SCALING = 0.13025
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


# ---- autoencoder -----------------------------------------------------------------


def train_vae(place: train_loop.Workplace) -> dict[str, Any]:
    """AutoencoderKL on head crops, by pixels, LPIPS and the hair's Gram matrices. No adversary.

    Squared errors alone blur strands away, and with them the curl that a result should show; correlations of features inside the hair
    do not ask where a strand lies. The features are the perceptual net's, so it is trained before.
    """
    schedule = place.pick(VAE, VAE_LONG)
    photos = Photos(place.cache, "train", schedule.photos, workers=place.workers)
    with tempfile.TemporaryDirectory() as temporary:
        miniature.copy_part(miniature.by_name("perceptual"), place.weights, Path(temporary))
        network = load_perceptual(Path(temporary))[0].to(place.device)
    widths = architectures.VAE_WIDTHS if place.length == "short" else architectures.VAE_WIDTHS_LONG
    model = architectures.vae(widths).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_of(_: int, batch: train_loop.Batch) -> Tensor:
        images = batch["images"].contiguous(memory_format=torch.channels_last)
        hair = batch["hair"]
        posterior = model.encode(images).latent_dist
        decoded = model.decode(posterior.mean + posterior.std * torch.randn_like(posterior.std)).sample
        wanted = [features.detach() for features in network.features(images)]
        found = network.features(decoded)
        return (
            _reconstruction_loss(decoded, images, hair)
            + LPIPS_WEIGHT * network.distance(found, wanted).mean()
            + GRAM_WEIGHT * _gram_error(found, wanted, hair)
            + KL_WEIGHT * posterior.kl().mean()
        )

    loss = train_loop.fit(
        "vae", model, partial(_autoencoder_batch, photos, schedule.batch_size, place.seed, "vae"), loss_of, schedule, place
    )
    model.to(place.device)
    with torch.no_grad():
        batches = train_loop.drawn_ahead(partial(_autoencoder_batch, photos, 32, place.seed, "vae-scale"), range(16), place)
        latents = torch.cat([model.encode(batch["images"]).latent_dist.mean for batch in batches]).cpu()
    model.to("cpu")
    standardise(model, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    miniature.write_diffusion(place.weights, "vae", model)
    return {"steps": schedule.steps, "loss": round(loss, 4)}


@torch.no_grad()
def standardise(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Moves and scales the latent channels without changing what is decoded: mean 0 and standard deviation 1 / SDXL's factor.

    mean, std (4,): of the latents as they are. The change goes into the 1x1 convolutions on both sides of the latents, so that
    ``scaling_factor`` 0.13025 brings every channel to unit variance: the noise schedule takes that for granted.
    """
    factor = 1 / (SDXL_SCALING * std)
    before, after = model.quant_conv, model.post_quant_conv
    count = len(std)
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight /= factor.view(1, -1, 1, 1)
    before.weight[:count] *= factor.view(-1, 1, 1, 1)
    before.bias[:count] = (before.bias[:count] - mean) * factor
    before.bias[count:] += 2 * factor.log()  # the log variance of the posterior
    model.register_to_config(scaling_factor=SDXL_SCALING)


def _autoencoder_batch(photos: Photos, count: int, seed: int, purpose: str, step: int) -> train_loop.Batch:
    """images: head crops (count, 3, 128, 128) in -1..1, as they are, with a blurred face, or with the hair removed; hair: its mask
    (count, 1, 128, 128), 0 or 1."""
    rng = keyed.numpy_generator(seed, purpose, step)
    samples = [_autoencoder_sample(photos[int(rng.integers(len(photos)))], rng) for _ in range(count)]
    return {
        "images": conditioning.to_tensor([image for image, _ in samples]),
        "hair": conditioning.mask_tensor([mask for _, mask in samples]),
    }


def _autoencoder_sample(photo: Photo, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The picture and the mask of its hair, (128, 128) uint8 0/255."""
    square = jittered(photo.square(), rng, (0.8, 1.2), 0.08)
    if rng.random() < 0.5:
        photo = photo.with_blurred_face()
    image, parsing = head_crop(photo, square, architectures.IMAGE_SIDE)
    mask = hair_mask(parsing)
    if rng.random() < 0.15:
        image = bald.remove_hair(image, mask, photo.box_in(square, architectures.IMAGE_SIDE))
        mask = np.zeros_like(mask)
    gain = rng.uniform(0.85, 1.15) * rng.uniform(0.96, 1.04, 3)
    image = np.clip((image.astype(np.float32) - 127) * gain + 127 + rng.uniform(-12, 12), 0, 255).astype(np.uint8)
    return (image, mask) if rng.random() < 0.5 else (np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1]))


def _reconstruction_loss(decoded: Tensor, images: Tensor, hair: Tensor) -> Tensor:
    """Absolute and squared error of pixels and absolute error of differences between neighbours; hair counts three times."""
    weight = 1.0 + 2.0 * hair
    error = (decoded - images) * weight / weight.mean()
    across, down = error.diff(dim=3).abs().mean(), error.diff(dim=2).abs().mean()
    return error.abs().mean() + 2.0 * error.square().mean() + 0.25 * (across + down)


def _gram_error(found: list[Tensor], wanted: list[Tensor], hair: Tensor) -> Tensor:
    """Relative squared error of the hair's Gram matrices, mean over feature layers and pictures."""
    errors = []
    for ours, theirs in zip(found, wanted, strict=True):
        weight = F.interpolate(hair, ours.shape[-2:], mode="area")
        target = losses.gram_matrix(theirs, weight)
        errors.append(
            ((losses.gram_matrix(ours, weight) - target).square().sum((1, 2)) / target.square().sum((1, 2)).clamp_min(1e-6)).mean()
        )
    return torch.stack(errors).mean()
