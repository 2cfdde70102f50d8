"""The deploy bundle: every trained part in one safetensors file with a header that says what it is (DESIGN 4.4).

A LoRA run's bundle holds its adapters (``lora.*``), conv_in, the injector and the texture encoder, and names the base they belong over by its
sha256; every other bundle holds the whole UNet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend import artifacts
from backend import weights as pretrained
from backend.errors import InvalidArtifactError
from backend.training.models import lora as adapters
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
_UNET, _LORA, _ENCODER = "unet.", "lora.", "texture_encoder."
_BESIDE_LORA = ("unet.conv_in.", "injector.")  # what learns in full beside a LoRA


@dataclass(frozen=True)
class Contents:
    """What a bundle stores: its tensors on the CPU in the precision of the training, and what its header says of the networks."""

    tensors: dict[str, torch.Tensor]
    networks: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """A bundle read back and checked: networks on the CPU in eval mode, the header, and the file's sha256."""

    model: HairInpaintingUNet
    texture_encoder: TextureEncoder
    header: dict[str, Any]
    sha256: str


def contents_of(model: HairInpaintingUNet, texture_encoder: TextureEncoder, lora: Mapping[str, torch.Tensor] | None = None) -> Contents:
    """What a bundle of these networks stores: ``unet.*`` or ``lora.*``, ``injector.*`` and ``texture_encoder.*``.

    lora: the adapters, named as in ``models.lora``, that are merged in the model already and are to be stored instead of what they change.
    """
    tensors = {name: value for name, value in model.state_dict().items() if not lora or name.startswith(_BESIDE_LORA)}
    tensors |= {_LORA + name: value.cpu() for name, value in (lora or {}).items()}
    tensors |= {_ENCODER + name: value for name, value in texture_encoder.state_dict().items()}
    networks = {
        "content_sha256": content_digest(tensors),
        "unet_config": unet_config(model.unet),
        "style_tokens": model.injector.style_tokens,
        "injection": model.injection,
        "texture_layers": list(texture_encoder.layers),
    }
    if lora:
        networks["lora"] = {"rank": next(value for name, value in lora.items() if name.endswith(adapters.DOWN)).shape[0]}
    return Contents(tensors, networks)


def write_bundle(path: Path, contents: Contents, header: Mapping[str, Any]) -> str:
    """Writes the bundle atomically and returns the file's sha256. ``header`` adds to what the contents say of the networks."""
    return artifacts.save_tensors(path, contents.tensors, {**header, **contents.networks, "format": FORMAT})


def check_networks(model: HairInpaintingUNet, texture_encoder: TextureEncoder) -> None:
    """Refuses what no bundle may hold, before hours are spent on measuring it.

    Raises InvalidArtifactError for a UNet without 9 input channels or values that are not finite.
    """
    if model.unet.config.in_channels != CHANNELS:
        raise InvalidArtifactError(f"the UNet takes {model.unet.config.in_channels} input channels, {CHANNELS} are needed")
    _check_finite("the trained model", model.state_dict())
    _check_finite("the texture encoder", texture_encoder.state_dict())


def content_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of all tensors in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_model(weights: Path) -> dict[str, str]:
    """Name and sha256 of the base UNet below ``paths.weights``, as headers name it. It is read whole: about ten seconds at SDXL's size."""
    return {"name": pretrained.describe(weights).get("inpainting", ""), "sha256": artifacts.sha256_file(_base_file(weights))}


def _base_file(weights: Path) -> Path:
    return next(path for path in pretrained.files(weights, "inpainting") if path.parent.name == "unet" and path.suffix == ".safetensors")


