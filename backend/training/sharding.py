"""Several cards, one set of weights: FSDP for the presets that train everything in float32 (arXiv 2304.11277; PyTorch's fully_shard).

Each process holds its share of the UNet's weights, gradients and optimizer states, and borrows the rest block by block while it computes.
The injector is small and stays whole in each. Checkpoints are whole files, as those of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from backend.training.processes import Processes


def shard(unet: Any, processes: Processes) -> None:
    """Spreads a UNet's weights over the processes in place, each share on its process's device; no device ever holds them all.

    Borrowed together are a transformer, the rest of a block, and what lies outside the blocks. Gradient checkpointing recomputes inside these,
    never around one.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for module in (*_parts(unet), unet):
        fully_shard(module, mesh=mesh)


def _parts(unet: Any) -> Iterator[nn.Module]:
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        yield from getattr(block, "attentions", None) or ()
        yield block


def whole(tensor: Tensor) -> Tensor:
    """A spread tensor put together, in every process: all must call it in the same order. Any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Spread tensors put together one by one, on the CPU; the others as they are. All processes must call it; those without ``keep`` get
    nothing."""
    found = {}
    for name, tensor in tensors.items():
        value = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = value
    return found


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """What of a whole tensor belongs where ``like`` lies: this process's share where that is spread. Nothing is communicated."""
    if not isinstance(like, DTensor):
        return value
    placed = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def load_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of whole tensors into a network that may be spread. Raises ValueError when the names differ."""
    own = model.state_dict()
    if own.keys() != tensors.keys():
        raise ValueError(f"the tensors are not this network's: {sorted(own.keys() ^ tensors.keys())[:3]}")
    for name, target in own.items():
        target.copy_(part_of(tensors[name], target))


def clip_grad_norm(parameters: Sequence[nn.Parameter], bound: float) -> None:
    """``torch.nn.utils.clip_grad_norm_`` over the norm of all gradients together, spread ones and others.

    The squares are summed in float64: their order, which differs between one process and several, then leaves the norm's float32 bits alone.
    """
    learning: list[Any] = [parameter for parameter in parameters if parameter.grad is not None]
    spread: list[Any] = [parameter for parameter in learning if isinstance(parameter, DTensor)]
    others = [parameter for parameter in learning if not isinstance(parameter, DTensor)]
    square = _square([parameter.grad.to_local() for parameter in spread])
    if spread:
        torch.distributed.all_reduce(square)
    norm = (square + _square([parameter.grad for parameter in others])).sqrt().float()
    for kind in (spread, others):
        torch.nn.utils.clip_grads_with_norm_(kind, bound, norm)


def _square(gradients: Sequence[Any]) -> Tensor:
    """The sum of all squares, a float64 scalar on the gradients' device."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()  # offloaded gradients lie in host memory, others do not
