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


class Latents(Protocol):
    """Cached samples of one split, as ``stage2_cache.LatentCache`` has them."""

    ids: list[str]

    def __len__(self) -> int: ...

    def take(self, name: str, indices: NDArray[np.int64]) -> torch.Tensor:
        """One tensor of each of several samples, stacked."""
        ...


class Prompts(Protocol):
    """Encoded prompts, as ``stage2_cache.PromptCache`` has them."""

    def get(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Text (77, D) and pooled (P,), float32."""
        ...


@dataclass(frozen=True)
class Split:
    """The cached samples of one split with what is drawn from for each."""

    latents: Latents
    prompts: list[str]
    references: Sequence[Sequence[int]]


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
        conditions = Conditions(**{name: value[rows] for name, value in vars(self.conditions).items()})
        return Batch(**{**{name: value[rows] for name, value in vars(self).items() if name != "conditions"}, "conditions": conditions})


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
        variants = rng.integers(train.mask_variants, size=len(indices))
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
        )  # fmt: skip

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device, by way of pinned memory, so that the host does not wait for what the card still computes."""
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)
