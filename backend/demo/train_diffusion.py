"""Trains the miniature base: a 9-channel UNet that fills random holes in portraits from a prompt, as SDXL inpainting 0.1 does.

It never sees a style or identity token, so that Stage 2 has something to learn. The text encoders stay as they are drawn: over a
vocabulary of a few hundred words, random word vectors tell prompts apart, and the UNet learns to read them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from backend.demo import architectures, miniature, train_loop, traits
from backend.demo.training_data import Photo, Photos, hair_mask, head_crop, jittered
from backend.imaging import masks, structure
from backend.training import keyed
from backend.training.data_processing.prompts import NEUTRAL_PROMPT, prompt_from_choice
from backend.training.models.schedule import NoiseSchedule
from backend.training.models.stage2_unet import time_ids
from backend.tryon import conditioning
from backend.tryon.steering import SteeredUNet, load_controlnet
from backend.weights import folder

CUTS_PER_PHOTO = 3  # differently cut, with a hole of their own
_TOGETHER = 16  # photos cut and encoded at once
POOL = 96  # photos whose hair the holes borrow
UNET = train_loop.Schedule(steps=12000, batch_size=16, lr=6e-4, photos=1536, warmup=200, average=0.998, save_every=250)
UNET_LONG = train_loop.Schedule(steps=6000, batch_size=192, lr=1e-3, photos=6144, warmup=300, average=0.999, save_every=500)
CONTROLNET = train_loop.Schedule(steps=600, batch_size=16, lr=5e-4, photos=1536, warmup=50, average=0.99, save_every=200)
CONTROLNET_LONG = train_loop.Schedule(steps=3000, batch_size=128, lr=5e-4, photos=6144, warmup=200, average=0.998, save_every=500)
DROP_TEXT = 0.1
_LENGTHS = {"men": "short", "women_short": "short", "bob": "bob", "medium": "medium", "long": "long"}
_CURLS = ("straight", "wavy", "curly", "tightly curly")
_COLOURS = {"red-brown": "reddish brown", "yellow-brown": "golden brown", "pink brown": "pinkish brown", "other": None}
_BANGS = {"none": None, "see_through": "see-through", "full": "full", "side_swept": "swept", "choppy": "choppy"}


@dataclass(frozen=True)
class Cuts:
    """What the UNet learns from, computed once: latents and masked_latents (N, 4, 16, 16), mask (N, 1, 16, 16), structure
    (N, 3, 128, 128) uint8; context (P, 77, 128) and pooled (P, 64) of the distinct prompts, and said (N + 1,), which of them describes
    each cut. The last of ``said`` is the empty prompt."""

    latents: Tensor
    masked_latents: Tensor
    mask: Tensor
    structure: Tensor
    context: Tensor
    pooled: Tensor
    said: Tensor


def train_text(place: train_loop.Workplace) -> dict[str, Any]:
    """Writes the tokenizers and the text encoders that the base is trained with."""
    miniature.create("text", place.weights, seed=place.seed)
    return {"steps": 0, "trained": False, "note": "random, frozen; the UNet was trained with exactly these"}


def train_unet(place: train_loop.Workplace) -> dict[str, Any]:
    """Denoises latents of head crops from the rest of the picture, the mask and the prompt; the target is the schedule's."""
    plan = place.pick(UNET, UNET_LONG)
    photos = Photos(place.cache, "train", plan.photos, workers=place.workers)
    with _expanded(place.weights, "vae", "text") as parts:
        cuts = prepare_cuts(parts, photos, seed=place.seed, place=place)
    model = architectures.unet()
    if place.start is not None:
        miniature.load_part("unet", place.start, model)
    loss = _fit_denoiser("unet", model, lambda _: model, cuts, plan, place, drop_text=DROP_TEXT)
    miniature.write_diffusion(place.weights, "unet", model)
    architectures.scheduler().save_pretrained(folder(place.weights, "inpainting") / "scheduler")
    miniature.write_pipeline_index(place.weights)
    return {"steps": plan.steps, "loss": round(loss, 4), "photos": plan.photos}


