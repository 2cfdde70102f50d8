"""Random networks and data in SDXL's shapes, or tiny ones of the same make, for benchmarks/stage2_gpu.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import nn

from backend.training.models.stage2_unet import IDENTITY_WIDTH, SDXL_UNET_CONFIG, STYLE_WIDTH, HairInpaintingUNet, empty_unet
from backend.training.stage2_data import Split

SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1,
}  # fmt: skip
SDXL_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
    "scaling_factor": 0.13025, "force_upcast": True,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
TINY_UNET = {
    **SDXL_UNET_CONFIG, "sample_size": 8, "block_out_channels": [32, 64, 64], "attention_head_dim": [1, 2, 2], "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 1], "cross_attention_dim": 64, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}  # fmt: skip
TINY_VAE = {**SDXL_VAE, "block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "sample_size": 64}


@dataclass(frozen=True)
class Size:
    """What is measured: network configurations and the side of the pictures."""

    name: str
    resolution: int
    unet: dict[str, Any]
    vae: dict[str, Any]

    @property
    def text_width(self) -> int:
        return int(self.unet["cross_attention_dim"])

    @property
    def pooled_width(self) -> int:
        return int(self.unet["projection_class_embeddings_input_dim"]) - 6 * int(self.unet["addition_time_embed_dim"])


SIZES = {
    "full": Size("full", 1024, SDXL_UNET_CONFIG, SDXL_VAE),
    "miniature": Size("miniature", 64, TINY_UNET, TINY_VAE),
}


def materialised(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """A module built on the meta device, with random weights made where they stay: matrices of variance 1/fan-in, norms 1, biases 0."""
    if next(module.buffers(), None) is not None:
        raise ValueError("a module with buffers cannot be filled with random weights")
    module = module.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def random_unet(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """A 9-channel UNet."""
    with torch.device("meta"):
        unet = empty_unet(size.unet)
    return materialised(unet, device, dtype)


def random_model(size: Size, style_tokens: int, device: torch.device, dtype: torch.dtype) -> HairInpaintingUNet:
    """The UNet with its injector."""
    torch.manual_seed(0)
    return HairInpaintingUNet(random_unet(size, device, dtype), style_tokens)


def random_vae(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen VAE."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(size.vae)
    return materialised(vae, device, dtype).eval().requires_grad_(False)


class SyntheticLatents:
    """Samples as the latent cache holds them: values of SDXL's statistics, a disc for a mask."""

    def __init__(self, size: Size, *, samples: int, variants: int, style_tokens: int) -> None:
        side = size.resolution // 8
        draw = torch.Generator().manual_seed(1)
        axis = torch.linspace(-1, 1, side)
        disc = ((axis[:, None] ** 2 + axis[None] ** 2) < 0.5).to(torch.uint8)[None]
        self.variants = variants
        self.ids = [f"sample_{n}" for n in range(samples)]
        self._columns = {
            "photo_mean": torch.randn(samples, 4, side, side, generator=draw).bfloat16(),
            "photo_std": torch.full((samples, 4, side, side), 0.05, dtype=torch.bfloat16),
            "bald": torch.randn(samples, variants, 4, side, side, generator=draw).bfloat16(),
            "mask": disc.expand(samples, variants, 1, side, side),
            "excluded": torch.zeros(samples, 1, side, side, dtype=torch.uint8),
            "style": torch.rand(samples, style_tokens, STYLE_WIDTH, generator=draw),
            "identity": nn.functional.normalize(torch.randn(samples, IDENTITY_WIDTH, generator=draw), dim=1),
            "identity_valid": torch.ones(samples, 1, dtype=torch.uint8),
        }

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, name: str, indices: NDArray[np.int64]) -> torch.Tensor:
        """As LatentCache.take."""
        return self._columns[name][torch.from_numpy(indices)]


class SyntheticPrompts:
    """One random embedding for every prompt."""

    def __init__(self, size: Size) -> None:
        draw = torch.Generator().manual_seed(2)
        self._text = torch.randn(77, size.text_width, generator=draw), torch.randn(size.pooled_width, generator=draw)

    def get(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """As PromptCache.get."""
        return self._text


class SyntheticPictures:
    """A photo of smooth noise with a disc of hair for every sample."""

    def __init__(self, size: Size) -> None:
        noise = random_pictures(size, 1, torch.device("cpu"))[0].permute(1, 2, 0)
        axis = np.linspace(-1, 1, size.resolution)
        disc = np.where(axis[:, None] ** 2 + axis[None] ** 2 < 0.5, np.uint8(255), np.uint8(0))
        self._picture = ((noise.numpy() + 1) * 127.5).astype(np.uint8), disc

    def get(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """As prepared.Pictures.get."""
        return self._picture


def synthetic_split(size: Size, *, samples: int, variants: int, style_tokens: int) -> Split:
    """A split of random samples, each with all others as style references."""
    latents = SyntheticLatents(size, samples=samples, variants=variants, style_tokens=style_tokens)
    references = [[other for other in range(samples) if other != n] for n in range(samples)]
    return Split(latents, [""] * samples, references, SyntheticPictures(size))


def random_pictures(size: Size, count: int, device: torch.device) -> torch.Tensor:
    """(count, 3, S, S) in [-1, 1] float32: smooth noise."""
    coarse = torch.rand(count, 3, size.resolution // 16, size.resolution // 16, device=device) * 2 - 1
    return nn.functional.interpolate(coarse, size=size.resolution, mode="bilinear")
