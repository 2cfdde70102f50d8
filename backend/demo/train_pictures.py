"""Trains the miniature parts that look at head crops: face parser, perceptual net, autoencoder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from backend.demo import architectures, miniature, train_loop, traits
from backend.demo.networks import VGG_WIDTHS, vgg_features
from backend.demo.portraits import HAIR, blur_face
from backend.demo.training_data import Photo, Photos, face_ring, head_crop, jittered, relight
from backend.imaging import bald, crop
from backend.training import keyed
from backend.training.models import losses
from backend.training.models.perceptual import load_perceptual
from backend.tryon import conditioning
from backend.weights import folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PHOTOS = 640
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARSER_PHOTOS = 1536
PARSER = train_loop.Schedule(steps=1100, batch_size=12, lr=1.5e-3, warmup=50, average=0.99, save_every=100)
PERCEPTUAL = train_loop.Schedule(steps=600, batch_size=32, lr=2e-3, warmup=50, average=0.98, save_every=100)
VAE = train_loop.Schedule(steps=1100, batch_size=12, lr=2e-3, warmup=100, weight_decay=1e-3, average=0.99, save_every=100)
DECODER = train_loop.Schedule(steps=1200, batch_size=8, lr=1e-3, warmup=20, weight_decay=1e-3, average=0.98, save_every=50)
KL_WEIGHT = 1e-6
SDXL_SCALING = 0.13025
_ATTRIBUTES = {"curl": 4, "volume": 3, "length": 5, "colour": 9, "bangs": 5}


def normalised(images: list[NDArray[np.uint8]]) -> Tensor:
    """uint8 RGB pictures to (B, 3, S, S) in ImageNet's normalisation."""
    tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255)
    return (tensor - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


# ---- parser --------------------------------------------------------------------


def train_parser(place: train_loop.Workplace) -> dict[str, Any]:
    """SegFormer on head crops from tight to the whole frame, faces blurred or intact, by cross entropy."""
    photos = Photos(place.cache, "train", PARSER_PHOTOS, workers=place.workers)
    model = architectures.parser()

    def loss_of(step: int) -> Tensor:
        rng = keyed.numpy_generator(place.seed, "parser", step)
        samples = [_parser_sample(photos[int(rng.integers(len(photos)))], rng) for _ in range(PARSER.batch_size)]
        odd = step % 2
        labels = torch.from_numpy(np.stack([parsing[odd::2, odd::2] for _, parsing in samples])).long()  # twice the logits' side is enough
        logits = model(pixel_values=normalised([image for image, _ in samples])).logits
        return F.cross_entropy(F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False), labels)

    loss = train_loop.fit("parser", model, loss_of, PARSER, place)
    miniature.write_parser(place.weights, model)
    return {"steps": PARSER.steps, "loss": round(loss, 4)}