def train_controlnet(place: train_loop.Workplace) -> dict[str, Any]:
    """A ControlNet on head-structure maps beside the frozen base UNet (arXiv 2302.05543)."""
    from diffusers import UNet2DConditionModel

    plan = place.pick(CONTROLNET, CONTROLNET_LONG)
    photos = Photos(place.cache, "train", plan.photos, workers=place.workers)
    with _expanded(place.weights, "vae", "text", "unet") as parts:
        cuts = prepare_cuts(parts, photos, seed=place.seed, place=place, faces_only=True)
        base = UNet2DConditionModel.from_pretrained(folder(parts, "inpainting") / "unet", local_files_only=True)
    base = base.eval().requires_grad_(False)
    model = architectures.controlnet(base)
    base.to(place.device)

    def steered(rows: Tensor) -> SteeredUNet:
        return SteeredUNet(base, model, cuts.structure[rows].float() / 255.0, 1.0)

    loss = _fit_denoiser("controlnet", model, steered, cuts, plan, place, drop_text=0.5)
    miniature.write_diffusion(place.weights, "controlnet", model)
    return {"steps": plan.steps, "loss": round(loss, 4), "photos": plan.photos}


def _fit_denoiser(
    name: str,
    trained: nn.Module,
    unet_for: Callable[[Tensor], Any],
    cuts: Cuts,
    plan: train_loop.Schedule,
    place: train_loop.Workplace,
    *,
    drop_text: float,
) -> float:
    """Fits ``trained`` to the schedule's target over all timesteps; ``unet_for(rows)`` is what predicts for those cuts."""
    noising = NoiseSchedule(dict(architectures.scheduler().config))
    ids = time_ids(plan.batch_size, architectures.IMAGE_SIDE).to(place.device)
    draws = partial(_draws, len(cuts.latents), plan.batch_size, noising.steps, drop_text, f"{place.seed}/{name}")

    def loss_of(_: int, batch: train_loop.Batch) -> Tensor:
        rows, timesteps, noise, words = (batch[key] for key in ("rows", "timesteps", "noise", "words"))
        clean = cuts.latents[rows]
        predicted = unet_for(rows)(
            torch.cat([noising.add_noise(clean, noise, timesteps), cuts.mask[rows], cuts.masked_latents[rows]], dim=1),
            timesteps,
            cuts.context[cuts.said[words]],
            added_cond_kwargs={"text_embeds": cuts.pooled[cuts.said[words]], "time_ids": ids},
        ).sample
        return F.mse_loss(predicted, noising.target(clean, noise, timesteps))

    return train_loop.fit(name, trained, draws, loss_of, plan, place)


def _draws(count: int, size: int, timesteps: int, drop_text: float, key: str, step: int) -> train_loop.Batch:
    """Which cuts a step sees, at which timesteps, with which noise and words (``count``: none)."""
    draw = keyed.torch_generator(0, key, step)
    rows = torch.randint(count, (size,), generator=draw)
    side = architectures.LATENT_SIDE
    return {
        "rows": rows,
        "timesteps": torch.randint(timesteps, (size,), generator=draw),
        "noise": torch.randn(size, 4, side, side, generator=draw),
        "words": torch.where(torch.rand(size, generator=draw) < drop_text, count, rows),
    }


