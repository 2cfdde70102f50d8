"""What this process takes of a card, and a bound on it, so that running out is an error and not a silent spill to host memory."""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
from collections.abc import Iterable, Iterator

import torch
from torch.distributed.tensor import DTensor

from backend.errors import DeepHairError
from backend.machine import in_wsl

logger = logging.getLogger(__name__)

GIB = 2**30


def peak_gib(device: torch.device) -> float:
    """The most memory that this process has held so far, in GiB: the allocator's on a card, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def held_bytes(tensors: Iterable[torch.Tensor], device: torch.device) -> int:
    """What of these tensors lies on the device; of one that is spread over processes this one's share."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in local if tensor.device.type == device.type)


def cap_memory(device: torch.device, fraction: float) -> float | None:
    """Bounds PyTorch's allocations to ``fraction`` of what this process can have of the card and says so; returns the bound in GiB, None
    without a card. What an earlier stage has left over in this process is given back first.

    Windows' driver, and with it WSL, pages a card's memory out to the host when it is full: steps then take 50 to 100 times as long
    and nothing is said (training_memory.md, section 6). Below the bound that cannot happen; above it, torch.OutOfMemoryError is raised.
    """
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    bound = fraction * (free + torch.cuda.memory_reserved(device))  # what is reserved already counts against the bound
    index = torch.cuda.current_device() if device.index is None else device.index  # the next call takes no device without one
    torch.cuda.set_per_process_memory_fraction(bound / total, index)
    where = " (WSL: beyond it the driver would page to host memory)" if in_wsl() else ""
    logger.info(
        "memory of this process is bounded to %.1f of the card's %.1f GiB%s; train.memory_fraction", bound / GIB, total / GIB, where
    )
    return bound / GIB


@contextlib.contextmanager
def bounded(device: torch.device, fraction: float, *, what: str, hint: str) -> Iterator[None]:
    """``cap_memory``, and a block in which running out of memory becomes an error with ``hint``; the bound stays. what: who ran out."""
    cap_memory(device, fraction)
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = f"the device's memory is not enough for {what}: {str(error).splitlines()[0]}"
        raise DeepHairError(text, hint=hint, code="out_of_memory") from error
