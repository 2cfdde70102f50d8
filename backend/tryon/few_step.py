"""Few-step sampling: a distilled LoRA fused into the UNet, and the sampler that it was distilled for.

LCM-LoRA (arXiv 2311.05556) paints in 2 to 8 steps with the consistency sampler; SDXL-Lightning (arXiv 2402.13929) in the four steps of its
file, with Euler over trailing timesteps. Guidance is distilled into both. Neither LoRA touches conv_in, so both fit a UNet of 9 channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from backend import artifacts
from backend import weights as pretrained
from backend.errors import InvalidArtifactError
from backend.training.models.lora import merged

Kind = Literal["lcm", "lightning"]
PARTS: dict[Kind, str] = {"lcm": "lcm_lora", "lightning": "lightning_lora"}
_PAIRS = ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight"))


@dataclass(frozen=True)
class FewStep:
    """What was fused: ``kind``, and the sha256 of the LoRA's file, which results name beside the bundle's."""

    kind: Kind
    sha256: str


def fuse(unet: Any, weights: Path, kind: Kind) -> FewStep:
    """Adds the LoRA below ``paths.weights`` to the UNet's own weights, in place; no adapter and no second copy of a weight stays.

    Raises MissingInputError when the LoRA is not there, InvalidArtifactError when it is not of this UNet.
    """
    pretrained.require(weights, PARTS[kind])
    (file,) = pretrained.files(weights, PARTS[kind])
    tensors = artifacts.load_tensors(file)
    modules = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    changes = {name: _pair(file, tensors, prefix, modules[name]) for prefix, name in _prefixes(file, tensors, modules).items()}
    with torch.no_grad():  # after all of them were checked: a UNet is changed whole or not at all
        for name, (up, down, scale) in changes.items():
            modules[name].weight.copy_(merged(modules[name].weight, up, down, scale))
    return FewStep(kind, artifacts.sha256_file(file))


def scheduler(config: Mapping[str, Any], few_step: Kind | None) -> Any:
    """The sampler: the base's own Euler, or the one that the fused LoRA was distilled for. config: of the base's scheduler."""
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    if few_step == "lcm":
        return LCMScheduler.from_config(config)
    if few_step == "lightning":
        return EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
    return EulerDiscreteScheduler.from_config(config)


def _prefixes(file: Path, tensors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """{what a module's tensors begin with: the module}, by kohya's names (``lora_unet_mid_block_...``) or diffusers' (``unet.mid_block...``).

    Both publishers write the former. Raises InvalidArtifactError for a tensor that belongs to no module of the UNet.
    """
    known = {f"lora_unet_{name.replace('.', '_')}": name for name in modules} | {f"unet.{name}": name for name in modules}
    ends = (".alpha", *(end for pair in _PAIRS for end in pair))
    found: dict[str, str] = {}
    for key in tensors:
        prefix = next((key.removesuffix(end) for end in ends if key.endswith(end)), key)
        if prefix not in known:
            raise InvalidArtifactError(
                f"{file}: '{key}' belongs to no layer of this UNet",
                hint="take the LoRA that was made for SDXL; 'deephair models list' names it",
            )
        found[prefix] = known[prefix]
    return found


def _pair(file: Path, tensors: Mapping[str, torch.Tensor], prefix: str, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One module's up (O, r[, 1, 1]), down (r, I[, k, k]) and alpha / r. Raises InvalidArtifactError where they do not fit it."""
    ends = next((pair for pair in _PAIRS if prefix + pair[0] in tensors and prefix + pair[1] in tensors), None)
    if ends is None:
        raise InvalidArtifactError(f"{file}: '{prefix}' lacks one of its two factors", hint="the file is not whole; fetch it again")
    down, up = (tensors[prefix + end] for end in ends)
    wanted: Any = module.weight
    product = (up.shape[0], *down.shape[1:])
    if product != tuple(wanted.shape) or up.flatten(1).shape[1] != down.shape[0]:
        raise InvalidArtifactError(
            f"{file}: '{prefix}' makes {product}, the UNet's layer has {tuple(wanted.shape)}", hint="it is of another model"
        )
    alpha = tensors.get(f"{prefix}.alpha")
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
        raise InvalidArtifactError(f"{file}: '{prefix}' holds values that are not finite", hint="fetch the file again")
    return up, down, scale
