"""The Stage 2 loop: evaluate, preview, save, step, log, in that order, so that the first and last step are no special case.

Everything random is keyed by (seed, step): a run that was killed and resumed has the weights of one that never stopped.
"""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import cv2
import numpy as np
import torch

from backend import console
from backend import weights as pretrained
from backend.config import Config
from backend.errors import MissingInputError, UsageError
from backend.imaging.decode import write_png
from backend.training import checkpoints, presets
from backend.training.data_processing.prompts import NEUTRAL_PROMPT
from backend.training.device_memory import held_bytes, peak_gib
from backend.training.evenly import evenly
from backend.training.keyed import batches
from backend.training.lowmem import FusedFactoredAdam
from backend.training.models.perceptual import load_perceptual
from backend.training.models.schedule import NoiseSchedule
from backend.training.models.stage2_unet import HairInpaintingUNet, load_start, load_unet, unet_config
from backend.training.models.texture_encoder import load_texture_encoder
from backend.training.prefetch import ahead
from backend.training.prepared import Pictures, Prepared, reference_candidates, thinned
from backend.training.processes import Processes, join_processes
from backend.training.sharding import gathered
from backend.training.stage2_cache import CacheKey, build_latents, build_prompts, require_room
from backend.training.stage2_data import Batch, Batches, Split
from backend.training.stage2_files import FORMAT, LATEST, PREFIX, texture_encoder_path
from backend.training.stage2_log import TrainingLog
from backend.training.stage2_step import Stage2Step, build_optimizer, ready_for_training, weights_dtype
from backend.training.stage2_weights import MovingAverage, checkpoint_tensors, restore, trained
from backend.tryon import conditioning
from backend.tryon.sampling import Sampler, sample, scheduler_config

logger = logging.getLogger(__name__)

VALIDATION_POOL = 4  # times train.validation_samples: a larger validation split is thinned
VALIDATION_TIMESTEPS = (50, 200, 400, 600, 800, 950)