def _parser_sample(photo: Photo, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    square = jittered(photo.square(), rng, (0.7, 1.7), 0.12) if rng.random() < 0.85 else crop.Square(0, 0, photo.image.shape[0])
    small = int(rng.choice([64, 96, 128, architectures.PARSER_SIDE], p=[0.05, 0.15, 0.4, 0.4]))
    if photo.box is not None and rng.random() < 0.5:
        photo = Photo(photo.view, blur_face(photo.image, face_ring(photo.box)), photo.parsing, photo.box, photo.landmarks)
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
    photos = Photos(place.cache, "train", PHOTOS, workers=place.workers)
    model = _AttributeNet()

    def loss_of(step: int) -> Tensor:
        rng = keyed.numpy_generator(place.seed, "perceptual", step)
        samples = [_attribute_sample(photos[int(rng.integers(len(photos)))], rng) for _ in range(PERCEPTUAL.batch_size)]
        predicted = model(normalised([image for image, _ in samples]))
        losses = [
            F.cross_entropy(predicted[name], torch.tensor([labels[name] for _, labels in samples]), ignore_index=-1) for name in _ATTRIBUTES
        ]
        return torch.stack(losses).sum()

    loss = train_loop.fit("perceptual", model, loss_of, PERCEPTUAL, place)
    miniature.write_perceptual(place.weights, model.features)
    return {"steps": PERCEPTUAL.steps, "loss": round(loss, 4)}


def attributes(style: traits.Hairstyle) -> dict[str, int]:
    """Class numbers of a hairstyle, in the order of ``traits``."""
    return {
        "curl": style.curl,
        "volume": style.volume,
        "length": traits.LENGTHS.index(style.length),
        "colour": list(traits.HAIR_COLOURS).index(style.colour),
        "bangs": traits.BANGS.index(style.bangs),
    }


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
    """AutoencoderKL on head crops, by L1 on pixels and on their differences; then its decoder alone, for texture. No adversary."""
    photos = Photos(place.cache, "train", PHOTOS, workers=place.workers)
    model = architectures.vae().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_of(step: int) -> Tensor:
        rng = keyed.numpy_generator(place.seed, "vae", step)
        images = autoencoder_batch(photos, rng, VAE.batch_size).contiguous(memory_format=torch.channels_last)
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=keyed.torch_generator(place.seed, "vae-noise", step))
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        return _reconstruction_loss(decoded, images) + KL_WEIGHT * posterior.kl().mean()

    loss = train_loop.fit("vae", model, loss_of, VAE, place)
    rng = keyed.numpy_generator(place.seed, "vae-scale")
    with torch.no_grad():
        latents = torch.cat([model.encode(autoencoder_batch(photos, rng, 32)).latent_dist.mean for _ in range(8)])
    standardise(model, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    miniature.write_diffusion(place.weights, "vae", model)
    return {"steps": VAE.steps, "loss": round(loss, 4), "decoder_steps": DECODER.steps, "decoder_loss": round(train_decoder(place), 4)}


def train_decoder(place: train_loop.Workplace) -> float:
    """Teaches the autoencoder's decoder texture: squared errors blur strands away, and with them the curl that a result should show.

    The encoder stays, so latents and all that was trained on them stay valid. Pixels, features of the perceptual net (LPIPS) and their
    correlations inside the hair (Gram matrices, which do not ask where a strand lies) count together.
    """
    photos = Photos(place.cache, "train", PHOTOS, workers=place.workers)
    with tempfile.TemporaryDirectory() as temporary:
        for part in ("vae", "perceptual"):
            miniature.copy_part(miniature.by_name(part), place.weights, Path(temporary))
        model = conditioning.load_vae(folder(Path(temporary), "inpainting"), device=torch.device("cpu"), dtype=torch.float32)
        network = load_perceptual(Path(temporary))[0]
    model = model.to(memory_format=torch.channels_last)
    for parameter in (*model.decoder.parameters(), *model.post_quant_conv.parameters()):
        parameter.requires_grad_(True)

    def loss_of(step: int) -> Tensor:
        rng = keyed.numpy_generator(place.seed, "decoder", step)
        samples = [_autoencoder_sample(photos[int(rng.integers(len(photos)))], rng) for _ in range(DECODER.batch_size)]
        images = conditioning.to_tensor([image for image, _ in samples]).contiguous(memory_format=torch.channels_last)
        hair = conditioning.mask_tensor([mask for _, mask in samples])
        with torch.no_grad():
            latents = model.encode(images).latent_dist.mean
        decoded = model.decode(latents).sample
        wanted = [features.detach() for features in network.features(images)]
        correlations = []
        for ours, theirs in zip(network.features(decoded), wanted, strict=True):
            weight = F.interpolate(hair, ours.shape[-2:], mode="area")
            target = losses.gram_matrix(theirs, weight)
            error = (losses.gram_matrix(ours, weight) - target).square().sum((1, 2)) / target.square().sum((1, 2)).clamp_min(1e-6)
            correlations.append(error.mean())
        return _reconstruction_loss(decoded, images) + network.lpips(decoded, images).mean() + 0.15 * torch.stack(correlations).mean()

    loss = train_loop.fit("decoder", model, loss_of, DECODER, place)
    miniature.write_diffusion(place.weights, "vae", model)
    return loss


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


def autoencoder_batch(photos: Photos, rng: np.random.Generator, count: int) -> Tensor:
    """Head crops (count, 3, 128, 128) in -1..1: as they are, with a blurred face, or with the hair removed."""
    images = [_autoencoder_sample(photos[int(rng.integers(len(photos)))], rng)[0] for _ in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def _autoencoder_sample(photo: Photo, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The picture and the mask of its hair, (128, 128) uint8 0/255."""
    square = jittered(photo.square(), rng, (0.8, 1.2), 0.08)
    blurred = photo.box is not None and rng.random() < 0.5
    if blurred:
        photo = Photo(photo.view, blur_face(photo.image, face_ring(photo.box)), photo.parsing, photo.box, photo.landmarks)  # type: ignore[arg-type]
    image, parsing = head_crop(photo, square, architectures.IMAGE_SIDE)
    if rng.random() < 0.15:
        box = None if photo.box is None else square.scaled_box(tuple(map(float, photo.box)), architectures.IMAGE_SIDE)  # type: ignore[arg-type]
        image = bald.remove_hair(image, np.where(parsing == HAIR, np.uint8(255), np.uint8(0)), box)
        parsing = np.zeros_like(parsing)
    gain = rng.uniform(0.85, 1.15) * rng.uniform(0.96, 1.04, 3)
    image = np.clip((image.astype(np.float32) - 127) * gain + 127 + rng.uniform(-12, 12), 0, 255).astype(np.uint8)
    mask = np.where(parsing == HAIR, np.uint8(255), np.uint8(0))
    return (image, mask) if rng.random() < 0.5 else (image[:, ::-1], mask[:, ::-1])


def _reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean absolute error and squared error of pixels, and mean absolute error of differences between neighbours."""
    error = decoded - images
    across, down = error.diff(dim=3).abs().mean(), error.diff(dim=2).abs().mean()
    return error.abs().mean() + 2.0 * error.square().mean() + 0.25 * (across + down)
