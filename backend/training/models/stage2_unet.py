"""Stage 2's network: the 9-channel SDXL inpainting UNet with style and identity tokens beside the text (DESIGN 4.3).

Shapes: B batch, h w latent sides, D the UNet's cross-attention width (2048 in SDXL), S style tokens, C = 77 + S + 1 context tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from backend import artifacts
from backend.errors import InvalidArtifactError
from backend.training.models.decoupled import decouple
from backend.weights_load import load_network

STYLE_WIDTH = 2048  # the Stage 1 embedding
IDENTITY_WIDTH = 512
CHANNELS = 9  # noisy latents 4, mask 1, bald latents 4: diffusers' order


@dataclass(frozen=True)
class Conditions:
    """What a prediction is conditioned on.

    text: (B, 77, D). pooled: (B, P) SDXL's pooled text. style: (B, S, 2048). style_valid: (B,) bool. identity: (B, 512) unit length.
    identity_valid: (B,) bool. Where a flag is false the learned null token takes the token's place.
    """

    text: torch.Tensor
    pooled: torch.Tensor
    style: torch.Tensor
    style_valid: torch.Tensor
    identity: torch.Tensor
    identity_valid: torch.Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditions:
        """Moved to a device, floating parts in ``dtype``."""
        moved = {
            name: value.to(device) if value.dtype == torch.bool else value.to(device=device, dtype=dtype)
            for name, value in vars(self).items()
        }
        return Conditions(**moved)


class CrossAttentionInjector(nn.Module):
    """Turns a style embedding and an identity into context tokens appended to the text (DESIGN 4.3).

    Style: Linear + LayerNorm per token. Identity: Linear + GELU + Linear. Each has a learned null token for "not given".
    """

    def __init__(self, width: int, style_tokens: int = 1) -> None:
        super().__init__()
        self.style_tokens = style_tokens
        self.style_projection = nn.Sequential(nn.Linear(STYLE_WIDTH, width), nn.LayerNorm(width))
        self.identity_projection = nn.Sequential(nn.Linear(IDENTITY_WIDTH, width), nn.GELU(), nn.Linear(width, width))
        self.style_null = nn.Parameter(torch.zeros(1, style_tokens, width))
        self.identity_null = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, conditions: Conditions, *, tokens: bool = True) -> torch.Tensor:
        """The context (B, 77 + S + 1, D), or with ``tokens`` false, which masks them out wholly, the text alone (B, 77, D)."""
        if not tokens:
            return conditions.text
        if conditions.style.shape[1:] != (self.style_tokens, STYLE_WIDTH):
            raise ValueError(f"style features must be (B, {self.style_tokens}, {STYLE_WIDTH}), got {tuple(conditions.style.shape)}")
        own = self.style_null.dtype  # a bf16 UNet may keep its small injector in float32
        style = torch.where(conditions.style_valid[:, None, None], self.style_projection(conditions.style.to(own)), self.style_null)
        identity = self.identity_projection(conditions.identity.to(own))[:, None]
        identity = torch.where(conditions.identity_valid[:, None, None], identity, self.identity_null)
        return torch.cat([conditions.text, style.to(conditions.text.dtype), identity.to(conditions.text.dtype)], dim=1)


class HairInpaintingUNet(nn.Module):
    """The UNet and its injector, each registered once: ``unet.*`` and ``injector.*``.

    injection: "appended" tokens share the text's keys, values and softmax, so even unlearnt ones take attention from it; "decoupled"
    ones have their own (``injector.branches``), gated by zero at first.
    """

    def __init__(self, unet: Any, style_tokens: int = 1, injection: str = "appended") -> None:
        super().__init__()
        if injection not in ("appended", "decoupled"):
            raise ValueError(f"injection must be 'appended' or 'decoupled', got {injection!r}")
        self.unet, self.injection = unet, injection
        self.injector = CrossAttentionInjector(unet.config.cross_attention_dim, style_tokens)
        if injection == "decoupled":
            self.injector.branches = decouple(unet)

    @property
    def device(self) -> torch.device:
        """Where it computes: the injector is always there, while the UNet's weights may stay in host memory."""
        return self.injector.style_null.device

    def enable_gradient_checkpointing(self, *, reentrant: bool = False) -> None:
        """Recomputes each block's activations in the backward pass. Nothing here draws random numbers, so no generator state is kept.

        reentrant: PyTorch's older way, with a backward pass of each block's own. It calls no Python for each kept tensor, which a host that
        launches slower than its card computes notices; it suits neither several processes nor offloaded weights.
        """

        def recomputed(module: nn.Module, *inputs: Any) -> Any:
            return checkpoint(module, *inputs, use_reentrant=reentrant, preserve_rng_state=False)

        self.unet.enable_gradient_checkpointing(recomputed)

    def forward(
        self,
        noisy: torch.Tensor,
        mask: torch.Tensor,
        bald: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Conditions,
        time_ids: torch.Tensor,
        *,
        tokens: bool = True,
    ) -> torch.Tensor:
        """The predicted noise (B, 4, h, w).

        noisy, bald: (B, 4, h, w) latents, scaled. mask: (B, 1, h, w) 0 or 1. timesteps: (B,) int64 0..999. time_ids: (B, 6).
        tokens: false masks style and identity tokens out wholly; the network is then the base.
        """
        sample = torch.cat([noisy, mask, bald], dim=1)
        added = {"text_embeds": conditions.pooled, "time_ids": time_ids}
        prediction: torch.Tensor = self.unet(
            sample, timesteps, encoder_hidden_states=self.injector(conditions, tokens=tokens), added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction


def widen_conv_in(unet: Any) -> Any:
    """Makes a UNet take 9 channels: a 4-channel one gets zero weights for the new five and keeps its bias, a 9-channel one is left alone.

    With zero weights the widened network predicts exactly what the 4-channel one did. Raises InvalidArtifactError for any other count.
    """
    channels = unet.config.in_channels
    if channels == CHANNELS:
        return unet
    if channels != 4:
        raise InvalidArtifactError(
            f"the base UNet takes {channels} input channels", hint="use an SDXL base (4 channels) or an SDXL inpainting base (9 channels)"
        )
    old = unet.conv_in
    new: Any = nn.Conv2d(
        CHANNELS, old.out_channels, old.kernel_size, old.stride, old.padding, dtype=old.weight.dtype, device=old.weight.device
    )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :4] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=CHANNELS)
    return unet


