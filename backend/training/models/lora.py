"""LoRA beside a UNet's weights (arXiv 2106.09685): where it sits, what it is called, and the one way in which it is merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # every projection of every attention layer; conv_in learns in full beside them
DOWN, UP = "lora_A.weight", "lora_B.weight"


def merged(weight: Tensor, up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    """W + s B A in W's precision, on the CPU. weight (O, I), up = B (O, r), down = A (r, I); of a convolution (O, I, k, k), (O, r, 1, 1) and
    (r, I, k, k). scale: alpha / r, which is 1 for the adapters that are trained here.

    Summed in float64: the order of addition, which differs between machines and numbers of threads, then leaves the rounded bits alone,
    so that what a checkpoint holds merged and what a bundle merges anew are equal.
    """
    product = up.detach().cpu().double().flatten(1) @ down.detach().cpu().double().flatten(1)
    return (weight.detach().cpu().double() + scale * product.reshape(weight.shape)).to(weight.dtype)


def merged_over(base: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's tensors with ``lora`` ({module}.lora_A.weight, {module}.lora_B.weight) merged into those of its modules."""
    full = dict(base)
    for name, down in lora.items():
        if name.endswith(DOWN):
            module = name.removesuffix(DOWN)
            full[f"{module}weight"] = merged(full[f"{module}weight"], lora[module + UP], down)
    return full


def shapes(unet: nn.Module, rank: int) -> dict[str, Any]:
    """The tensors, on the meta device, that a LoRA of ``rank`` over this UNet has."""
    found = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(TARGETS):
            found[f"{name}.{DOWN}"] = torch.empty(rank, module.in_features, device="meta")
            found[f"{name}.{UP}"] = torch.empty(module.out_features, rank, device="meta")
    return found
