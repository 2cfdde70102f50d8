"""Trains the miniature base: a 9-channel UNet that fills random holes in portraits from a prompt, as SDXL inpainting 0.1 does.

It never sees a style or identity token, so that Stage 2 has something to learn. The text encoders stay as they are drawn: over a
vocabulary of a few hundred words, random word vectors tell prompts apart, and the UNet learns to read them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from backend.demo import architectures, miniature, train_loop, traits
from backend.demo.portraits import HAIR, blur_face
from backend.demo.training_data import Photo, Photos, face_ring, head_crop, jittered
from backend.imaging import crop, masks, structure
from backend.training import keyed
from backend.training.data_processing.prompts import NEUTRAL_PROMPT, prompt_from_choice
from backend.training.models import losses
from backend.training.models.stage2_unet import time_ids
from backend.training.stage2_run import prediction_kind
from backend.tryon import conditioning
from backend.tryon.steering import SteeredUNet, load_controlnet
from backend.weights import folder

PHOTOS = 1536
CUTS_PER_PHOTO = 3  # differently cut, with a hole of their own
POOL = 96  # photos whose hair the holes borrow
UNET = train_loop.Schedule(steps=8000, batch_size=16, lr=6e-4, warmup=200, average=0.998, save_every=250)
CONTROLNET = train_loop.Schedule(steps=600, batch_size=16, lr=5e-4, warmup=50, average=0.99, save_every=200)
DROP_TEXT = 0.1
_LENGTHS = {"men": "short", "women_short": "short", "bob": "bob", "medium": "medium", "long": "long"}
_CURLS = ("straight", "wavy", "curly", "tightly curly")
_COLOURS = {"red-brown": "reddish brown", "yellow-brown": "golden brown", "pink brown": "pinkish brown", "other": None}
_BANGS = {"none": None, "see_through": "see-through", "full": "full", "side_swept": "swept", "choppy": "choppy"}


@dataclass(frozen=True)
class Cuts:
    """What the UNet learns from, computed once: latents and masked_latents (N, 4, 16, 16), mask (N, 1, 16, 16), context (N, 77, 128),
    pooled (N, 64); the last row of context and pooled, beyond N, is the empty prompt. structure (N, 3, 128, 128) uint8."""

    latents: Tensor
    masked_latents: Tensor
    mask: Tensor
    context: Tensor
    pooled: Tensor
    structure: Tensor


def train_text(place: train_loop.Workplace) -> dict[str, Any]:
    """Writes the tokenizers and the text encoders that the base is trained with."""
    miniature.create("text", place.weights, seed=place.seed)
    return {"steps": 0, "trained": False, "note": "random, frozen; the UNet was trained with exactly these"}


def train_unet(place: train_loop.Workplace) -> dict[str, Any]:
    """Denoises latents of head crops from the rest of the picture, the mask and the prompt; the target is the schedule's."""
    photos = Photos(place.cache, "train", PHOTOS, workers=place.workers)
    with _expanded(place.weights, "vae", "text") as parts:
        cuts = prepare_cuts(parts, photos, seed=place.seed)
    model = architectures.unet()
    schedule = architectures.scheduler()
    alphas, kind = alphas_and_kind()
    ids = time_ids(UNET.batch_size, architectures.IMAGE_SIDE)

    def loss_of(step: int) -> Tensor:
        draw = keyed.torch_generator(place.seed, "unet", step)
        rows = torch.randint(len(cuts.latents), (UNET.batch_size,), generator=draw)
        timesteps = torch.randint(len(alphas), (UNET.batch_size,), generator=draw)
        noise = torch.randn(UNET.batch_size, *cuts.latents.shape[1:], generator=draw)
        words = torch.where(torch.rand(UNET.batch_size, generator=draw) < DROP_TEXT, len(cuts.latents), rows)
        noisy = add_noise(cuts.latents[rows], noise, alphas[timesteps])
        predicted = model(
            torch.cat([noisy, cuts.mask[rows], cuts.masked_latents[rows]], dim=1),
            timesteps,
            cuts.context[words],
            added_cond_kwargs={"text_embeds": cuts.pooled[words], "time_ids": ids},
        ).sample
        return F.mse_loss(predicted, losses.target_of(kind, cuts.latents[rows], noise, alphas[timesteps]))

    loss = train_loop.fit("unet", model, loss_of, UNET, place)
    miniature.write_diffusion(place.weights, "unet", model)
    schedule.save_pretrained(folder(place.weights, "inpainting") / "scheduler")
    miniature.write_pipeline_index(place.weights)
    return {"steps": UNET.steps, "loss": round(loss, 4), "photos": PHOTOS}


