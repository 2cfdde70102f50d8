"""The deploy bundle: every trained part in one safetensors file with a header that says what it is (DESIGN 4.4)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend import artifacts
from backend.errors import InvalidArtifactError
from backend.training.models.stage2_unet import CHANNELS, HairInpaintingUNet, network_of, unet_config
from backend.training.models.texture_encoder import TextureEncoder

FORMAT = "deephair-bundle-1"
REQUIRED = (
    "format",
    "content_sha256",
    "unet_config",
    "style_tokens",
    "texture_layers",
    "identity_model",
    "resolution",
    "base",
    "gate",
    "metrics",
)


@dataclass(frozen=True)
class Bundle:
    """A bundle read back and checked: networks on the CPU in eval mode, the header, and the file's sha256."""

    model: HairInpaintingUNet
    texture_encoder: TextureEncoder
    header: dict[str, Any]
    sha256: str


def write_bundle(path: Path, model: HairInpaintingUNet, texture_encoder: TextureEncoder, header: Mapping[str, Any]) -> str:
    """Writes the bundle atomically and returns the file's sha256. ``header`` adds to what the networks say of themselves."""
    tensors = tensors_of(model, texture_encoder)
    own = {
        "format": FORMAT,
        "content_sha256": content_digest(tensors),
        "unet_config": unet_config(model.unet),
        "style_tokens": model.injector.style_tokens,
        "injection": model.injection,
        "texture_layers": list(texture_encoder.layers),
    }
    return artifacts.save_tensors(path, tensors, {**header, **own})


def tensors_of(model: HairInpaintingUNet, texture_encoder: TextureEncoder) -> dict[str, torch.Tensor]:
    """All tensors of a bundle by name: ``unet.*``, ``injector.*`` and ``texture_encoder.*``."""
    return {**model.state_dict(), **{f"texture_encoder.{name}": value for name, value in texture_encoder.state_dict().items()}}


def check_networks(model: HairInpaintingUNet, texture_encoder: TextureEncoder) -> None:
    """Refuses networks that no bundle may hold, before hours are spent on measuring them.

    Raises InvalidArtifactError for a UNet without 9 input channels or values that are not finite.
    """
    if model.unet.config.in_channels != CHANNELS:
        raise InvalidArtifactError(f"the UNet takes {model.unet.config.in_channels} input channels, {CHANNELS} are needed")
    _check_finite("the trained model", tensors_of(model, texture_encoder))


def content_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of all tensors in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_bundle(path: Path) -> Bundle:
    """Reads and checks a bundle.

    Raises InvalidArtifactError for an unknown format, a missing header entry, missing or extra tensors, wrong shapes, a UNet without
    9 input channels, non-finite values, or content that does not match its hash.
    """
    digest = artifacts.sha256_file(path) if path.is_file() else ""
    header = artifacts.read_header(path)
    _check_header(path, header)
    tensors = artifacts.load_tensors(path)
    model, encoder = _skeleton(path, header)
    _check_tensors(path, tensors, tensors_of(model, encoder))
    if content_digest(tensors) != header["content_sha256"]:
        raise InvalidArtifactError(f"{path}: the tensors do not match the hash in the header", hint="the file was changed; deploy it again")
    dtype = tensors["unet.conv_in.weight"].dtype
    model.unet.to(dtype)
    model.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("texture_encoder.")})
    encoder.load_state_dict(
        {name.removeprefix("texture_encoder."): value for name, value in tensors.items() if name.startswith("texture_encoder.")}
    )
    return Bundle(model.eval().requires_grad_(False), encoder.eval().requires_grad_(False), header, digest)


def _check_header(path: Path, header: dict[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise InvalidArtifactError(
            f"{path} has format {header.get('format')!r}; a deploy bundle has {FORMAT!r}", hint="make one with 'deephair export'"
        )
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise InvalidArtifactError(f"{path}: the header lacks {', '.join(missing)}")
    channels = header["unet_config"].get("in_channels") if isinstance(header["unet_config"], dict) else None
    if channels != CHANNELS:
        raise InvalidArtifactError(f"{path}: its UNet takes {channels} input channels, {CHANNELS} are needed")


def _skeleton(path: Path, header: dict[str, Any]) -> tuple[HairInpaintingUNet, TextureEncoder]:
    try:
        return network_of(header), TextureEncoder(tuple(int(n) for n in header["texture_layers"]))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InvalidArtifactError(f"{path}: its header describes no network that can be built: {error}") from error


def _check_tensors(path: Path, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing:
        raise InvalidArtifactError(f"{path}: {len(missing)} tensors are missing, first '{missing[0]}'")
    if extra:
        raise InvalidArtifactError(f"{path}: {len(extra)} tensors do not belong there, first '{extra[0]}'")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise InvalidArtifactError(f"{path}: '{name}' has shape {tuple(tensor.shape)}, {tuple(wanted[name].shape)} is needed")
    _check_finite(path, tensors)


def _check_finite(owner: object, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidArtifactError(f"{owner}: '{name}' holds values that are not finite")
