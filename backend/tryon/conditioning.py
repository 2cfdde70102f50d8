"""What the UNet is told: the edit region and bald image, text tokens, style features and identity. Training and serving share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from backend import weights as pretrained
from backend.errors import InvalidArtifactError
from backend.imaging import bald, crop, masks, structure
from backend.training.models.stage2_unet import IDENTITY_WIDTH, Conditions
from backend.training.models.texture_encoder import TextureEncoder
from backend.tryon.placement import STAYS, Placement
from backend.weights_load import load_network

TOKENS = 77


@dataclass(frozen=True)
class HeadInput:
    """One head crop as the UNet sees it. region: (S, S) uint8 0/255, where hair may be painted. bald: (S, S, 3) uint8 RGB.

    structure: (S, S, 3) uint8, the head-structure map for a ControlNet.
    """

    region: NDArray[np.uint8]
    bald: NDArray[np.uint8]
    structure: NDArray[np.uint8]


def head_input(
    photo: NDArray[np.uint8],
    hair: NDArray[np.uint8],
    face_box: crop.Box | None,
    *,
    method: bald.Method,
    shape: masks.RegionShape | None = None,
    borrowed: Sequence[masks.Silhouette] = (),
    landmarks: Sequence[Sequence[float]] | NDArray[np.floating] | None = None,
    chosen: NDArray[np.uint8] | None = None,
    within: NDArray[np.uint8] | None = None,
) -> HeadInput:
    """The edit region of a head crop and the crop with that region filled.

    The whole region is filled, not only the hair: a fill that ended where the hair ends would show its outline to the network.
    photo: (S, S, 3) uint8 RGB; hair: (S, S) 0/255; shape, borrowed: random in training, see
    ``masks.edit_region``; nothing when serving. landmarks: (5, 2) in the crop's pixels, for the structure map. chosen: (S, S) 0/255,
    a region that a person has painted instead of the shared one. within: (S, S) 0/255, what of the shared one may be painted.
    """
    region = masks.edit_region(hair, face_box, shape, borrowed) if chosen is None else chosen
    if within is not None and chosen is None:
        region = np.minimum(region, within)
    drawn = structure.head_structure(photo.shape[0], face_box, landmarks)
    return HeadInput(region, bald.remove_hair(photo, region, face_box, method), drawn)


def to_tensor(pictures: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """(S, S, 3) uint8 RGB pictures as (B, 3, S, S) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    return stacked / 127.5 - 1.0


def to_pictures(images: torch.Tensor) -> list[NDArray[np.uint8]]:
    """(B, 3, S, S) in [-1, 1] as (S, S, 3) uint8 RGB pictures; out-of-range values are clipped, non-finite ones become 0."""
    finite = torch.nan_to_num(images.detach().float().cpu(), nan=-1.0, posinf=1.0, neginf=-1.0)
    scaled = ((finite.clamp(-1, 1) + 1.0) * 127.5).round().to(torch.uint8)
    return [np.ascontiguousarray(picture) for picture in scaled.permute(0, 2, 3, 1).numpy()]


