"""The trainers that people use today as arms of benchmarks/stage2_gpu.py, on the same random networks; written here, not fetched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from backend.training.lowmem import stochastically_rounded
from backend.training.models.schedule import NoiseSchedule
from backend.training.models.stage2_unet import time_ids
from benchmarks.stage2_meter import Meter, Setting
from benchmarks.stage2_parts import SCHEDULER, SyntheticPrompts, random_pictures, random_unet, random_vae


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
