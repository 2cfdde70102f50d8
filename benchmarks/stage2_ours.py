"""The product's own step as an arm of benchmarks/stage2_gpu.py: its presets over random networks and cached samples."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backend.config import REPO_ROOT, Config, load_config
from backend.training import checkpoints, presets
from backend.training.keyed import batches
from backend.training.lowmem import Arithmetic, FusedFactoredAdam
from backend.training.memory_plan import memory_plan
from backend.training.models.perceptual import PerceptualNet
from backend.training.models.schedule import NoiseSchedule
from backend.training.stage2_data import Batches
from backend.training.stage2_step import Stage2Step, build_optimizer, ready_for_training, weights_dtype
from backend.tryon import conditioning
from backend.tryon.sampling import Sampler, sample
from benchmarks.stage2_meter import GIB, Meter, Setting
from benchmarks.stage2_parts import SCHEDULER, SyntheticPrompts, random_model, random_pictures, random_vae, synthetic_split

SAMPLES = 16


def configuration(setting: Setting, **train: object) -> Config:
    """configs/rtx3060.yaml at the measured size, without texture loss unless asked for."""
    small = ["data.resolution=64", "data.patch_size=32", "train.texture_crop=8"] if setting.size.name == "miniature" else []
    settings = {"texture_every": 0, "steps": 1000, "warmup": 10, **train}
    return load_config(REPO_ROOT / "configs/rtx3060.yaml", [*small, *(f"train.{key}={value}" for key, value in settings.items())])


@dataclass
class Ours:
    """The product's own step over random networks and cached samples."""

    config: Config
    step: Stage2Step
    batches: Batches
    vae: Any

    def run(self, number: int, indices: np.ndarray) -> float:
        """One step from cached latents."""
        return self.step(self.batches.batch("train", indices, number), number)["loss"]

    def run_encoding(self, number: int, indices: np.ndarray, photo: torch.Tensor, bald: torch.Tensor) -> float:
        """One step with both pictures encoded in the loop, one at a time as the cache does."""
        mean, std = conditioning.encode_latents(self.vae, photo)
        photo_latents = (mean + std * torch.randn_like(std)).float()
        bald_latents = conditioning.encode_latents(self.vae, bald)[0].float()
        batch = dataclasses.replace(self.batches.batch("train", indices, number), photo=photo_latents, bald=bald_latents)
        return self.step(batch, number)["loss"]


def build_ours(setting: Setting, config: Config, *, vae: bool, texture: bool = False) -> Ours:
    """Everything that Stage2Run would load."""
    size, device, train = setting.size, setting.device, config.train
    drawn_model = random_model(size, train.style_tokens, device, weights_dtype(train.preset))
    if presets.offloaded(train, device, 1):
        drawn_model.to("cpu")  # drawn on the card, where it is quick
    model = ready_for_training(drawn_model, train, device)
    optimizer = build_optimizer(model, train, setting.arithmetic)
    frozen = random_vae(size, device, torch.bfloat16 if device.type == "cuda" else torch.float32) if vae else None
    noising = NoiseSchedule(SCHEDULER)
    perceptual = PerceptualNet().to(device) if texture else None
    split = synthetic_split(size, samples=SAMPLES, variants=train.mask_variants, style_tokens=train.style_tokens)
    drawn = Batches(train, {"train": split}, SyntheticPrompts(size), timesteps=noising.steps, device=device)
    return Ours(config, Stage2Step(config, model, optimizer, noising, vae=frozen, perceptual=perceptual), drawn, frozen)


