"""One step of Stage 2: prediction, losses, backward pass, update. It knows no files, so benchmarks drive it as the loop does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from backend.config import Config, TrainConfig
from backend.errors import DeepHairError
from backend.training import presets
from backend.training.keyed import warmup_cosine
from backend.training.lowmem import Arithmetic, FusedFactoredAdam
from backend.training.lowmem_gathered import GatheredFactoredAdam
from backend.training.models import losses
from backend.training.models.perceptual import PerceptualNet
from backend.training.models.schedule import NoiseSchedule
from backend.training.models.stage2_unet import HairInpaintingUNet, time_ids
from backend.training.offload import stream
from backend.training.processes import Processes
from backend.training.sharding import clip_grad_norm, shard
from backend.training.stage2_data import Batch
from backend.training.stage2_weights import choose_trained, trained
from backend.tryon import conditioning

Optimizer = torch.optim.Optimizer | FusedFactoredAdam


def weights_dtype(preset: str) -> torch.dtype:
    """What a preset keeps the UNet's weights in while training."""
    return torch.bfloat16 if presets.PRESETS[preset].bf16 else torch.float32


def ready_for_training(
    model: HairInpaintingUNet, train: TrainConfig, device: torch.device, processes: Processes | None = None
) -> HairInpaintingUNet:
    """The network in the preset's precision on the device, frozen where the preset does not train; the injector stays in float32.

    processes: several spread the weights of a preset that is ``sharded`` over them. Where the preset is ``offloaded`` the UNet's weights
    stay in host memory.
    """
    model.unet.to(weights_dtype(train.preset))
    choose_trained(model, train)
    if train.gradient_checkpointing:
        model.enable_gradient_checkpointing(reentrant=presets.of(train).inside_backward)
    count = 1 if processes is None else processes.count
    if presets.offloaded(train, device, count):
        stream(model.unet, device)
        model.injector.to(device)
        return model.train()
    if processes is not None and presets.sharded(train, count):
        shard(model.unet, processes)
    model.to(device)
    if train.compile:
        model.unet.compile_repeated_blocks()
    return model.train()


def build_optimizer(model: nn.Module, train: TrainConfig, arithmetic: Arithmetic = "auto", processes: Processes | None = None) -> Optimizer:
    """The preset's optimizer over all that it trains, the injector's with a rate of its own."""
    preset = presets.of(train)
    rates: list[tuple[str, nn.Parameter, float]] = [
        (name, parameter, train.injector_lr if name.startswith("injector.") else train.lr) for name, parameter in trained(model).items()
    ]
    if preset.inside_backward:
        return FusedFactoredAdam(
            rates, weight_decay=train.weight_decay, seed=train.seed, momentum=preset.momentum, arithmetic=arithmetic,
            clip_norm=train.clip_norm if train.clipping == "previous-norm" else None,
        )  # fmt: skip
    if not preset.adamw:
        return GatheredFactoredAdam(
            rates, weight_decay=train.weight_decay, seed=train.seed, clip_norm=train.clip_norm, accumulate=train.accumulate,
            processes=processes, arithmetic=arithmetic,
        )  # fmt: skip
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter, rate in rates:  # the injector by itself: spread or offloaded and other parameters do not go into one operation
        groups.setdefault((rate, name.startswith("injector.")), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "base_lr": rate} for (rate, _), parameters in groups.items()], weight_decay=train.weight_decay
    )