@contextlib.contextmanager
def _expanded(weights: Path, *names: str) -> Iterator[Path]:
    """A weights folder with the named trained parts as the product reads them: large ones lie in 8 bits where they are trained to."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            miniature.copy_part(miniature.by_name(name), weights, Path(temporary))
        yield Path(temporary)


def alphas_and_kind() -> tuple[Tensor, losses.Prediction]:
    """The base's cumulative alphas (1000,) as Stage 2 takes them, and what it predicts."""
    schedule = architectures.scheduler()
    alphas: Tensor = DDPMScheduler.from_config(schedule.config).alphas_cumprod
    return alphas, prediction_kind(dict(schedule.config))


def add_noise(clean: Tensor, noise: Tensor, alpha_cumprod: Tensor) -> Tensor:
    """sqrt(a) clean + sqrt(1 - a) noise; clean and noise (B, 4, h, w), alpha_cumprod (B,)."""
    alpha = alpha_cumprod.view(-1, 1, 1, 1)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def train_controlnet(place: train_loop.Workplace) -> dict[str, Any]:
    """A ControlNet on head-structure maps beside the frozen base UNet (arXiv 2302.05543)."""
    from diffusers import UNet2DConditionModel

    photos = Photos(place.cache, "train", PHOTOS, workers=place.workers)
    with _expanded(place.weights, "vae", "text", "unet") as parts:
        cuts = prepare_cuts(parts, photos, seed=place.seed, faces_only=True)
        base = UNet2DConditionModel.from_pretrained(folder(parts, "inpainting") / "unet", local_files_only=True)
    base = base.eval().requires_grad_(False)
    model = architectures.controlnet(base)
    alphas, kind = alphas_and_kind()
    ids = time_ids(CONTROLNET.batch_size, architectures.IMAGE_SIDE)

    def loss_of(step: int) -> Tensor:
        draw = keyed.torch_generator(place.seed, "controlnet", step)
        rows = torch.randint(len(cuts.latents), (CONTROLNET.batch_size,), generator=draw)
        timesteps = torch.randint(len(alphas), (CONTROLNET.batch_size,), generator=draw)
        noise = torch.randn(CONTROLNET.batch_size, *cuts.latents.shape[1:], generator=draw)
        words = torch.where(torch.rand(CONTROLNET.batch_size, generator=draw) < 0.5, len(cuts.latents), rows)
        noisy = add_noise(cuts.latents[rows], noise, alphas[timesteps])
        steered = SteeredUNet(base, model, cuts.structure[rows].float() / 255.0, 1.0)
        predicted = steered(
            torch.cat([noisy, cuts.mask[rows], cuts.masked_latents[rows]], dim=1),
            timesteps,
            cuts.context[words],
            added_cond_kwargs={"text_embeds": cuts.pooled[words], "time_ids": ids},
        ).sample
        return F.mse_loss(predicted, losses.target_of(kind, cuts.latents[rows], noise, alphas[timesteps]))

    loss = train_loop.fit("controlnet", model, loss_of, CONTROLNET, place)
    miniature.write_diffusion(place.weights, "controlnet", model)
    return {"steps": CONTROLNET.steps, "loss": round(loss, 4), "photos": PHOTOS}