def mask_tensor(regions: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """(S, S) uint8 0/255 masks as (B, 1, S, S) float32 0 or 1."""
    return torch.from_numpy(np.stack(regions) > 0)[:, None].float()


def latent_mask(mask: torch.Tensor, latent_side: int) -> torch.Tensor:
    """A mask (B, 1, S, S) at latent size, by the nearest pixel: exactly what diffusers' inpaint pipeline does with the mask it is given."""
    return F.interpolate(mask, size=(latent_side, latent_side))


class TextEncoders:
    """SDXL's two CLIP text encoders, ``encoders``, and their tokenizers."""

    def __init__(self, inpainting: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        try:
            self._tokenizers = [
                CLIPTokenizer.from_pretrained(inpainting / name, local_files_only=True) for name in ("tokenizer", "tokenizer_2")
            ]
        except (OSError, ValueError) as error:
            raise InvalidArtifactError(f"the tokenizers in {inpainting} cannot be read: {error}") from error
        for tokenizer in self._tokenizers:  # the library keeps each word that it has split, and people type their own
            forget = getattr(tokenizer.backend_tokenizer.model, "_resize_cache", None)
            if forget is not None:  # its only way, and a private one
                forget(0)
        self.encoders = [
            load_network(kind, inpainting / name, "the text encoder", dtype=dtype).to(device).eval()
            for kind, name in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
        ]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], placement: Placement = STAYS) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as (B, 77, D) and pooled (B, P) on the CPU in float32: the next-to-last layer of both (arXiv 2307.01952, 2.1)."""
        hidden, pooled = [], torch.empty(0)
        for tokenizer, encoder in zip(self._tokenizers, self.encoders, strict=True):
            tokens = tokenizer(list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
            with placement.used(encoder):
                output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2].float().cpu())
            pooled = output[0].float().cpu()
        return torch.cat(hidden, dim=-1), pooled


def encoder_dtype(device: torch.device) -> torch.dtype:
    """In which training runs the frozen encoders: bfloat16 on a card, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_vae(inpainting: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The VAE of a diffusers folder, frozen. Never plain fp16: SDXL's VAE overflows there (training_memory.md, section 3)."""
    from diffusers import AutoencoderKL

    if dtype == torch.float16:
        raise ValueError("SDXL's VAE overflows in float16; use bfloat16 or float32")
    return load_network(AutoencoderKL, inpainting / "vae", "the VAE", torch_dtype=dtype).to(device).eval().requires_grad_(False)


PASS_PIXELS = 1024 * 1024  # that go through the VAE at a time: 1.25 GiB to encode, 1.5 to decode (training_memory.md, section 0)


def passes(count: int, pixels: int, most: int | None = None) -> list[slice]:
    """``count`` pictures of ``pixels`` each, in parts of at most PASS_PIXELS pixels and ``most`` pictures, one at least."""
    size = max(1, PASS_PIXELS // max(pixels, 1))
    size = size if most is None else min(size, most)
    return [slice(start, start + size) for start in range(0, count, size)]


@torch.no_grad()
def encode_latents(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the scaled latents of (B, 3, S, S) in [-1, 1]: two (B, 4, S/8, S/8).

    Raises InvalidArtifactError when they are not finite.
    """
    parameter = next(vae.parameters())
    found = []
    for part in passes(len(images), images[0, 0].numel()):
        posterior = vae.encode(images[part].to(parameter.device, parameter.dtype)).latent_dist
        found.append((posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor))
    mean, std = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise InvalidArtifactError("the VAE gave non-finite latents", hint="run it in bf16 or fp32; fp16 overflows in SDXL's VAE")
    return mean, std


def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, 4, h, w) as pictures (B, 3, 8h, 8w), roughly in [-1, 1]; gradients flow."""
    parameter = next(vae.parameters())
    scaled = latents.to(parameter.dtype) / vae.config.scaling_factor
    return torch.cat([vae.decode(scaled[part], return_dict=False)[0] for part in passes(len(scaled), 64 * scaled[0, 0].numel())])


@torch.no_grad()
def style_features(encoder: TextureEncoder, pictures: Sequence[NDArray[np.uint8]], tokens: int) -> torch.Tensor:
    """Stage 1 features of style pictures (224 x 224 uint8 RGB): (B, tokens, 2048) float32 on the CPU; tokens is 1 (pooled) or 16."""
    parameter = next(encoder.parameters())
    images = ((to_tensor(pictures) + 1.0) / 2.0).to(parameter.device, parameter.dtype)
    features = encoder.encode(images)[:, None] if tokens == 1 else encoder.patch_tokens(images)
    return features.float().cpu()


def identity_tensor(embeddings: Sequence[NDArray[np.float32] | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Identity embeddings as (B, 512) float32 and their validity (B,) bool; None is "not known" and becomes zeros, flagged."""
    stacked = torch.zeros(len(embeddings), IDENTITY_WIDTH)
    for row, embedding in zip(stacked, embeddings, strict=True):
        if embedding is not None:
            row.copy_(torch.from_numpy(np.asarray(embedding, np.float32)))
    return stacked, torch.tensor([embedding is not None for embedding in embeddings])


def null_conditions(empty_text: torch.Tensor, empty_pooled: torch.Tensor, like: Conditions) -> Conditions:
    """The unconditional side of classifier-free guidance: the empty prompt and both null tokens. empty_text: (1, 77, D)."""
    batch = like.text.shape[0]
    return Conditions(
        text=empty_text.expand(batch, -1, -1).to(like.text),
        pooled=empty_pooled.expand(batch, -1).to(like.pooled),
        style=torch.zeros_like(like.style),
        style_valid=torch.zeros_like(like.style_valid),
        identity=torch.zeros_like(like.identity),
        identity_valid=torch.zeros_like(like.identity_valid),
    )


def inpainting_folder(weights: Path) -> Path:
    """The diffusers folder of the base model."""
    return pretrained.folder(weights, "inpainting")