@contextlib.contextmanager
def _expanded(weights: Path, *names: str) -> Iterator[Path]:
    """A weights folder with the named trained parts as the product reads them: large ones lie in 8 bits where they are trained to."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            miniature.copy_part(miniature.by_name(name), weights, Path(temporary))
        yield Path(temporary)


@torch.no_grad()
def denoising_errors(weights: Path, photos: Sequence[Photo]) -> tuple[Tensor, Tensor]:
    """Mean squared error of the prediction, (5,) at timesteps 100, 300, ..., 900: with each cut's own prompt, with the next one's."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(folder(weights, "inpainting") / "unet", local_files_only=True).eval()
    noising = NoiseSchedule(dict(architectures.scheduler().config))
    cuts = prepare_cuts(weights, photos, seed=1, per_photo=1)
    count = len(cuts.latents)
    ids = time_ids(count, architectures.IMAGE_SIDE)
    errors = []
    for t in range(100, 1000, 200):
        noise = torch.randn(cuts.latents.shape, generator=keyed.torch_generator(1, "noise", t))
        timesteps = torch.full((count,), t)
        noisy, target = noising.add_noise(cuts.latents, noise, timesteps), noising.target(cuts.latents, noise, timesteps)
        for order in (cuts.said[:-1], cuts.said[:-1].roll(1)):
            added = {"text_embeds": cuts.pooled[order], "time_ids": ids}
            predicted = model(torch.cat([noisy, cuts.mask, cuts.masked_latents], 1), t, cuts.context[order], added_cond_kwargs=added).sample
            errors.append(F.mse_loss(predicted, target))
    own, other = torch.stack(errors).view(-1, 2).T
    return own, other


@torch.no_grad()
def steered_errors(weights: Path, photos: Sequence[Photo]) -> tuple[float, float, float]:
    """Mean squared errors over timesteps 300, 600 and 900 with the empty prompt: base alone, steered, steered by the next cut's map."""
    from diffusers import UNet2DConditionModel

    base = UNet2DConditionModel.from_pretrained(folder(weights, "inpainting") / "unet", local_files_only=True).eval()
    control = load_controlnet(weights, device=torch.device("cpu"), dtype=torch.float32)
    noising = NoiseSchedule(dict(architectures.scheduler().config))
    cuts = prepare_cuts(weights, photos, seed=1, per_photo=1)
    count = len(cuts.latents)
    unsaid = cuts.said[-1:].repeat(count)
    added, context = {"text_embeds": cuts.pooled[unsaid], "time_ids": time_ids(count, architectures.IMAGE_SIDE)}, cuts.context[unsaid]
    maps = cuts.structure.float() / 255.0
    errors = []
    for t in (300, 600, 900):
        noise = torch.randn(cuts.latents.shape, generator=keyed.torch_generator(1, "noise", t))
        timesteps = torch.full((count,), t)
        entered = torch.cat([noising.add_noise(cuts.latents, noise, timesteps), cuts.mask, cuts.masked_latents], 1)
        target = noising.target(cuts.latents, noise, timesteps)
        for unet in (base, SteeredUNet(base, control, maps, 1.0), SteeredUNet(base, control, maps.roll(1, 0), 1.0)):
            errors.append(float(F.mse_loss(unet(entered, t, context, added_cond_kwargs=added).sample, target)))
    return sum(errors[0::3]) / 3, sum(errors[1::3]) / 3, sum(errors[2::3]) / 3


