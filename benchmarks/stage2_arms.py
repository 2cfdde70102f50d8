"""What benchmarks/stage2_gpu.py measures, one function per arm; each runs in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from backend.config import REPO_ROOT, Config, load_config
from backend.training import checkpoints
from backend.training.keyed import batches
from backend.training.lowmem import Arithmetic, FusedFactoredAdam, stochastically_rounded
from backend.training.memory_plan import memory_plan
from backend.training.models.perceptual import PerceptualNet
from backend.training.models.schedule import NoiseSchedule
from backend.training.models.stage2_unet import time_ids
from backend.training.stage2_data import Batches
from backend.training.stage2_step import Stage2Step, build_optimizer, ready_for_training, weights_dtype
from backend.tryon import conditioning
from backend.tryon.sampling import Sampler, sample
from benchmarks.lowmem_check import check
from benchmarks.stage2_parts import (
    SCHEDULER,
    Size,
    SyntheticPrompts,
    random_model,
    random_pictures,
    random_unet,
    random_vae,
    synthetic_split,
)

GIB = 2**30
SAMPLES = 16


@dataclass(frozen=True)
class Setting:
    """What the command line asks of an arm. seconds: the most that its steps may take together."""

    size: Size
    device: torch.device
    warmup: int
    steps: int
    seconds: float
    cap_gib: float
    arithmetic: Arithmetic


@dataclass
class Meter:
    """Times steps on the device's own clock and reads the allocator's peaks."""

    setting: Setting

    def run(self, step: Callable[[int], float], batch: int) -> dict[str, Any]:
        """``step(n)`` trains once and returns its loss. Warm-up takes at most a third of the seconds."""
        self.reset()
        losses = self._steps(step, 0, self.setting.warmup, self.setting.seconds / 3)[1]
        warmed = len(losses)
        marks, more = self._steps(step, warmed, self.setting.steps, self.setting.seconds * 2 / 3)
        losses += more
        times = [after - before for before, after in itertools.pairwise(marks)]
        return {
            "batch": batch, "warmup_steps": warmed, "timed_steps": len(times), "median_ms": round(1000 * statistics.median(times), 2),
            "samples_per_s": round(batch * len(times) / (marks[-1] - marks[0]), 3), "loss_first": losses[0], "loss_last": losses[-1],
            **self.peaks(),
        }  # fmt: skip

    def _steps(self, step: Callable[[int], float], first: int, count: int, seconds: float) -> tuple[list[float], list[float]]:
        """Moments in seconds before the first and after each step, and the losses."""
        began, losses, marks = time.perf_counter(), [], [self._mark()]
        for number in range(first, first + count):
            losses.append(step(number))
            marks.append(self._mark())
            if time.perf_counter() - began > seconds:
                break
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()
            return [marks[0].elapsed_time(mark) / 1000 for mark in marks], losses
        return marks, losses

    def _mark(self) -> Any:
        if self.setting.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reset(self) -> None:
        """Peaks count from here."""
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, float]:
        """Peaks since ``reset`` in GiB, and what the device has in use now, by all processes; nothing on a CPU."""
        if self.setting.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info()
        peaks = {"peak_allocated_gib": torch.cuda.max_memory_allocated(), "peak_reserved_gib": torch.cuda.max_memory_reserved()}
        return {name: round(value / GIB, 3) for name, value in {**peaks, "device_used_gib": total - free}.items()}


def configuration(setting: Setting, **train: object) -> Config:
    """configs/rtx3060.yaml at the measured size, without texture loss unless asked for."""
    small = ["data.resolution=64", "data.patch_size=32", "train.texture_crop=8"] if setting.size.name == "miniature" else []
    settings = {"texture_every": 0, "steps": 1000, "warmup": 10, **train}
    return load_config(REPO_ROOT / "configs/rtx3060.yaml", [*small, *(f"train.{key}={value}" for key, value in settings.items())])


# ---- ours ----


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
    model = ready_for_training(random_model(size, train.style_tokens, device, weights_dtype(train.preset)), train, device)
    optimizer = build_optimizer(model, train, setting.arithmetic)
    frozen = random_vae(size, device, torch.bfloat16 if device.type == "cuda" else torch.float32) if vae else None
    noising = NoiseSchedule(SCHEDULER)
    perceptual = PerceptualNet().to(device) if texture else None
    split = synthetic_split(size, samples=SAMPLES, variants=train.mask_variants, style_tokens=train.style_tokens)
    drawn = Batches(train, {"train": split}, SyntheticPrompts(size), timesteps=noising.steps, device=device)
    return Ours(config, Stage2Step(config, model, optimizer, noising, vae=frozen, perceptual=perceptual), drawn, frozen)


def ours(setting: Setting, *, batch: int = 1, vae: bool = False, arithmetic: Arithmetic | None = None) -> dict[str, Any]:
    """Preset full-12gb from cached latents, or with the VAE in the loop."""
    setting = dataclasses.replace(setting, arithmetic=arithmetic or setting.arithmetic)
    config = configuration(setting, batch_size=batch)
    trained = build_ours(setting, config, vae=vae)
    stream = batches(SAMPLES, batch, config.train.seed, 0, config.train.steps)
    if vae:
        photo, bald = (random_pictures(setting.size, batch, setting.device) for _ in range(2))
        measured = Meter(setting).run(lambda n: trained.run_encoding(n, next(stream)[1], photo, bald), batch)
    else:
        measured = Meter(setting).run(lambda n: trained.run(n, next(stream)[1]), batch)
    assert isinstance(trained.step.optimizer, FusedFactoredAdam)
    return {**measured, "arithmetic": trained.step.optimizer.arithmetic, "plan": plan(setting, config, vae=vae)}


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


# ---- others ----


def _inputs(setting: Setting, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Text, pooled text, time ids, latents and mask of a batch of random samples, on the device."""
    size, device = setting.size, setting.device
    text, pooled = SyntheticPrompts(size).get("")
    side = size.resolution // 8
    return {
        "text": text.expand(batch, -1, -1).to(device, dtype), "pooled": pooled.expand(batch, -1).to(device, dtype),
        "time_ids": time_ids(batch, size.resolution).to(device, dtype), "latents": torch.randn(batch, 4, side, side, device=device),
        "bald": torch.randn(batch, 4, side, side, device=device), "mask": torch.ones(batch, 1, side, side, device=device),
    }  # fmt: skip


