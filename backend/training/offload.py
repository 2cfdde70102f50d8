"""Host offload of preset full-exact: float32 masters, gradients and AdamW's states stay in host memory, the card borrows what it computes with.

Each layer copies its weights to the device when it is called and drops the copy afterwards. The copy is part of the graph, so autograd
itself carries gradients back and adds them up in host memory, where the optimizer steps; state, checkpoints and averages see ordinary
parameters on the CPU. Copies change no bit, so a run with offload equals one without (tests/test_offload.py). With gradient checkpointing
a layer's copy lives for its block's recomputation alone; without it all copies wait for the backward pass.

PyTorch's FSDP offloads too, but its hooks add gradients in another order (docs/training.md), and this preset is the reference that others
are compared with; accelerate's offloading hooks are for inference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def stream(network: nn.Module, device: torch.device) -> None:
    """Leaves the network's weights in host memory, pinned where the device is a CUDA card, and lets each layer borrow its own on ``device``.

    A layer is a module that holds parameters itself; those of one layer are borrowed together. Frozen ones take the same way.
    """
    for module in network.modules():
        if module._parameters:
            if device.type == "cuda":
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.pin_memory()
            module.forward = _borrowing(module, device)


def _borrowing(module: nn.Module, device: torch.device) -> Any:
    original = module.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        own = dict(module._parameters)
        module._parameters.update({name: _copy(parameter, device) for name, parameter in own.items()})
        try:
            return original(*inputs, **named)
        finally:  # gradient checkpointing leaves a layer by an exception once it has recomputed what it wanted
            module._parameters.update(own)

    return forward


def _copy(parameter: nn.Parameter | None, device: torch.device) -> Any:
    """A copy in every case, also from the CPU to itself, so that the CPU's tests take the card's way."""
    return None if parameter is None else parameter.to(device, non_blocking=True, copy=True)