def read_bundle(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A bundle's header and tensors, checked as far as the file alone allows.

    Raises InvalidArtifactError for an unknown format, a missing header entry, missing or extra tensors, wrong shapes, a UNet without
    9 input channels, non-finite values, or content that does not match its hash.
    """
    header = artifacts.read_header(path)
    _check_header(path, header)
    tensors = artifacts.load_tensors(path)
    check_tensors(path, tensors, _wanted(path, header))
    if content_digest(tensors) != header["content_sha256"]:
        raise InvalidArtifactError(f"{path}: the tensors do not match the hash in the header", hint="the file was changed; deploy it again")
    return header, tensors


def load_bundle(path: Path, weights: Path | None = None) -> Bundle:
    """Reads, checks and builds a bundle. weights: ``paths.weights``, where the base of a LoRA bundle lies; no other bundle needs it.

    Raises InvalidArtifactError as ``read_bundle`` does and when the base is not the one that the bundle names, MissingInputError when a LoRA
    bundle's base is not there, ValueError when it was not said where.
    """
    digest = artifacts.sha256_file(path) if path.is_file() else ""
    header, tensors = read_bundle(path)
    own = {name: value for name, value in tensors.items() if not name.startswith((_ENCODER, _LORA))}
    if "lora" in header:
        if weights is None:
            raise ValueError(f"{path} is a LoRA: loading it takes the folder of its base")
        _require_base(path, header, weights)
        own |= merged_over_base(tensors, weights)
    model = filled(network_of(header), own)
    encoder = {name.removeprefix(_ENCODER): value for name, value in tensors.items() if name.startswith(_ENCODER)}
    layers = tuple(int(n) for n in header["texture_layers"])
    return Bundle(model, TextureEncoder.from_tensors(encoder, layers).requires_grad_(False), header, digest)


def filled(model: HairInpaintingUNet, tensors: Mapping[str, torch.Tensor]) -> HairInpaintingUNet:
    """A network on the meta device with these tensors as its weights, in their own precision, frozen and in eval mode."""
    model.load_state_dict({name: artifacts.aligned(value) for name, value in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def merged_over_base(tensors: Mapping[str, torch.Tensor], weights: Path) -> dict[str, torch.Tensor]:
    """The ``unet.*`` that a LoRA bundle's tensors make of the base below ``weights``, in the precision that was trained over (conv_in's)."""
    dtype = tensors["unet.conv_in.weight"].dtype
    base = {name: value.to(dtype) for name, value in artifacts.load_tensors(_base_file(weights)).items()}
    lora = {name.removeprefix(_LORA): value for name, value in tensors.items() if name.startswith(_LORA)}
    full = {_UNET + name: value for name, value in adapters.merged_over(base, lora).items()}
    return full | {name: value for name, value in tensors.items() if name.startswith(_UNET)}


def _require_base(path: Path, header: Mapping[str, Any], weights: Path) -> None:
    pretrained.require(weights, "inpainting")
    found, wanted = base_model(weights)["sha256"], header["base"]
    if found != wanted["sha256"]:
        raise InvalidArtifactError(
            f"{path} is a LoRA over the base '{wanted.get('name', '')}', sha256 {wanted['sha256']}; the base in {weights} has sha256 {found}",
            hint="point paths.weights at the folder that holds that base",
        )


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
    if "lora" in header and not (isinstance(header["base"], dict) and header["base"].get("sha256")):
        raise InvalidArtifactError(f"{path}: it holds a LoRA and names no base")


def _wanted(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The tensors that a bundle with this header has, on the meta device."""
    try:
        with torch.device("meta"):
            encoder = TextureEncoder(tuple(int(n) for n in header["texture_layers"]))
        model, lora = network_of(header), header.get("lora")
        added = {} if lora is None else adapters.shapes(model.unet, int(lora["rank"]))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise InvalidArtifactError(f"{path}: its header describes no network that can be built: {error}") from error
    wanted = {name: value for name, value in model.state_dict().items() if lora is None or name.startswith(_BESIDE_LORA)}
    wanted |= {_LORA + name: value for name, value in added.items()}
    return wanted | {_ENCODER + name: value for name, value in encoder.state_dict().items()}


def check_tensors(path: Path, tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors that are not those of ``wanted`` by name and shape, or not finite: InvalidArtifactError with the first one's name."""
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
