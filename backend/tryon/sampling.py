"""Denoising with the live modules: diffusers' SDXL inpaint pipeline around our UNet, used by previews, evaluation and serving alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backend.errors import InvalidArtifactError
from backend.training.keyed import torch_generator
from backend.training.models.stage2_unet import Conditions, HairInpaintingUNet
from backend.tryon.conditioning import HeadInput, decode_latents, encode_latents, mask_tensor, null_conditions, to_tensor
from backend.tryon.few_step import Kind
from backend.tryon.few_step import scheduler as scheduler_of
from backend.tryon.placement import STAYS, Placement
from backend.tryon.steering import SteeredUNet
from backend.tryon.values import Cancelled


@dataclass(frozen=True)
class Sampler:
    """The modules that sampling needs, none of them copied. empty_text (1, 77, D), empty_pooled (1, P): the encoded empty prompt.

    controlnet: None, or one that adds its residuals ``controlnet_scale`` times. few_step: whose LoRA is fused into the UNet, if any; it
    chooses the sampler. placement: when the networks are on the card.
    """

    model: HairInpaintingUNet
    vae: Any
    scheduler_config: dict[str, Any]
    empty_text: torch.Tensor
    empty_pooled: torch.Tensor
    controlnet: Any = None
    controlnet_scale: float = 1.0
    few_step: Kind | None = None
    placement: Placement = STAYS


def scheduler_config(inpainting: Path) -> dict[str, Any]:
    """The sampling schedule that the base model ships. Raises InvalidArtifactError when it is missing."""
    from diffusers import EulerDiscreteScheduler

    try:
        config: dict[str, Any] = dict(EulerDiscreteScheduler.load_config(inpainting / "scheduler", local_files_only=True))
    except (OSError, ValueError) as error:
        raise InvalidArtifactError(f"the scheduler in {inpainting / 'scheduler'} cannot be read: {error}") from error
    return config


def initial_noise(seeds: Sequence[int], side: int) -> torch.Tensor:
    """Start noise (B, 4, side, side) float32, one generator per picture, so that a picture does not depend on its batch."""
    return torch.stack([torch.randn(4, side, side, generator=torch_generator(seed, "start noise")) for seed in seeds])


@torch.no_grad()
def sample(
    sampler: Sampler,
    heads: Sequence[HeadInput],
    conditions: Conditions,
    *,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    strength: float = 1.0,
    photos: Sequence[NDArray[np.uint8]] = (),
    on_step: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Paints hair: (B, 3, S, S) in [-1, 1] float32, on the model's device.

    conditions: B rows. seeds: one per head. guidance: classifier-free guidance, 1 is off. strength: 1 begins with noise alone; less
    begins that share of the steps before the end, with ``photos`` (B of (S, S, 3) uint8 RGB) noised to that point (SDEdit,
    arXiv 2108.01073), and makes one step at least; not with a few-step LoRA. on_step(done, total) is called after each step; ``cancelled``
    is asked there, and Cancelled is raised within one step.
    """
    to_do = min(steps, max(1, int(steps * strength)))
    if to_do < steps and sampler.few_step:
        raise ValueError(f"strength {strength} with {sampler.few_step}: a distilled sampler begins with noise alone")
    if to_do < steps and len(photos) != len(heads):
        raise ValueError(f"strength {strength} begins with photos; {len(photos)} came for {len(heads)} heads")
    images = to_tensor([head.bald for head in heads])
    with sampler.placement.used(sampler.vae):
        bald, _ = encode_latents(sampler.vae, images)
        present = encode_latents(sampler.vae, to_tensor(photos))[0] if to_do < steps else None

    def after_step(_: object, step: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
        if cancelled is not None and cancelled():
            raise Cancelled
        if on_step is not None:
            on_step(step + 1, to_do)
        return tensors

    networks = [sampler.model] if sampler.controlnet is None else [sampler.model, sampler.controlnet]
    with sampler.placement.used(*networks):
        device, dtype = sampler.model.device, next(sampler.model.unet.parameters()).dtype
        conditions = conditions.to(device, dtype)
        nothing = null_conditions(sampler.empty_text, sampler.empty_pooled, conditions)
        injector, side = sampler.model.injector, images.shape[-1]
        scheduler = scheduler_of(sampler.scheduler_config, sampler.few_step)
        start = initial_noise(seeds, side // 8).to(device)
        if present is not None:
            scheduler.set_timesteps(steps, device=device)
            # the pipeline multiplies what it is given by init_noise_sigma, since it takes it for noise
            start = (present.to(device) + scheduler.sigmas[steps - to_do].to(device) * start) / scheduler.init_noise_sigma
        painted = _pipeline(sampler, heads, scheduler)(
            prompt_embeds=injector(conditions).to(dtype),
            pooled_prompt_embeds=conditions.pooled,
            negative_prompt_embeds=injector(nothing).to(dtype),
            negative_pooled_prompt_embeds=nothing.pooled,
            image=(images + 1.0) / 2.0,
            mask_image=mask_tensor([head.region for head in heads]),
            masked_image_latents=bald.to(device, dtype),
            latents=start.to(dtype),
            height=side,
            width=side,
            strength=1.0 if to_do == steps else (to_do + 0.5) / steps,  # of which the pipeline takes int(steps * strength)
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch_generator(seed, "step noise") for seed in seeds],  # LCM adds noise between its steps; Euler draws none
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
    with sampler.placement.used(sampler.vae):
        return decode_latents(sampler.vae, painted).float()


def _pipeline(sampler: Sampler, heads: Sequence[HeadInput], scheduler: Any) -> Any:
    """diffusers' inpaint pipeline around the live UNet, steered where there is a ControlNet."""
    from diffusers import StableDiffusionXLInpaintPipeline

    class Pipeline(StableDiffusionXLInpaintPipeline):  # type: ignore[misc]
        """Computes where the model does; diffusers would ask the VAE, which may be at rest, or the UNet, whose weights may be in host memory."""

        @property
        def _execution_device(self) -> torch.device:
            return sampler.model.device

    unet = sampler.model.unet
    if sampler.controlnet is not None:
        structure = (to_tensor([head.structure for head in heads]) + 1.0) / 2.0
        unet = SteeredUNet(unet, sampler.controlnet, structure, sampler.controlnet_scale)
    pipeline = Pipeline(
        vae=sampler.vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=scheduler,
        requires_aesthetics_score=False,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
