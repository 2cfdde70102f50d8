"""Trains the miniature autoencoder on head crops."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from backend.demo import architectures, miniature, train_loop
from backend.demo.training_data import Photo, Photos, hair_mask, head_crop, jittered
from backend.imaging import bald
from backend.training import keyed
from backend.training.models import losses
from backend.training.models.perceptual import load_perceptual
from backend.tryon import conditioning

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

VAE = train_loop.Schedule(steps=2000, batch_size=12, lr=2e-3, photos=1536, warmup=100, weight_decay=1e-3, average=0.99, save_every=100)
VAE_LONG = train_loop.Schedule(
    steps=5000, batch_size=64, lr=1.5e-3, photos=6144, warmup=200, weight_decay=1e-3, average=0.998, save_every=500
)
KL_WEIGHT = 1e-6
LPIPS_WEIGHT, GRAM_WEIGHT = 1.0, 1.0
SDXL_SCALING = 0.13025


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
    model = architectures.vae(widths)
    if place.start is not None:
        miniature.load_part("vae", place.start, model)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

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
            + GRAM_WEIGHT * losses.gram_distance(found, wanted, hair)
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
    whiten(model, latents.mean((0, 2, 3)), torch.cov(latents.transpose(0, 1).flatten(1)))
    miniature.write_diffusion(place.weights, "vae", model)
    return {"steps": schedule.steps, "loss": round(loss, 4)}


@torch.no_grad()
def whiten(model: AutoencoderKL, mean: Tensor, covariance: Tensor) -> None:
    """Mixes the latent channels, without changing what is decoded, so that they are uncorrelated: mean 0, deviation 1 / SDXL's factor.

    mean (4,), covariance (4, 4): of the latents as they are. The change goes into the 1x1 convolutions on both sides of the latents, so
    that ``scaling_factor`` 0.13025 brings every direction to unit variance: the noise schedule takes that for granted. Of two channels
    that say nearly the same, the noise would hide the difference at most timesteps, however well the decoder knows it. The mixing is
    the symmetric one, which moves the latents least (zero-phase whitening). A posterior stays diagonal: its log variances are averaged
    with the weights that the mixing gives to equal variances.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    mixing = (vectors * values.rsqrt() @ vectors.T).to(mean.dtype) / SDXL_SCALING
    before, after = model.quant_conv, model.post_quant_conv
    count = len(mean)
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight.copy_((after.weight[:, :, 0, 0] @ torch.linalg.inv(mixing))[..., None, None])
    rows, bias = before.weight[:, :, 0, 0].clone(), before.bias.clone()
    gain = mixing.square()
    share = gain / gain.sum(dim=1, keepdim=True)
    before.weight.copy_(torch.cat([mixing @ rows[:count], share @ rows[count:]])[..., None, None])
    before.bias.copy_(torch.cat([mixing @ (bias[:count] - mean), share @ bias[count:] + gain.sum(dim=1).log()]))
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
    """Absolute and squared error, and absolute error of differences between neighbours, of pixels; and of means over 4 x 4 pixels.

    Inside the hair a pixel counts half: no latent says where a strand lies, and the mean of all places is a blur. Its means over 4 x 4 pixels
    count three times. Hue counts by itself: a cell has four channels, and by plain errors its gradients are worth more than one of the two
    axes of colour, so that purple hair came out grey.
    """
    error, weight = decoded - images, 1.0 - 0.5 * hair
    edges = (weight[..., 1:] * error.diff(dim=3).abs()).mean() + (weight[..., 1:, :] * error.diff(dim=2).abs()).mean()
    coarse, inside = F.avg_pool2d(error, 4), F.avg_pool2d(hair, 4)
    hue = coarse - coarse.mean(dim=1, keepdim=True)
    return _both(error, weight) + 0.25 * edges + 3.0 * _both(coarse, inside) + 4.0 * _both(hue, 1.0 + 2.0 * inside)


def _both(error: Tensor, weight: Tensor) -> Tensor:
    return (weight * (error.abs() + 2.0 * error.square())).mean()
