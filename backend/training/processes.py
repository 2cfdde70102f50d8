"""One process or several that train one model: each takes its share of the batch, and what they compute is put together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from backend.errors import UsageError

BUCKET_BYTES = 64 * 2**20
PATIENCE = timedelta(days=1)  # the others wait while the first encodes all photos; one that dies ends the rest at once, by its launcher


@dataclass(frozen=True)
class Processes:
    """Where this process computes, and which of how many it is. One alone communicates with nobody."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def first_one_first(self) -> Iterator[None]:
        """The block runs in the first process, then in the others, which find there what it has written."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def any_of(self, flag: bool) -> bool:
        """Whether the flag is up in any process: all of them get one answer, and so stop together."""
        if self.count == 1:
            return flag
        raised = torch.tensor([float(flag)], device=self.device)
        torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX)
        return bool(raised.item())

    def rows(self, total: int) -> slice:
        """This process's rows of a batch of ``total``, which all share evenly."""
        share = total // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def all_rows(self, outputs: Tensor) -> Tensor:
        """The outputs of all processes, in rank order; only the own part carries gradients."""
        if self.count == 1:
            return outputs
        parts = [torch.empty_like(outputs) for _ in range(self.count)]
        torch.distributed.all_gather(parts, outputs.detach().contiguous())
        parts[self.rank] = outputs
        return torch.cat(parts)

    def average(self, gradients: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, in buckets of one type. Every process gives the same tensors in order."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for gradient in gradients:
            if bucket and (bucket[0].dtype != gradient.dtype or sum(t.nbytes for t in bucket) >= BUCKET_BYTES):
                self._average(bucket)
                bucket = []
            bucket.append(gradient)
        if bucket:
            self._average(bucket)

    def _average(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([t.reshape(-1) for t in bucket]).div_(self.count)
        torch.distributed.all_reduce(flat)
        for tensor, mean in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def join_processes(device: str) -> Processes:
    """One process, or one of those that ``accelerate launch`` or ``torchrun`` started (they set WORLD_SIZE).

    device: ``cpu``, ``cuda`` or ``auto``. Raises UsageError when ``cuda`` is wanted and there is no card.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda, and PyTorch sees no CUDA card", hint="check the driver with nvidia-smi, or set device=cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
        return Processes(state.device, state.process_index, state.num_processes)
    return Processes(torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"))