class Stage2Step:
    """The networks and the optimizer of a run. perceptual: None where there is no texture loss; vae decodes for it."""

    def __init__(
        self,
        config: Config,
        model: HairInpaintingUNet,
        optimizer: Optimizer,
        noising: NoiseSchedule,
        *,
        vae: Any,
        perceptual: PerceptualNet | None,
        processes: Processes | None = None,
    ) -> None:
        self.config, self.model, self.optimizer, self.noising = config, model, optimizer, noising
        self._vae, self._perceptual, self._processes = vae, perceptual, processes
        self._autocast = presets.of(config.train).autocast
        self._device, self._dtype = model.device, next(model.unet.parameters()).dtype
        self._time_ids: dict[int, torch.Tensor] = {}

    def __call__(self, batch: Batch, step: int) -> dict[str, float]:
        """Trains on a batch as the 0-based ``step`` and returns the loss, its parts and the learning rate.

        The batch is taken in ``train.accumulate`` equal parts one after the other. Raises DeepHairError, with nothing of the step
        applied, when the loss is not finite.
        """
        train = self.config.train
        factor = warmup_cosine(step, warmup=train.warmup, total=train.steps, floor=0.1) if train.warmup else 1.0
        if isinstance(self.optimizer, FusedFactoredAdam):
            self.optimizer.begin(step, factor)
        total, sums = 0.0, dict[str, float]()
        for micro in batch.split(train.accumulate):
            loss, parts = self.loss(micro, step)
            if not bool(torch.isfinite(loss)):
                raise DeepHairError(
                    f"the loss is {float(loss.detach())} at step {step}; nothing of this step was applied (photos {', '.join(micro.ids)})",
                    hint="the last checkpoint is intact: look at those photos, lower train.lr, and run again to go on from it",
                    code="non_finite_loss",
                )
            self._backward(loss)
            total += float(loss.detach()) / train.accumulate
            for name, part in parts.items():
                sums[name] = sums.get(name, 0.0) + float(part) / train.accumulate
        self._update(factor)
        return {"loss": total, **sums, "lr": train.lr * factor}

    def _backward(self, loss: torch.Tensor) -> None:
        if isinstance(self.optimizer, FusedFactoredAdam):
            loss.backward()  # the optimizer takes the gradients as they come and knows of the parts
        else:
            (loss / self.config.train.accumulate).backward()

    def _update(self, factor: float) -> None:
        if isinstance(self.optimizer, FusedFactoredAdam):
            self.optimizer.end()
            return
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"] if parameter.grad is not None]
        if self._processes is not None:  # what is spread was averaged when it was gathered
            self._processes.average(parameter.grad for parameter in parameters if not isinstance(parameter, DTensor))
        clip_grad_norm(parameters, self.config.train.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The training loss of a batch, a scalar with gradient, and its parts."""
        train = self.config.train
        noisy, prediction = self.predict(batch)
        weight = self.noising.min_snr_weight(batch.timesteps, train.min_snr_gamma)
        target = self.noising.target(batch.photo, batch.noise, batch.timesteps)
        loss = losses.mask_aware_loss(
            prediction, target, batch.mask, batch.excluded, outside_weight=train.outside_weight, sample_weight=weight
        )
        parts = {"loss_mask": loss.detach()}
        if train.texture_every and step % train.texture_every == 0:
            texture = self._texture_loss(batch, noisy, prediction)
            if texture is not None:
                parts["loss_texture"] = texture.detach()
                loss = loss + train.texture_weight * texture
        return loss, parts

    def validation_loss(self, batch: Batch) -> torch.Tensor:
        """MaskAwareLoss alone, unweighted: a scalar, the mean over the batch."""
        _, prediction = self.predict(batch)
        target = self.noising.target(batch.photo, batch.noise, batch.timesteps)
        return losses.mask_aware_loss(prediction, target, batch.mask, batch.excluded, outside_weight=self.config.train.outside_weight)

    def predict(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The noisy latents and what the network predicts of them, both (B, 4, h, w) float32."""
        count = len(batch.ids)
        if count not in self._time_ids:
            self._time_ids[count] = time_ids(count, self.config.data.resolution).to(self._device, self._dtype)
        noisy = self.noising.add_noise(batch.photo, batch.noise, batch.timesteps).to(self._dtype)
        conditions = batch.conditions.to(self._device, self._dtype)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            prediction = self.model(
                noisy, batch.mask.to(self._dtype), batch.bald.to(self._dtype), batch.timesteps, conditions, self._time_ids[count]
            )
        return noisy.float(), prediction.float()

    def _texture_loss(self, batch: Batch, noisy: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor | None:
        """Gram loss between a decoded square of the predicted clean latents and the photo's own pixels there, inside its hair, for the
        batch's samples at low timesteps; None without one. The photo is not decoded from its latents: what the autoencoder lost of its
        texture would not be asked for."""
        if self._perceptual is None or batch.textures is None:
            return None
        low = (batch.timesteps < self.config.train.texture_max_timestep).nonzero()[:, 0]
        if not len(low):
            return None
        clean, side = self.noising.predicted_x0(noisy[low], prediction[low], batch.timesteps[low]), self.config.train.texture_crop
        corners = [batch.textures.corners[row] for row in low.tolist()]
        squares = [latents[:, top : top + side, left : left + side] for latents, (top, left) in zip(clean, corners, strict=True)]
        picture, hair, each = batch.textures.picture[low], batch.textures.hair[low], []
        if not self.config.train.gradient_checkpointing:
            return self._gram_loss(torch.stack(squares), picture, hair)
        for row, square in enumerate(squares):  # one sample's activations at a time; the mean over samples is that of all together
            part = slice(row, row + 1)
            each.append(checkpoint(self._gram_loss, square[None], picture[part], hair[part], use_reentrant=False))
        return torch.stack(each).mean()

    def _gram_loss(self, squares: torch.Tensor, picture: torch.Tensor, hair: torch.Tensor) -> torch.Tensor:
        assert self._perceptual is not None
        image = conditioning.decode_latents(self._vae, squares)
        return losses.texture_consistency_loss(self._perceptual, image.float(), picture, hair)