def ours(
    setting: Setting, *, preset: str = "full-12gb", batch: int = 1, vae: bool = False, arithmetic: Arithmetic | None = None,
    compiled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A preset from cached latents, or with the VAE in the loop."""
    setting = dataclasses.replace(setting, arithmetic=arithmetic or setting.arithmetic)
    config = configuration(setting, preset=preset, batch_size=batch, compile=compiled)
    trained = build_ours(setting, config, vae=vae)
    stream = batches(SAMPLES, batch, config.train.seed, 0, config.train.steps)
    if vae:
        photo, bald = (random_pictures(setting.size, batch, setting.device) for _ in range(2))
        measured = Meter(setting).run(lambda n: trained.run_encoding(n, next(stream)[1], photo, bald), batch)
    else:
        measured = Meter(setting).run(lambda n: trained.run(n, next(stream)[1]), batch)
    arithmetic = getattr(trained.step.optimizer, "arithmetic", None)  # AdamW has one only
    return {**measured, "preset": preset, "arithmetic": arithmetic, "plan": plan(setting, config, vae=vae)}


def profile(setting: Setting) -> dict[str, Any]:
    """Where a step's time goes: three steps of ``ours`` under torch's profiler, per step, the largest first."""
    config = configuration(setting, batch_size=1)
    trained = build_ours(setting, config, vae=False)
    stream = batches(SAMPLES, 1, config.train.seed, 0, config.train.steps)
    cuda = setting.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    for number in range(setting.warmup // 4 + 1):
        trained.run(number, next(stream)[1])
    with torch.profiler.profile(activities=kinds) as watched:
        for number in range(3):
            trained.run(100 + number, next(stream)[1])
    rows = [
        {
            "name": event.key[:90],
            "calls": event.count / 3,
            "ms": (event.self_device_time_total if cuda else event.self_cpu_time_total) / 3000,
        }
        for event in watched.key_averages()
        if not cuda or event.device_type == torch.autograd.DeviceType.CUDA  # the kernels themselves, not the calls that launched them
    ]
    rows.sort(key=lambda row: row["ms"], reverse=True)
    return {"device_ms_per_step": round(sum(row["ms"] for row in rows), 2), "rows": rows[:40]}


def plan(setting: Setting, config: Config, *, vae: bool) -> dict[str, Any] | None:
    """The memory plan's lines of what this arm holds, and their sum without the CUDA context, which the allocator does not see."""
    if setting.size.name != "full":
        return None
    lines = [line for line in memory_plan(config)["lines"] if vae or not line["name"].startswith("VAE")]
    seen = sum(line["gib"] for line in lines if not line["name"].startswith("CUDA context"))
    return {"lines": lines, "allocated_gib": round(seen, 3)}


def capped(setting: Setting) -> dict[str, Any]:
    """Preset full-12gb as configs/rtx3060.yaml has it, texture loss and all, under a hard cap: steps, a checkpoint, a picture."""
    if setting.device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, setting.cap_gib * GIB / total))
    config = configuration(setting, texture_every=5, texture_max_timestep=1000)  # every fifth step for certain, not every 50th by chance
    trained = build_ours(setting, config, vae=True, texture=True)
    meter = Meter(setting)
    stream = batches(SAMPLES, config.train.batch_size, config.train.seed, 0, config.train.steps)
    measured = meter.run(lambda n: trained.run(n, next(stream)[1]), config.train.batch_size)
    return {
        **measured, "cap_gib": setting.cap_gib, "save": _saved(meter, trained), "sample": _sampled(meter, trained, setting),
        "plan": plan(setting, config, vae=True),
    }  # fmt: skip


def _saved(meter: Meter, trained: Ours) -> dict[str, Any]:
    """A checkpoint by the product's code into a temporary folder, read back whole by its hashes."""
    meter.reset()
    optimizer = trained.step.optimizer
    assert isinstance(optimizer, FusedFactoredAdam)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        path = checkpoints.save(
            Path(folder), "stage2_step_1", weights=trained.step.model.state_dict(), optimizer=optimizer.tensors(),
            position={"step": 1}, header={"format": "benchmark"},
        )  # fmt: skip
        seconds = time.perf_counter() - began
        written = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    return {"seconds": round(seconds, 1), "gib": round(written / GIB, 3), **meter.peaks()}


def _sampled(meter: Meter, trained: Ours, setting: Setting) -> dict[str, Any]:
    """A picture by the product's sampler with the modules that train."""
    meter.reset()
    side = setting.size.resolution
    region = np.zeros((side, side), np.uint8)
    region[side // 4 : side // 2] = 255
    head = conditioning.HeadInput(region, np.full((side, side, 3), 127, np.uint8), np.zeros((side, side, 3), np.uint8))
    conditions = trained.batches.batch("train", np.array([0]), 0).conditions
    text, pooled = SyntheticPrompts(setting.size).get("")
    sampler = Sampler(trained.step.model.eval(), trained.vae, SCHEDULER, text[None], pooled[None])
    began = time.perf_counter()
    image = sample(sampler, [head], conditions, seeds=[0], steps=min(20, setting.steps), guidance=2.0)
    finite = bool(torch.isfinite(image).all())
    return {"seconds": round(time.perf_counter() - began, 1), "finite": finite, "shape": list(image.shape), **meter.peaks()}
