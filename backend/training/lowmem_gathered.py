"""The 12 GB optimizer in an ordinary loop: gradients of all micro-batches are gathered, averaged, clipped by their own norm, then applied."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from backend.training.lowmem import Arithmetic, FusedFactoredAdam
from backend.training.processes import Processes


class GatheredFactoredAdam(FusedFactoredAdam):
    """FusedFactoredAdam's update without its restriction: gradients stay until ``end``, so accumulation and clipping are exact.

    accumulate: number of backward passes between ``begin`` and ``end``; their losses are means over equal shares. processes: gradients are
    averaged over them first. Both means are taken in float32, so that two processes update as one with two passes; a single pass in a
    single process leaves the gradient as it is.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter, float]],
        *,
        weight_decay: float,
        seed: int,
        clip_norm: float,
        accumulate: int = 1,
        processes: Processes | None = None,
        arithmetic: Arithmetic = "auto",
    ) -> None:
        self._bound, self._accumulate, self._processes = clip_norm, accumulate, processes
        self._single = accumulate == 1 and (processes is None or processes.count == 1)
        self._sums: dict[str, torch.Tensor] = {}
        super().__init__(parameters, weight_decay=weight_decay, seed=seed, clip_norm=clip_norm, arithmetic=arithmetic)

    def begin(self, update: int, factor: float) -> None:
        """As the base's; what an abandoned step gathered is dropped."""
        super().begin(update, factor)
        self._sums.clear()

    @torch.no_grad()
    def end(self) -> None:
        """Applies the update. Call after the last backward pass."""
        slots = [slot for slot in self._slots.values() if slot.name in self._sums]
        if self._processes is not None:
            self._processes.average(self._sums[slot.name] for slot in slots)
        norm = torch.stack([self._sums[slot.name].float().square().sum() for slot in slots]).sum().sqrt()
        self._scale = (self._bound / (norm + 1e-6)).clamp(max=1.0)
        for slot in slots:
            self._take(slot, self._sums.pop(slot.name))
        super().end()

    def receive(self, name: str, gradient: torch.Tensor) -> None:
        """Keeps the gradient, or adds it to those of the passes before."""
        if self._single:
            self._sums[name] = gradient
        elif name in self._sums:
            self._sums[name].add_(gradient, alpha=1 / self._accumulate)
        else:
            self._sums[name] = gradient.float() / self._accumulate