def _predicted(unet: Any, noising: NoiseSchedule, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The plain denoising loss of a batch: mean squared error of the predicted noise."""
    latents = inputs["latents"]
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, noising.steps, (len(latents),), device=latents.device)
    noisy = noising.add_noise(latents, noise, timesteps)
    sample_B9hw = torch.cat([noisy, inputs["mask"], inputs["bald"]], dim=1).to(dtype)
    added = {"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]}
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=dtype == torch.float32):
        prediction = unet(sample_B9hw, timesteps, inputs["text"], added_cond_kwargs=added, return_dict=False)[0]
    return F.mse_loss(prediction.float(), noise)


def reference(setting: Setting, *, vae: bool) -> dict[str, Any]:
    """What diffusers' SDXL examples do (train_instruct_pix2pix_sdxl and train_text_to_image_sdxl with their memory flags on): float32
    weights under bfloat16 autocast, 8-bit AdamW, gradient checkpointing, batch 1, gradients clipped to norm 1, both pictures encoded by
    the float32 VAE in the loop. The frozen text encoders' output is precomputed, which favours it."""
    device = setting.device
    unet = random_unet(setting.size, device, torch.float32).train()
    unet.enable_gradient_checkpointing()
    optimizer, name = _adamw_8bit(unet)
    inputs = _inputs(setting, 1, torch.float32)
    noising = NoiseSchedule(SCHEDULER)
    frozen = random_vae(setting.size, device, torch.float32) if vae else None
    photo, bald = (random_pictures(setting.size, 1, device) for _ in range(2))

    def step(_: int) -> float:
        if frozen is not None:
            inputs["latents"] = frozen.encode(photo).latent_dist.sample() * frozen.config.scaling_factor
            inputs["bald"] = frozen.encode(bald).latent_dist.mode() * frozen.config.scaling_factor
        loss = _predicted(unet, noising, inputs, torch.float32)
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return {**Meter(setting).run(step, 1), "optimizer": name}


def _adamw_8bit(unet: nn.Module) -> tuple[torch.optim.Optimizer, str]:
    """bitsandbytes' AdamW; where it does not run, torch's, and the name says so: its state takes four times as much."""
    try:
        import bitsandbytes

        probe = nn.Parameter(torch.ones(8192, device=next(unet.parameters()).device))
        probe.grad = torch.ones_like(probe)
        bitsandbytes.optim.AdamW8bit([probe]).step()
    except (ImportError, RuntimeError, OSError, AttributeError, NotImplementedError) as error:
        return torch.optim.AdamW(unet.parameters(), lr=1e-6), f"torch AdamW in float32, as bitsandbytes does not run here: {error}"[:300]
    return bitsandbytes.optim.AdamW8bit(unet.parameters(), lr=1e-6, weight_decay=1e-2), f"bitsandbytes {bitsandbytes.__version__} AdamW8bit"


def adafactor_hooks(setting: Setting) -> dict[str, Any]:
    """The class of trainers that step transformers' Adafactor inside the backward pass: bfloat16 weights, stochastic rounding, cached."""
    from transformers import Adafactor

    device = setting.device
    unet = random_unet(setting.size, device, torch.bfloat16).train()
    unet.enable_gradient_checkpointing()

    def hook_of(parameter: nn.Parameter) -> Callable[[torch.Tensor], None]:
        master = nn.Parameter(torch.empty(0, device=device))
        optimizer = Adafactor([master], lr=1e-5, scale_parameter=False, relative_step=False, warmup_init=False)

        @torch.no_grad()
        def apply(_: torch.Tensor) -> None:
            assert parameter.grad is not None
            master.data, master.grad = parameter.detach().float(), parameter.grad.float()
            parameter.grad = None
            optimizer.step()
            parameter.copy_(stochastically_rounded(master.data, torch.randint(1 << 16, parameter.shape, device=device, dtype=torch.int32)))
            master.grad, master.data = None, torch.empty(0, device=device)

        return apply

    for parameter in unet.parameters():
        parameter.register_post_accumulate_grad_hook(hook_of(parameter))
    inputs = _inputs(setting, 1, torch.bfloat16)
    noising = NoiseSchedule(SCHEDULER)

    def step(_: int) -> float:
        loss = _predicted(unet, noising, inputs, torch.bfloat16)
        loss.backward()
        return float(loss.detach())

    return Meter(setting).run(step, 1)


def kernel_check(setting: Setting) -> dict[str, Any]:
    """Do the optimizer's kernels agree with their eager definition here?"""
    if setting.device.type != "cuda":
        return {"skipped": "no card; TRITON_INTERPRET=1 python benchmarks/lowmem_check.py"}
    rows = check(setting.device)
    return {"agrees": all(row["agrees"] for row in rows), "rows": rows}


ARMS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "kernel-check": kernel_check,
    "ours": ours,
    "reference-vae": lambda setting: reference(setting, vae=True),
    "ours-vae": lambda setting: ours(setting, vae=True),
    "ours-capped": capped,
    "adafactor-hooks": adafactor_hooks,
    "ours-b2": lambda setting: ours(setting, batch=2),
    "ours-b4": lambda setting: ours(setting, batch=4),
    "reference-cached": lambda setting: reference(setting, vae=False),
    "ours-eager": lambda setting: ours(setting, arithmetic="eager"),
    "ours-profile": profile,
}


@contextlib.contextmanager
def quiet_failure() -> Iterator[dict[str, Any]]:
    """Collects an arm's result; running out of memory is a result too."""
    result: dict[str, Any] = {}
    try:
        yield result
    except torch.OutOfMemoryError as error:
        result["failed"] = f"out of memory: {str(error).splitlines()[0]}"
