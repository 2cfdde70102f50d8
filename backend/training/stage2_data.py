"""Stage 2's batches: what is drawn for each sample, keyed by (seed, split, step), and how it reaches the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from backend.config import TrainConfig
from backend.training.data_processing.prompts import NEUTRAL_PROMPT
from backend.training.keyed import numpy_generator, torch_generator
from backend.training.models.stage2_unet import Conditions
from backend.tryon import conditioning


class Latents(Protocol):
    """Cached samples of one split, as ``stage2_cache.LatentCache`` has them."""

    ids: list[str]
    variants: int  # edit regions of each

    def __len__(self) -> int: ...

    def take(self, name: str, indices: NDArray[np.int64]) -> torch.Tensor:
        """One tensor of each of several samples, stacked."""
        ...


class Prompts(Protocol):
    """Encoded prompts, as ``stage2_cache.PromptCache`` has them."""

    def get(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Text (77, D) and pooled (P,), float32."""
        ...


class Pictures(Protocol):
    """The photos that cached samples were encoded from, as ``prepared.Pictures`` reads them."""

    def get(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """A sample's photo (S, S, 3) uint8 RGB and hair (S, S) uint8 0/255."""
        ...


@dataclass(frozen=True)
class Split:
    """The cached samples of one split with what is drawn from for each. pictures: None where no loss looks at pixels."""

    latents: Latents
    prompts: list[str]
    references: Sequence[Sequence[int]]
    pictures: Pictures | None = None


@dataclass(frozen=True)
class Textures:
    """For the texture loss, a square of each photo where its hair lies: corners (top, left) in latent pixels, picture (B, 3, P, P) in
    [-1, 1] and hair (B, 1, P, P), 0 or 1, float32; P is 8 ``train.texture_crop``."""

    corners: list[tuple[int, int]]
    picture: torch.Tensor
    hair: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One training batch on the device; latents are (B, 4, h, w) and scaled, masks (B, 1, h, w), all float32."""

    photo: torch.Tensor
    mask: torch.Tensor
    bald: torch.Tensor
    excluded: torch.Tensor
    conditions: Conditions
    noise: torch.Tensor
    timesteps: torch.Tensor
    ids: list[str]
    textures: Textures | None = None  # in steps with a texture loss

    def split(self, parts: int) -> list[Batch]:
        """The batch in ``parts`` equal parts, in order. Raises ValueError when it cannot be divided evenly."""
        count = len(self.ids)
        if count % parts:
            raise ValueError(f"a batch of {count} cannot be divided into {parts} equal parts")
        if parts == 1:
            return [self]
        size = count // parts
        return [self._part(slice(start, start + size)) for start in range(0, count, size)]

    def _part(self, rows: slice) -> Batch:
        parts = {name: value[rows] for name, value in vars(self).items() if name not in ("conditions", "textures")}
        conditions = Conditions(**{name: value[rows] for name, value in vars(self.conditions).items()})
        textures = self.textures and Textures(**{name: value[rows] for name, value in vars(self.textures).items()})
        return Batch(**parts, conditions=conditions, textures=textures)


class Batches:
    """Draws batches. timesteps: number of the schedule's training timesteps."""

    def __init__(self, train: TrainConfig, splits: Mapping[str, Split], prompts: Prompts, *, timesteps: int, device: torch.device) -> None:
        self._train, self._splits, self._prompts = train, splits, prompts
        self._timesteps, self._device = timesteps, device

    def batch(self, split: str, indices: np.ndarray, step: int, timestep: int | None = None, *, rows: slice | None = None) -> Batch:
        """The samples ``indices`` with every draw keyed by (seed, split, step); a fixed ``timestep`` makes it a validation batch.

        rows: of the batch, those to return; what a row holds does not depend on it.
        """
        train, data = self._train, self._splits[split]
        rng = numpy_generator(train.seed, f"draws/{split}", step)
        generator = torch_generator(train.seed, f"noise/{split}", step)
        rows = slice(None) if rows is None else rows
        mine = range(len(indices))[rows]
        texts, pooled, references = [], [], []
        variants = rng.integers(data.latents.variants, size=len(indices))
        dropped = (
            rng.random((4, len(indices))) < np.array([[train.drop.text], [train.drop.style], [train.drop.identity], [train.drop.all]])
        ) & (timestep is None)
        drop_text, drop_style, drop_identity, drop_all = dropped
        for row, index in enumerate(int(i) for i in indices):
            others = data.references[index] if train.reference == "other" else []
            reference = int(others[int(rng.integers(len(others)))]) if others else index
            # Serving with a reference says the neutral prompt, guidance the empty one: training meets both.
            unsaid = NEUTRAL_PROMPT if rng.random() < 0.5 else ""
            if row in mine:
                references.append(reference)
                text, text_pooled = self._prompts.get("" if drop_all[row] else unsaid if drop_text[row] else data.prompts[index])
                texts.append(text)
                pooled.append(text_pooled)
        own = np.asarray(indices, np.int64)[rows]
        every, chosen = torch.arange(len(own)), torch.from_numpy(variants[rows])
        take = data.latents.take
        mean = take("photo_mean", own).float()
        shape = (len(indices), *mean.shape[1:])
        photo = mean + take("photo_std", own).float() * torch.randn(shape, generator=generator)[rows]
        noise = torch.randn(shape, generator=generator)
        if train.noise_offset:
            noise = noise + train.noise_offset * torch.randn(*shape[:2], 1, 1, generator=generator)
        drawn = torch.randint(0, self._timesteps, (len(indices),), generator=generator)
        timesteps = drawn if timestep is None else torch.full_like(drawn, timestep)
        here = self._here
        conditions = Conditions(
            here(torch.stack(texts)), here(torch.stack(pooled)), here(take("style", np.array(references, np.int64)).float()),
            here(torch.from_numpy(~(drop_style | drop_all)[rows])), here(take("identity", own).float()),
            here(take("identity_valid", own).view(-1).bool() & torch.from_numpy(~(drop_identity | drop_all)[rows])),
        )  # fmt: skip
        return Batch(
            here(photo), here(take("mask", own)[every, chosen].float()), here(take("bald", own)[every, chosen].float()),
            here(take("excluded", own).float()), conditions, here(noise[rows]), here(timesteps[rows]),
            [data.latents.ids[int(i)] for i in own],
            self._textures(split, own, step, rows) if timestep is None and train.texture_every and step % train.texture_every == 0 else None,
        )  # fmt: skip

    def _textures(self, split: str, own: NDArray[np.int64], step: int, rows: slice) -> Textures | None:
        """A square for each of the samples ``own``, which are the ``rows`` of the batch of ``step``."""
        pictures, side = self._splits[split].pictures, self._train.texture_crop
        if pictures is None:
            return None
        draws = numpy_generator(self._train.seed, f"texture/{split}", step).random(rows.stop or len(own))[rows]
        corners, photos, hairs = [], [], []
        for index, draw in zip(own, draws, strict=True):
            photo, hair = pictures.get(int(index))
            top, left = hairy_square(hair, side, float(draw))
            corners.append((top, left))
            window = np.s_[8 * top : 8 * (top + side), 8 * left : 8 * (left + side)]
            photos.append(photo[window])
            hairs.append(hair[window])
        return Textures(corners, self._here(conditioning.to_tensor(photos)), self._here(conditioning.mask_tensor(hairs)))

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device, by way of pinned memory, so that the host does not wait for what the card still computes."""
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)


def hairy_square(hair: NDArray[np.uint8], side: int, draw: float) -> tuple[int, int]:
    """Top and left, in latent pixels, of a square of ``side`` latent pixels among those that hold nearly as much hair as any.

    hair: (S, S) uint8 0/255. draw: in [0, 1), which of those with at least three quarters of the most.
    """
    cells = torch.nn.functional.avg_pool2d(torch.from_numpy(hair)[None].float(), 8)
    held = torch.nn.functional.avg_pool2d(cells, side, stride=1)[0]
    full = (held >= 0.75 * held.max()).nonzero()
    top, left = full[int(draw * len(full))].tolist()
    return top, left