class Stage2Run:
    """One training run: networks, caches, optimizer and position."""

    def __init__(self, config: Config, digest: str, processes: Processes | None = None) -> None:
        self.config, self.digest = config, digest
        self.processes = processes or join_processes(config.device)
        self.device = self.processes.device
        if self.processes.count > 1 and presets.of(config.train).inside_backward:
            raise UsageError(
                f"train.preset {config.train.preset} steps inside the backward pass and cannot average over {self.processes.count} processes",
                hint="start one process, or take preset lora, partial or full-80gb",
            )
        if self.processes.count > 1 and config.train.compile:
            raise UsageError(f"train.compile is for one process, there are {self.processes.count}", hint="train.compile=false")
        base = conditioning.inpainting_folder(config.paths.weights)
        prepared = self.prepared = Prepared(config.paths.processed)
        key = CacheKey.of(config, prepared, texture_encoder_path(config))
        rows = self._rows(prepared)
        prompts = {row["prompt"] for chosen in rows.values() for row in chosen} | {"", NEUTRAL_PROMPT}
        dtype = conditioning.encoder_dtype(self.device)
        with self.processes.first_one_first():
            require_room(config, rows, self._variants(rows), key, prompts, dtype.itemsize)
            self.prompts = build_prompts(config, prompts, key, device=self.device, dtype=dtype)
            self.vae = conditioning.load_vae(base, device=self.device, dtype=dtype)
            self.splits = self._build_splits(prepared, rows, key)
        self.schedule = scheduler_config(base)
        noising = NoiseSchedule(self.schedule)
        self.batches = Batches(config.train, self.splits, self.prompts, timesteps=noising.steps, device=self.device)
        self.model = self._build_model(base)
        self.names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        self.optimizer = build_optimizer(self.model, config.train, processes=self.processes)
        train = config.train
        keep = self.processes.is_main
        self.average = MovingAverage(trained(self.model), decay=train.ema, every=train.ema_every, keep=keep) if train.ema else None
        perceptual = load_perceptual(config.paths.weights)[0].to(self.device) if config.train.texture_every else None
        self.train_step = Stage2Step(
            config, self.model, self.optimizer, noising, vae=self.vae, perceptual=perceptual, processes=self.processes
        )
        self.log = TrainingLog(config, self.device, keep=self.processes.is_main)
        self.step, self.resumed_at = 0, -1
        self.loss_first: float | None = None
        self.loss_last: float | None = None

    # ---- set-up ----

    def _rows(self, prepared: Prepared) -> dict[str, list[dict[str, Any]]]:
        """Which photos of each split this run looks at. At the size of the released set it draws fewer than there are, and encoding one takes
        longer than training on it."""
        found = {name: prepared.rows(name) for name in ("train", "val")}
        for name, rows in found.items():
            if not rows:
                raise MissingInputError(f"the {name} split has no photo", hint="prepare more photos, or change data.split")
        train = self.config.train
        found["train"] = thinned(found["train"], train.steps * self._samples_per_step)
        if len(found["val"]) > VALIDATION_POOL * train.validation_samples:
            found["val"] = thinned(found["val"], 2 * train.validation_samples)
        return found

    def _variants(self, rows: dict[str, list[dict[str, Any]]]) -> int:
        """Edit regions of each photo: no more than the times that it is drawn, about."""
        each = round(self.config.train.steps * self._samples_per_step / len(rows["train"]))
        return min(self.config.train.mask_variants, max(1, each))

    def _build_splits(self, prepared: Prepared, rows: dict[str, list[dict[str, Any]]], key: CacheKey) -> dict[str, Split]:
        config = self.config
        encoder = load_texture_encoder(texture_encoder_path(config)).to(self.device)
        variants, splits = self._variants(rows), {}
        for name, chosen in rows.items():
            latents = build_latents(config, prepared, name, chosen, variants, key, self.vae, encoder)
            splits[name] = Split(latents, [row["prompt"] for row in chosen], reference_candidates(chosen), Pictures(prepared, chosen))
        return splits

    def _build_model(self, base: Any) -> HairInpaintingUNet:
        torch.manual_seed(self.config.train.seed)  # the injector's initial weights
        train = self.config.train
        model = HairInpaintingUNet(load_unet(base / "unet", weights_dtype(train.preset)), train.style_tokens, train.injection)
        if train.start is not None:
            load_start(model, train.start)
        return ready_for_training(model, train, self.device, self.processes)

    # ---- the loop ----

    def train(self) -> None:
        """Runs from the current position to the last step."""
        train = self.config.train
        count, size = len(self.splits["train"].latents), self._samples_per_step
        epoch_steps = max(1, math.ceil(count / size))
        progress = console.Progress("training", train.steps, unit="step")
        progress.start_at(self.step)
        stream = batches(count, size, train.seed, self.step, train.steps)
        # On a CPU a second thread of torch's takes the cores from the step itself: the demo took 129 s with it, 73 s without.
        workers = train.prefetch if self.device.type == "cuda" else 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # building the caches took memory of its own
            logger.info("the first step builds its kernels, which can take a minute%s", "; compiling, another" if train.compile else "")
        drawing = ahead(self._drawn, stream, workers=workers)
        with contextlib.closing(self.log), contextlib.closing(drawing) as drawn, console.stop_requests() as stop:
            while True:
                last = self.step == train.steps
                stopping = self.processes.any_of(stop.requested)
                if self.step != self.resumed_at:
                    self._look_and_save(last, epoch_steps, stopping=stopping)
                if last:
                    break
                if stopping:
                    raise KeyboardInterrupt
                step, batch = next(drawn)
                parts = self.train_step(batch, step)
                self.step = step + 1
                if self.average is not None:
                    self.average.update(self.step)
                if self.step % train.log_every == 0 or self.step == train.steps:
                    self.log.write({"step": self.step, **parts, "samples_per_s": round(progress.rate() * size, 3)})
                progress.update(note=f"loss {parts['loss']:.4f}, {peak_gib(self.device):.1f} GiB")

    def _drawn(self, item: tuple[int, np.ndarray]) -> tuple[int, Batch]:
        step, indices = item
        return step, self.batches.batch("train", indices, step, rows=self.processes.rows(len(indices)))

    def _look_and_save(self, last: bool, epoch_steps: int, *, stopping: bool) -> None:
        """What happens between steps: evaluate, preview, save. The first process does it; the others help where weights are spread."""
        train = self.config.train
        if not (self.processes.is_main or presets.sharded(train, self.processes.count)):
            return
        if self.step % train.validate_every == 0 or last:
            self._validate()
        if train.preview_every and (self.step % train.preview_every == 0 or last):
            self._preview()
        if last or stopping or (self.step and self.step % train.save_every == 0):
            self._save(f"{PREFIX}_step_{self.step}")
        elif self.step and self.step % epoch_steps == 0:
            self._save(f"{PREFIX}_epoch_{self.step // epoch_steps}")

    @property
    def _samples_per_step(self) -> int:
        """Of all processes together."""
        return self.config.train.batch_size * self.config.train.accumulate * self.processes.count

    # ---- measuring ----

    @torch.no_grad()
    def _validate(self) -> None:
        """The loss on fixed photos, timesteps and noise of heads that are not trained on."""
        count = min(self.config.train.validation_samples, len(self.splits["val"].latents))
        chosen = evenly(len(self.splits["val"].latents), count)
        size, total = max(self.config.train.batch_size, 4), 0.0
        for number, timestep in enumerate(VALIDATION_TIMESTEPS):
            for start in range(0, count, size):
                part = chosen[start : start + size]
                batch = self.batches.batch("val", part, number * count + start, timestep)
                total += float(self.train_step.validation_loss(batch)) * len(part)
        self.loss_last = total / (count * len(VALIDATION_TIMESTEPS))
        if self.loss_first is None:
            self.loss_first = self.loss_last
        self.log.write({"step": self.step, "validation_loss": self.loss_last})
        logger.info("step %d: validation loss %.4f (%d photos of unseen heads)", self.step, self.loss_last, count)

    @torch.no_grad()
    def _preview(self) -> None:
        """Four validation heads at fixed seeds, painted one at a time by the live modules: above the photo, then bald, then the result."""
        empty_text, empty_pooled = self.prompts.get("")
        sampler = Sampler(self.model.eval(), self.vae, self.schedule, empty_text[None], empty_pooled[None])
        steps, guidance = min(20, self.config.sample.steps), self.config.sample.guidance
        count = min(4, len(self.splits["val"].latents))
        columns = []
        for seed, index in enumerate(evenly(len(self.splits["val"].latents), count)):
            batch = self.batches.batch("val", np.array([index]), seed, 0)
            photo, bald = (
                conditioning.to_pictures(conditioning.decode_latents(self.vae, latents))[0] for latents in (batch.photo, batch.bald)
            )
            mask = batch.mask[0, 0].cpu().numpy().astype(np.uint8) * 255
            region = cv2.resize(mask, bald.shape[:2], interpolation=cv2.INTER_NEAREST).astype(np.uint8)
            head = conditioning.HeadInput(region, bald, np.zeros_like(bald))
            painted = sample(sampler, [head], batch.conditions, seeds=[seed], steps=steps, guidance=guidance)
            columns.append(np.vstack([photo, bald, conditioning.to_pictures(painted)[0]]))
        self.model.train()
        if not self.processes.is_main:
            return
        write_png(self.config.paths.checkpoints / "previews" / f"step_{self.step:07d}.png", np.hstack(columns))

    # ---- position ----

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one. Raises UsageError when it was made with other settings or data."""
        found = checkpoints.newest(self.config.paths.checkpoints, PREFIX)
        if found is None:
            return
        if found.header.get("run") != self.digest:
            raise UsageError(
                f"{found.weights_path.name} was trained with other settings, data or Stage 1 encoder{_differences(found.header, self.config)}",
                hint="restore those, or start over in a new folder: paths.checkpoints=FOLDER",
            )
        size = self._samples_per_step
        if (before := found.position.get("samples_per_step", size)) != size:
            raise UsageError(
                f"{found.weights_path.name} was trained with {before} samples per step, {self.processes.count} processes make it {size} now",
                hint="start as many processes as before; with another number the run would take other samples",
            )
        states = restore(self.model, self.average, found.weights, found.optimizer)
        if isinstance(self.optimizer, FusedFactoredAdam):
            self.optimizer.restore(states)
        else:
            checkpoints.restore_optimizer(self.optimizer, self.names, states)
        self.step = self.resumed_at = int(found.position["step"])
        self.loss_first, self.loss_last = found.position["loss_first"], found.position["loss_last"]
        self.log.resume(self.step)
        logger.info("going on from %s", found.weights_path.name)

    def result(self) -> dict[str, Any]:
        """What the report says of this stage."""
        return {"steps": self.step, "loss_first": self.loss_first, "loss_last": self.loss_last}

    def held(self) -> dict[str, int]:
        """Bytes on the device: the trained network's, the optimizer's state, and the allocator's peak since ``train`` began."""
        states = self._optimizer_tensors()
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return {
            "weights": held_bytes(self.model.parameters(), self.device), "optimizer": held_bytes(states.values(), self.device), "peak": peak,
        }  # fmt: skip

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        if isinstance(self.optimizer, FusedFactoredAdam):
            return self.optimizer.tensors()
        return checkpoints.optimizer_tensors(self.optimizer, self.names)

    def _save(self, name: str) -> None:
        folder, config = self.config.paths.checkpoints, self.config
        states = gathered(self._optimizer_tensors(), keep=self.processes.is_main)
        weights, resume = checkpoint_tensors(self.model, self.average, keep=self.processes.is_main)
        if not self.processes.is_main:
            return
        header = {
            "format": FORMAT, "step": self.step, "run": self.digest, "config": config.resolved(), "unet_config": unet_config(self.model.unet),
            "style_tokens": config.train.style_tokens, "injection": config.train.injection,
            "data_digest": self.prepared.digest, "preset": config.train.preset, "weights": pretrained.describe(config.paths.weights),
            "result": self.result(),
        }  # fmt: skip
        saved = checkpoints.save(
            folder, name, weights=weights, optimizer={**states, **resume},
            position={
                "step": self.step, "loss_first": self.loss_first, "loss_last": self.loss_last, "samples_per_step": self._samples_per_step,
            }, header=header,
        )  # fmt: skip
        checkpoints.link(saved, LATEST)
        checkpoints.prune(folder, PREFIX, config.train.keep)


def _differences(header: dict[str, Any], config: Config) -> str:
    """The settings of data and train in which a checkpoint differs from now, in brackets; empty when none does."""
    then, now = header.get("config", {}), config.resolved()
    found = [
        f"{section}.{key}: {then.get(section, {}).get(key)} -> {value}"
        for section in ("data", "train")
        for key, value in now[section].items()
        if then.get(section, {}).get(key) != value and key not in ("images", "labels", "workers")
    ]
    return f" ({'; '.join(found)})" if found else ""
