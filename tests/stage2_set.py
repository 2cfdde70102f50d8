"""Stage 2 without files: a tiny network and synthetic samples, driven by the product's own step."""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch

from backend.config import REPO_ROOT, Config, load_config
from backend.training.keyed import batches
from backend.training.lowmem import FusedFactoredAdam
from backend.training.models.schedule import NoiseSchedule
from backend.training.models.stage2_unet import HairInpaintingUNet
from backend.training.processes import Processes
from backend.training.stage2_data import Batches
from backend.training.stage2_step import Stage2Step, build_optimizer, ready_for_training
from benchmarks.stage2_parts import SCHEDULER, SIZES, SyntheticPrompts, random_model, synthetic_split

CPU = torch.device("cpu")
SIZE = SIZES["miniature"]
SAMPLES = 8
SMALL = ("data.resolution=64", "data.patch_size=32", "train.texture_crop=8", "train.texture_every=0", "train.gradient_checkpointing=false",
         "train.steps=200", "train.warmup=10", "train.mask_variants=1")  # fmt: skip


def settings(**train: object) -> Config:
    """configs/rtx3060.yaml at toy size."""
    return load_config(REPO_ROOT / "configs/rtx3060.yaml", [*SMALL, *(f"train.{key}={value}" for key, value in train.items())])


@functools.cache
def start(style_tokens: int = 1) -> HairInpaintingUNet:
    """The float32 network that every run of a comparison begins from; copy it."""
    return random_model(SIZE, style_tokens, CPU, torch.float32)


class Toy:
    """One run over synthetic samples."""

    def __init__(self, config: Config, model: HairInpaintingUNet | None = None, processes: Processes | None = None) -> None:
        self.config, self.processes = config, processes or Processes(CPU)
        train = config.train
        torch.manual_seed(train.seed)
        self.model = ready_for_training(
            copy.deepcopy(model if model is not None else start(train.style_tokens)), train, CPU, self.processes
        )
        self.optimizer = build_optimizer(self.model, train, "eager", self.processes)
        noising = NoiseSchedule(SCHEDULER)
        split = synthetic_split(SIZE, samples=SAMPLES, variants=1, style_tokens=train.style_tokens)
        self.batches = Batches(train, {"train": split}, SyntheticPrompts(SIZE), timesteps=noising.steps, device=CPU)
        self.step = Stage2Step(config, self.model, self.optimizer, noising, vae=None, perceptual=None, processes=self.processes)

    def train(self, steps: int, first: int = 0) -> list[float]:
        """Trains steps ``first``..``steps`` - 1 and returns their losses."""
        size = self.config.train.batch_size * self.config.train.accumulate * self.processes.count
        losses = []
        for step, indices in batches(SAMPLES, size, self.config.train.seed, first, steps):
            batch = self.batches.batch("train", indices, step, rows=self.processes.rows(size))
            losses.append(self.step(batch, step)["loss"])
        return losses

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The mean loss on fixed samples, timesteps and noise."""
        return float(np.mean([
            float(self.step.validation_loss(self.batches.batch("train", np.arange(SAMPLES), 10_000 + t, t))) for t in (50, 300, 600, 900)
        ]))  # fmt: skip

    def tensors(self) -> dict[str, torch.Tensor]:
        """All weights, and the optimizer's state where it is ours."""
        state = self.optimizer.tensors() if isinstance(self.optimizer, FusedFactoredAdam) else {}
        return {**{name: value.clone() for name, value in self.model.state_dict().items()}, **{n: v.clone() for n, v in state.items()}}