@torch.no_grad()
def denoising_errors(weights: Path, photos: Sequence[Photo]) -> tuple[Tensor, Tensor]:
    """Mean squared error of the prediction, (5,) at timesteps 100, 300, ..., 900: with each cut's own prompt, with the next one's."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(folder(weights, "inpainting") / "unet", local_files_only=True).eval()
    alphas, kind = alphas_and_kind()
    cuts = prepare_cuts(weights, photos, seed=1, per_photo=1)
    count = len(cuts.latents)
    ids = time_ids(count, architectures.IMAGE_SIDE)
    errors = []
    for t in range(100, 1000, 200):
        noise = torch.randn(cuts.latents.shape, generator=keyed.torch_generator(1, "noise", t))
        alpha = alphas[t].repeat(count)
        noisy, target = add_noise(cuts.latents, noise, alpha), losses.target_of(kind, cuts.latents, noise, alpha)
        for order in (torch.arange(count), torch.arange(count).roll(1)):
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
    alphas, kind = alphas_and_kind()
    cuts = prepare_cuts(weights, photos, seed=1, per_photo=1)
    count = len(cuts.latents)
    added = {"text_embeds": cuts.pooled[-1:].repeat(count, 1), "time_ids": time_ids(count, architectures.IMAGE_SIDE)}
    context = cuts.context[-1:].repeat(count, 1, 1)
    maps = cuts.structure.float() / 255.0
    errors = []
    for t in (300, 600, 900):
        noise = torch.randn(cuts.latents.shape, generator=keyed.torch_generator(1, "noise", t))
        alpha = alphas[t].repeat(count)
        entered = torch.cat([add_noise(cuts.latents, noise, alpha), cuts.mask, cuts.masked_latents], 1)
        target = losses.target_of(kind, cuts.latents, noise, alpha)
        for unet in (base, SteeredUNet(base, control, maps, 1.0), SteeredUNet(base, control, maps.roll(1, 0), 1.0)):
            errors.append(float(F.mse_loss(unet(entered, t, context, added_cond_kwargs=added).sample, target)))
    return sum(errors[0::3]) / 3, sum(errors[1::3]) / 3, sum(errors[2::3]) / 3


def prepare_cuts(
    weights: Path, photos: Photos | Sequence[Photo], *, seed: int, per_photo: int = CUTS_PER_PHOTO, faces_only: bool = False
) -> Cuts:
    """Cuts, masks and encodes photos with the autoencoder and the text encoders of a weights folder."""
    source = folder(weights, "inpainting")
    vae = conditioning.load_vae(source, device=torch.device("cpu"), dtype=torch.float32)
    text = conditioning.TextEncoders(source, device=torch.device("cpu"), dtype=torch.float32)
    rows: dict[str, list[Tensor]] = {"latents": [], "masked_latents": [], "mask": [], "structure": []}
    prompts: list[str] = []
    pool = [silhouette for number in range(min(POOL, len(photos))) if (silhouette := _silhouette(photos[number])) is not None]
    for number in range(len(photos)):  # Photos has no end of its own
        rng = keyed.numpy_generator(seed, "cuts", number)
        if faces_only and photos[number].box is None:
            continue
        drawn = [_cut(photos[number], pool, rng) for _ in range(per_photo)]
        images = conditioning.to_tensor([cut.image for cut in drawn])
        holes = conditioning.mask_tensor([cut.hole for cut in drawn])
        rows["structure"].append(torch.from_numpy(np.stack([cut.structure for cut in drawn])).permute(0, 3, 1, 2))
        rows["latents"].append(conditioning.encode_latents(vae, images)[0])
        rows["masked_latents"].append(conditioning.encode_latents(vae, images * (1 - holes))[0])
        rows["mask"].append(conditioning.latent_mask(holes, architectures.LATENT_SIDE))
        prompts += [_prompt(photos[number].view.hairstyle, rng) for _ in drawn]
    context, pooled = _encoded(text, prompts)
    joined = {name: torch.cat(values) for name, values in rows.items()}
    return Cuts(context=context, pooled=pooled, **joined)


class _Cut(NamedTuple):
    """image (128, 128, 3) uint8 RGB; hole (128, 128) uint8 0/255; structure (128, 128, 3) uint8."""

    image: NDArray[np.uint8]
    hole: NDArray[np.uint8]
    structure: NDArray[np.uint8]


def _silhouette(photo: Photo) -> masks.Silhouette | None:
    square = photo.square()
    _, parsing = head_crop(photo, square, architectures.IMAGE_SIDE)
    return masks.Silhouette(_hair(parsing), _box_in(photo, square)) if (parsing == HAIR).any() else None


def _hair(parsing: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(parsing == HAIR, np.uint8(255), np.uint8(0))


def _box_in(photo: Photo, square: crop.Square) -> crop.Box | None:
    if photo.box is None:
        return None
    x0, y0, x1, y1 = map(float, photo.box)
    return square.scaled_box((x0, y0, x1, y1), architectures.IMAGE_SIDE)


def _cut(photo: Photo, pool: Sequence[masks.Silhouette], rng: np.random.Generator) -> _Cut:
    """A head crop at 128 px and the hole to fill: the edit region, boxes anywhere, or everything."""
    square = jittered(photo.square(), rng, (0.9, 1.1), 0.05)
    if photo.box is not None and rng.random() < 0.6:
        photo = Photo(photo.view, blur_face(photo.image, face_ring(photo.box)), photo.parsing, photo.box, photo.landmarks)
    side = architectures.IMAGE_SIDE
    image, parsing = head_crop(photo, square, side)
    box = _box_in(photo, square)
    points = None if photo.landmarks is None else square.scaled(photo.landmarks, side)
    drawn = structure.head_structure(side, box, points)
    kind = rng.random()
    if kind < 0.6:
        return _Cut(image, masks.edit_region(_hair(parsing), box, masks.random_shape(rng), masks.borrow(pool, box, rng)), drawn)
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


def _encoded(text: conditioning.TextEncoders, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Context and pooled vectors of the prompts and, last, of the empty one."""
    pieces = [text.encode(list(prompts[k : k + 64])) for k in range(0, len(prompts), 64)] + [text.encode([""])]
    return torch.cat([context for context, _ in pieces]), torch.cat([pooled for _, pooled in pieces])