def prepare_cuts(
    weights: Path,
    photos: Photos | Sequence[Photo],
    *,
    seed: int,
    place: train_loop.Workplace | None = None,
    per_photo: int = CUTS_PER_PHOTO,
    faces_only: bool = False,
) -> Cuts:
    """Cuts, masks and encodes photos with the autoencoder and the text encoders of a weights folder, on the workplace's device."""
    source = folder(weights, "inpainting")
    device = torch.device("cpu") if place is None else place.device
    vae = conditioning.load_vae(source, device=device, dtype=torch.float32)
    text = conditioning.TextEncoders(source, device=torch.device("cpu"), dtype=torch.float32)
    numbers = [number for number in range(len(photos)) if not faces_only or photos[number].box is not None]  # Photos has no end of its own
    pool = [silhouette for number in range(min(POOL, len(photos))) if (silhouette := _silhouette(photos[number])) is not None]

    drawn = partial(_cut_batch, photos, numbers, pool, per_photo, seed)
    every = range(-(-len(numbers) // _TOGETHER))
    rows: dict[str, list[Tensor]] = {"latents": [], "masked_latents": [], "mask": [], "structure": []}
    for batch in map(drawn, every) if place is None else train_loop.drawn_ahead(drawn, every, place):
        images, holes = batch["images"], batch["holes"]
        rows["latents"].append(conditioning.encode_latents(vae, images)[0])
        rows["masked_latents"].append(conditioning.encode_latents(vae, images * (1 - holes))[0])
        rows["mask"].append(conditioning.latent_mask(holes, architectures.LATENT_SIDE))
        rows["structure"].append(batch["structure"])
    words = keyed.numpy_generator(seed, "prompts")
    prompts = [_prompt(photos[number].view.hairstyle, words) for number in numbers for _ in range(per_photo)] + [""]
    distinct = {prompt: place_of for place_of, prompt in enumerate(sorted(set(prompts)))}
    pieces = [text.encode(list(distinct)[k : k + 64]) for k in range(0, len(distinct), 64)]
    return Cuts(
        **{name: torch.cat(values) for name, values in rows.items()},
        context=torch.cat([context for context, _ in pieces]).to(device),
        pooled=torch.cat([pooled for _, pooled in pieces]).to(device),
        said=torch.tensor([distinct[prompt] for prompt in prompts], device=device),
    )


def _cut_batch(
    photos: Photos | Sequence[Photo], numbers: list[int], pool: list[masks.Silhouette], per_photo: int, seed: int, group: int
) -> train_loop.Batch:
    found = []
    for number in numbers[group * _TOGETHER : (group + 1) * _TOGETHER]:
        rng = keyed.numpy_generator(seed, "cuts", number)
        found += [_cut(photos[number], pool, rng) for _ in range(per_photo)]
    return {
        "images": conditioning.to_tensor([cut.image for cut in found]),
        "holes": conditioning.mask_tensor([cut.hole for cut in found]),
        "structure": torch.from_numpy(np.stack([cut.structure for cut in found])).permute(0, 3, 1, 2),
    }


class _Cut(NamedTuple):
    """image (128, 128, 3) uint8 RGB; hole (128, 128) uint8 0/255; structure (128, 128, 3) uint8."""

    image: NDArray[np.uint8]
    hole: NDArray[np.uint8]
    structure: NDArray[np.uint8]


def _silhouette(photo: Photo) -> masks.Silhouette | None:
    square = photo.square()
    hair = hair_mask(head_crop(photo, square, architectures.IMAGE_SIDE)[1])
    return masks.Silhouette(hair, photo.box_in(square, architectures.IMAGE_SIDE)) if hair.any() else None


def _cut(photo: Photo, pool: Sequence[masks.Silhouette], rng: np.random.Generator) -> _Cut:
    """A head crop at 128 px and the hole to fill: the edit region, boxes anywhere, or everything."""
    square = jittered(photo.square(), rng, (0.9, 1.1), 0.05)
    if rng.random() < 0.6:
        photo = photo.with_blurred_face()
    side = architectures.IMAGE_SIDE
    image, parsing = head_crop(photo, square, side)
    box = photo.box_in(square, side)
    points = None if photo.landmarks is None else square.scaled(photo.landmarks, side)
    drawn = structure.head_structure(side, box, points)
    kind = rng.random()
    if kind < 0.6:
        return _Cut(image, masks.edit_region(hair_mask(parsing), box, masks.random_shape(rng), masks.borrow(pool, box, rng)), drawn)
    if kind > 0.9:
        return _Cut(image, np.full((side, side), 255, np.uint8), drawn)
    hole = np.zeros((side, side), np.uint8)
    for _ in range(int(rng.integers(1, 5))):
        (x, y), (width, height) = rng.integers(0, side, 2), rng.integers(side // 8, side // 2, 2)
        hole[y : y + height, x : x + width] = 255
    return _Cut(image, hole, drawn)


def _prompt(style: traits.Hairstyle, rng: np.random.Generator) -> str:
    """What the hairstyle looks like, at times with a part of it left unsaid."""
    said = {
        "length": _LENGTHS[style.length],
        "curl": _CURLS[style.curl],
        "colour": _COLOURS.get(style.colour, style.colour),
        "bangs": _BANGS[style.bangs],
    }
    if rng.random() < 0.1:
        return NEUTRAL_PROMPT
    kept = {name: value if rng.random() < 0.85 else None for name, value in said.items()}
    return prompt_from_choice(**kept, seed=int(rng.integers(1 << 30)))
