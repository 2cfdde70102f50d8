"""Several processes that train one model, started by ``accelerate launch``: each draws its share of the batch, gradients are averaged."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

BUCKET_BYTES = 64 * 2**20


class Processes:
    """This process among all. One process needs no launcher and communicates with nobody."""

    def __init__(self, device: torch.device) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), 0
        self.device = device
        self._state = None
        if self.count > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=device.type == "cpu")
            self.rank, self.device = self._state.process_index, self._state.device

    @property
    def is_main(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def rows(self, total: int) -> slice:
        """This process's rows of a batch of ``total``, which all share evenly."""
        share = total // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def average(self, gradients: Iterable[torch.Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, in buckets of one type. Every process gives the same tensors in order."""
        if self.count == 1:
            return
        bucket: list[torch.Tensor] = []
        for gradient in gradients:
            if bucket and (bucket[0].dtype != gradient.dtype or sum(t.nbytes for t in bucket) >= BUCKET_BYTES):
                self._average(bucket)
                bucket = []
            bucket.append(gradient)
        if bucket:
            self._average(bucket)

    def _average(self, bucket: list[torch.Tensor]) -> None:
        flat = torch.cat([t.reshape(-1) for t in bucket]).div_(self.count)
        torch.distributed.all_reduce(flat)
        for tensor, mean in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(mean.view_as(tensor))