def load_unet(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The base UNet of a diffusers folder, on the CPU, with 9 input channels. Raises InvalidArtifactError when it is no SDXL UNet."""
    from diffusers import UNet2DConditionModel

    unet = load_network(UNet2DConditionModel, folder, "the UNet", torch_dtype=dtype)
    _require_sdxl(unet.config, folder)
    return widen_conv_in(unet)


def load_start(model: HairInpaintingUNet, path: Path) -> None:
    """Fills the network from a Stage 2 checkpoint's weights (``unet.*`` and ``injector.*``), whatever precision they are stored in.

    Raises InvalidArtifactError when tensors are missing, left over, of another shape or not finite.
    """
    tensors = artifacts.load_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InvalidArtifactError(
            f"{path} does not fit this network: {error}", hint="the same base model, train.style_tokens and train.injection are needed"
        ) from error
    if not all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values()):
        raise InvalidArtifactError(f"{path} holds values that are not finite")


def network_of(header: dict[str, Any]) -> HairInpaintingUNet:
    """The network that the header of a checkpoint or bundle describes, on the meta device: its weights are yet to be assigned.

    Raises KeyError, TypeError or ValueError when it describes none.
    """
    with torch.device("meta"):
        return HairInpaintingUNet(empty_unet(header["unet_config"]), int(header["style_tokens"]), header.get("injection", "appended"))


def empty_unet(config: dict[str, Any]) -> Any:
    """A UNet of a stored configuration, with weights to be filled in (used when loading a bundle)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(config)


def unet_config(unet: Any) -> dict[str, Any]:
    """The UNet's configuration as JSON, from which ``empty_unet`` builds the same network."""
    plain: dict[str, Any] = json.loads(unet.to_json_string())
    return {key: value for key, value in plain.items() if key != "_name_or_path"}


def _require_sdxl(config: Any, folder: Path) -> None:
    if config.addition_embed_type != "text_time":
        raise InvalidArtifactError(
            f"the UNet in {folder} has addition_embed_type={config.addition_embed_type!r}; SDXL's is 'text_time'",
            hint="Stable Diffusion 1.5 and 2 are not supported",
        )


def time_ids(batch: int, resolution: int) -> torch.Tensor:
    """SDXL's micro-conditioning (arXiv 2307.01952, section 2.2), (B, 6) float32: original size, crop corner 0 0, target size."""
    return torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], dtype=torch.float32).repeat(batch, 1)


# The published configuration of diffusers/stable-diffusion-xl-1.0-inpainting-0.1 where it differs from the class's defaults.
SDXL_UNET_CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": CHANNELS,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
