"""The Stage 2 loop: evaluate, preview, save, step, log, in that order, so that the first and last step are no special case.

Everything random is keyed by (seed, step): a run that was killed and resumed has the weights of one that never stopped.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from backend import artifacts, console
from backend import weights as pretrained
from backend.config import Config
from backend.errors import DeepHairError, UsageError
from backend.imaging.decode import write_png
from backend.training import checkpoints
from backend.training.data_processing.prompts import NEUTRAL_PROMPT
from backend.training.keyed import batches, numpy_generator, torch_generator, warmup_cosine
from backend.training.lowmem import FusedFactoredAdam
from backend.training.models import losses
from backend.training.models.perceptual import load_perceptual
from backend.training.models.schedule import NoiseSchedule
from backend.training.models.stage2_unet import Conditions, HairInpaintingUNet, load_start, load_unet, time_ids, unet_config
from backend.training.models.texture_encoder import load_texture_encoder
from backend.training.prepared import Prepared, reference_candidates
from backend.training.stage2_cache import CacheKey, LatentCache, build_latents, build_prompts
from backend.training.stage2_files import FORMAT, LATEST, PREFIX, log_path, log_rows, texture_encoder_path
from backend.tryon import conditioning
from backend.tryon.painter import device_and_dtype
from backend.tryon.sampling import Sampler, sample, scheduler_config

logger = logging.getLogger(__name__)

VALIDATION_TIMESTEPS = (50, 200, 400, 600, 800, 950)


@dataclass(frozen=True)
class Split:
    """The cached samples of one split with what is drawn from for each."""

    latents: LatentCache
    prompts: list[str]
    references: list[list[int]]


@dataclass(frozen=True)
class Batch:
    """One training batch on the device; latents are (B, 4, h, w) and scaled, masks (B, 1, h, w)."""

    photo: torch.Tensor
    mask: torch.Tensor
    bald: torch.Tensor
    excluded: torch.Tensor
    conditions: Conditions
    noise: torch.Tensor
    timesteps: torch.Tensor
    ids: list[str]


class Stage2Run:
    """One training run: networks, caches, optimizer and position."""

    def __init__(self, config: Config, digest: str) -> None:
        self.config, self.digest = config, digest
        self.device, _ = device_and_dtype(config)
        self.dtype = torch.bfloat16 if config.train.preset == "full-12gb" else torch.float32
        base = conditioning.inpainting_folder(config.paths.weights)
        prepared = Prepared(config.paths.processed)
        key = CacheKey.of(config, prepared, texture_encoder_path(config))
        prompts = {row["prompt"] for row in prepared.rows()} | {"", NEUTRAL_PROMPT}
        self.prompts = build_prompts(config, prompts, key, device=self.device, dtype=_encoder_dtype(self.device))
        self.vae = conditioning.load_vae(base, device=self.device, dtype=_encoder_dtype(self.device))
        self.splits = self._build_splits(prepared, key)
        self.schedule = scheduler_config(base)
        self.noising = NoiseSchedule(self.schedule)
        self.model = self._build_model(base)
        self.perceptual = load_perceptual(config.paths.weights)[0].to(self.device) if config.train.texture_every else None
        self.names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        self.optimizer = self._build_optimizer()
        self.step, self.resumed_at = 0, -1
        self.loss_first: float | None = None
        self.loss_last: float | None = None

    # ---- set-up ----

    def _build_splits(self, prepared: Prepared, key: CacheKey) -> dict[str, Split]:
        encoder = load_texture_encoder(texture_encoder_path(self.config)).to(self.device)
        splits = {}
        for name in ("train", "val"):
            rows = prepared.rows(name)
            latents = build_latents(self.config, prepared, name, key, self.vae, encoder)
            splits[name] = Split(latents, [row["prompt"] for row in rows], reference_candidates(rows))
        return splits

    def _build_model(self, base: Any) -> HairInpaintingUNet:
        torch.manual_seed(self.config.train.seed)  # the injector's initial weights
        model = HairInpaintingUNet(load_unet(base / "unet", self.dtype), self.config.train.style_tokens)
        if self.config.train.start is not None:
            load_start(model, self.config.train.start)
        model.unet.to(self.dtype)
        if self.config.train.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        return model.to(self.device).train()

    def _build_optimizer(self) -> torch.optim.Optimizer | FusedFactoredAdam:
        train = self.config.train
        rates: list[tuple[str, Any, float]] = [
            (name, parameter, train.injector_lr if name.startswith("injector.") else train.lr) for parameter, name in self.names.items()
        ]
        if train.preset == "full-12gb":
            return FusedFactoredAdam(rates, weight_decay=train.weight_decay, seed=train.seed)
        groups: dict[float, list[nn.Parameter]] = {}
        for _, parameter, rate in rates:
            groups.setdefault(rate, []).append(parameter)
        return torch.optim.AdamW(
            [{"params": parameters, "lr": rate, "base_lr": rate} for rate, parameters in groups.items()], weight_decay=train.weight_decay
        )

    # ---- the loop ----

    def train(self) -> None:
        """Runs from the current position to the last step."""
        train = self.config.train
        count = len(self.splits["train"].latents)
        epoch_steps = max(1, math.ceil(count / train.batch_size))
        progress = console.Progress("training", train.steps, unit="step")
        progress.start_at(self.step)
        stream = batches(count, train.batch_size, train.seed, self.step, train.steps)
        with console.stop_requests() as stop:
            while True:
                last = self.step == train.steps
                if self.step != self.resumed_at:
                    self._look_and_save(last, epoch_steps, stopping=stop.requested)
                if last:
                    break
                if stop.requested:
                    raise KeyboardInterrupt
                step, indices = next(stream)
                parts = self._train_step(step, indices)
                self.step = step + 1
                if self.step % train.log_every == 0 or self.step == train.steps:
                    self._log({"step": self.step, **parts, "samples_per_s": round(progress.rate() * train.batch_size, 3)})
                progress.update(note=f"loss {parts['loss']:.4f}")

    def _look_and_save(self, last: bool, epoch_steps: int, *, stopping: bool) -> None:
        """What happens between steps: evaluate, preview, save."""
        train = self.config.train
        if self.step % train.validate_every == 0 or last:
            self._validate()
        if train.preview_every and (self.step % train.preview_every == 0 or last):
            self._preview()
        if last or stopping or (self.step and self.step % train.save_every == 0):
            self._save(f"{PREFIX}_step_{self.step}")
        elif self.step and self.step % epoch_steps == 0:
            self._save(f"{PREFIX}_epoch_{self.step // epoch_steps}")

    def _train_step(self, step: int, indices: np.ndarray) -> dict[str, float]:
        train = self.config.train
        batch = self.batch("train", indices, step)
        factor = warmup_cosine(step, warmup=train.warmup, total=train.steps, floor=0.1) if train.warmup else 1.0
        if isinstance(self.optimizer, FusedFactoredAdam):
            self.optimizer.begin(step, factor)
        loss, parts = self._loss(batch, step)
        if not bool(torch.isfinite(loss)):
            raise DeepHairError(
                f"the loss is {float(loss.detach())} at step {step}; nothing of this step was applied (photos {', '.join(batch.ids)})",
                hint="the last checkpoint is intact: look at those photos, lower train.lr, and run again to go on from it",
                code="non_finite_loss",
            )
        loss.backward()
        if isinstance(self.optimizer, torch.optim.Optimizer):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {**parts, "lr": train.lr * factor}

    def _loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        train = self.config.train
        noisy, prediction = self._predict(batch)
        weight = self.noising.min_snr_weight(batch.timesteps, train.min_snr_gamma)
        target = self.noising.target(batch.photo, batch.noise, batch.timesteps)
        loss = losses.mask_aware_loss(
            prediction, target, batch.mask, batch.excluded, outside_weight=train.outside_weight, sample_weight=weight
        )
        parts = {"loss_mask": float(loss.detach())}
        if train.texture_every and step % train.texture_every == 0:
            texture = self._texture_loss(batch, noisy, prediction, step)
            if texture is not None:
                parts["loss_texture"] = float(texture.detach())
                loss = loss + train.texture_weight * texture
        return loss, {"loss": float(loss.detach()), **parts}

    def _predict(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        noisy = self.noising.add_noise(batch.photo, batch.noise, batch.timesteps).to(self.dtype)
        ids = time_ids(len(batch.ids), self.config.data.resolution).to(self.device, self.dtype)
        conditions = batch.conditions.to(self.device, self.dtype)
        prediction = self.model(noisy, batch.mask.to(self.dtype), batch.bald.to(self.dtype), batch.timesteps, conditions, ids)
        return noisy.float(), prediction.float()

    def _texture_loss(self, batch: Batch, noisy: torch.Tensor, prediction: torch.Tensor, step: int) -> torch.Tensor | None:
        """Gram loss on a decoded crop of the predicted clean latents, for the batch's samples at low timesteps; None without one."""
        if self.perceptual is None:
            return None
        low = batch.timesteps < self.config.train.texture_max_timestep
        if not bool(low.any()):
            return None
        clean = self.noising.predicted_x0(noisy[low], prediction[low], batch.timesteps[low])
        mask = batch.mask[low] * (1 - batch.excluded[low])
        top, left = _densest_window(mask, self.config.train.texture_crop)
        window = np.s_[:, :, top : top + self.config.train.texture_crop, left : left + self.config.train.texture_crop]
        image = conditioning.decode_latents(self.vae, clean[window])
        with torch.no_grad():
            target = conditioning.decode_latents(self.vae, batch.photo[low][window])
        area = torch.nn.functional.interpolate(mask[window], image.shape[-2:])
        return losses.texture_consistency_loss(self.perceptual, image.float(), target.float(), area)

    # ---- data ----

    def batch(self, split: str, indices: np.ndarray, step: int, timestep: int | None = None) -> Batch:
        """The samples ``indices`` with every draw keyed by (seed, split, step); a fixed ``timestep`` makes it a validation batch."""
        train, data = self.config.train, self.splits[split]
        rng = numpy_generator(train.seed, f"draws/{split}", step)
        generator = torch_generator(train.seed, f"noise/{split}", step)
        texts, pooled, references = [], [], []
        variants = rng.integers(train.mask_variants, size=len(indices))
        dropped = (
            rng.random((4, len(indices))) < np.array([[train.drop.text], [train.drop.style], [train.drop.identity], [train.drop.all]])
        ) & (timestep is None)
        drop_text, drop_style, drop_identity, drop_all = dropped
        for row, index in enumerate(int(i) for i in indices):
            others = data.references[index] if train.reference == "other" else []
            references.append(int(others[int(rng.integers(len(others)))]) if others else index)
            # Serving with a reference says the neutral prompt, guidance the empty one: training meets both.
            unsaid = NEUTRAL_PROMPT if rng.random() < 0.5 else ""
            text, text_pooled = self.prompts.get("" if drop_all[row] else unsaid if drop_text[row] else data.prompts[index])
            texts.append(text)
            pooled.append(text_pooled)
        own = np.asarray(indices, np.int64)
        every, chosen = torch.arange(len(own)), torch.from_numpy(variants)
        mean = data.latents.take("photo_mean", own).float()
        photo = mean + data.latents.take("photo_std", own).float() * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        if train.noise_offset:
            noise = noise + train.noise_offset * torch.randn(mean.shape[0], mean.shape[1], 1, 1, generator=generator)
        drawn = torch.randint(0, self.noising.steps, (len(indices),), generator=generator)
        timesteps = drawn if timestep is None else torch.full_like(drawn, timestep)
        conditions = Conditions(
            torch.stack(texts), torch.stack(pooled),
            data.latents.take("style", np.array(references, np.int64)).float(), torch.from_numpy(~(drop_style | drop_all)),
            data.latents.take("identity", own).float(),
            data.latents.take("identity_valid", own).view(-1).bool() & torch.from_numpy(~(drop_identity | drop_all)),
        )  # fmt: skip
        here = self.device
        return Batch(
            photo.to(here), data.latents.take("mask", own)[every, chosen].float().to(here),
            data.latents.take("bald", own)[every, chosen].float().to(here), data.latents.take("excluded", own).float().to(here),
            conditions, noise.to(here), timesteps.to(here), [data.latents.ids[int(i)] for i in indices],
        )  # fmt: skip

    # ---- measuring ----

    @torch.no_grad()
    def _validate(self) -> None:
        """The loss on fixed photos, timesteps and noise of heads that are not trained on."""
        count = min(self.config.train.validation_samples, len(self.splits["val"].latents))
        chosen = np.linspace(0, len(self.splits["val"].latents) - 1, count).round().astype(int)
        size, total = max(self.config.train.batch_size, 4), 0.0
        for number, timestep in enumerate(VALIDATION_TIMESTEPS):
            for start in range(0, count, size):
                part = chosen[start : start + size]
                batch = self.batch("val", part, number * count + start, timestep)
                _, prediction = self._predict(batch)
                target = self.noising.target(batch.photo, batch.noise, batch.timesteps)
                loss = losses.mask_aware_loss(
                    prediction, target, batch.mask, batch.excluded, outside_weight=self.config.train.outside_weight
                )
                total += float(loss) * len(part)
        self.loss_last = total / (count * len(VALIDATION_TIMESTEPS))
        if self.loss_first is None:
            self.loss_first = self.loss_last
        self._log({"step": self.step, "validation_loss": self.loss_last})
        logger.info("step %d: validation loss %.4f (%d photos of unseen heads)", self.step, self.loss_last, count)

    @torch.no_grad()
    def _preview(self) -> None:
        """A strip of four validation heads at fixed seeds, painted by the live modules: reference's cached style, bald, result."""
        count = min(4, len(self.splits["val"].latents))
        chosen = np.linspace(0, len(self.splits["val"].latents) - 1, count).round().astype(int)
        batch = self.batch("val", chosen, 0, 0)
        bald, photo = (conditioning.to_pictures(conditioning.decode_latents(self.vae, latents)) for latents in (batch.bald, batch.photo))
        regions = [
            cv2.resize(m[0].cpu().numpy().astype(np.uint8) * 255, bald[0].shape[:2], interpolation=cv2.INTER_NEAREST) for m in batch.mask
        ]
        heads = [
            conditioning.HeadInput(region.astype(np.uint8), picture, np.zeros_like(picture))
            for region, picture in zip(regions, bald, strict=True)
        ]
        empty_text, empty_pooled = self.prompts.get("")
        sampler = Sampler(self.model.eval(), self.vae, self.schedule, empty_text[None], empty_pooled[None])
        steps, guidance = min(20, self.config.sample.steps), self.config.sample.guidance
        painted = conditioning.to_pictures(sample(sampler, heads, batch.conditions, seeds=range(count), steps=steps, guidance=guidance))
        self.model.train()
        grid = np.vstack([np.hstack(row) for row in (photo, bald, painted)])
        write_png(self.config.paths.checkpoints / "previews" / f"step_{self.step:07d}.png", grid)

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
        self.model.load_state_dict(found.weights)
        if isinstance(self.optimizer, FusedFactoredAdam):
            self.optimizer.restore(found.optimizer)
        else:
            checkpoints.restore_optimizer(self.optimizer, self.names, found.optimizer)
        self.step = self.resumed_at = int(found.position["step"])
        self.loss_first, self.loss_last = found.position["loss_first"], found.position["loss_last"]
        self._trim_log()
        logger.info("going on from %s", found.weights_path.name)

    def result(self) -> dict[str, Any]:
        """What the report says of this stage."""
        return {"steps": self.step, "loss_first": self.loss_first, "loss_last": self.loss_last}

    def _save(self, name: str) -> None:
        folder, config = self.config.paths.checkpoints, self.config
        states = (
            self.optimizer.tensors()
            if isinstance(self.optimizer, FusedFactoredAdam)
            else checkpoints.optimizer_tensors(self.optimizer, self.names)
        )
        header = {
            "format": FORMAT, "step": self.step, "run": self.digest, "config": config.resolved(), "unet_config": unet_config(self.model.unet),
            "style_tokens": config.train.style_tokens, "preset": config.train.preset, "weights": pretrained.describe(config.paths.weights),
            "result": self.result(),
        }  # fmt: skip
        saved = checkpoints.save(
            folder, name, weights=self.model.state_dict(), optimizer=states,
            position={"step": self.step, "loss_first": self.loss_first, "loss_last": self.loss_last}, header=header,
        )  # fmt: skip
        checkpoints.link(saved, LATEST)
        checkpoints.prune(folder, PREFIX, config.train.keep)

    def _log(self, row: dict[str, Any]) -> None:
        path = log_path(self.config)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, sort_keys=True) + "\n")

    def _trim_log(self) -> None:
        """Drops the lines of steps that a kill threw away; they come again."""
        kept = [row for row in log_rows(self.config) if row["step"] <= self.step]
        artifacts.write_text(log_path(self.config), "".join(json.dumps(r, sort_keys=True) + "\n" for r in kept))


def _encoder_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _densest_window(mask: torch.Tensor, side: int) -> tuple[int, int]:
    """Top-left corner of the window of ``side`` latents that the batch's masks fill most. mask (B, 1, h, w)."""
    filled = torch.nn.functional.avg_pool2d(mask.float().mean(dim=0, keepdim=True), side, stride=1)[0, 0]
    return divmod(int(filled.argmax()), filled.shape[1])


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
