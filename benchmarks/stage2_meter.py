"""How an arm of benchmarks/stage2_gpu.py is timed and its memory read."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from backend.training.lowmem import Arithmetic
from benchmarks.stage2_parts import Size

GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What the command line asks of an arm. seconds: the most that its steps may take together."""

    size: Size
    device: torch.device
    warmup: int
    steps: int
    seconds: float
    cap_gib: float
    arithmetic: Arithmetic


@dataclass
class Meter:
    """Times steps on the device's own clock and reads the allocator's peaks."""

    setting: Setting

    def run(self, step: Callable[[int], float], batch: int) -> dict[str, Any]:
        """``step(n)`` trains once and returns its loss. Warm-up takes at most a third of the seconds; the first step, in which kernels are
        compiled, is not counted among them."""
        self.reset()
        losses = self._steps(step, 0, 1, 0.0)[1]
        losses += self._steps(step, 1, max(0, self.setting.warmup - 1), self.setting.seconds / 3)[1]
        warmed = len(losses)
        marks, more = self._steps(step, warmed, self.setting.steps, self.setting.seconds * 2 / 3)
        losses += more
        times = [after - before for before, after in itertools.pairwise(marks)]
        return {
            "batch": batch, "warmup_steps": warmed, "timed_steps": len(times), "median_ms": round(1000 * statistics.median(times), 2),
            "samples_per_s": round(batch * len(times) / (marks[-1] - marks[0]), 3), "loss_first": losses[0], "loss_last": losses[-1],
            **self.peaks(),
        }  # fmt: skip

    def _steps(self, step: Callable[[int], float], first: int, count: int, seconds: float) -> tuple[list[float], list[float]]:
        """Moments in seconds before the first and after each step, and the losses."""
        began, losses, marks = time.perf_counter(), [], [self._mark()]
        for number in range(first, first + count):
            losses.append(step(number))
            marks.append(self._mark())
            if time.perf_counter() - began > seconds:
                break
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()
            return [marks[0].elapsed_time(mark) / 1000 for mark in marks], losses
        return marks, losses

    def _mark(self) -> Any:
        if self.setting.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reset(self) -> None:
        """Peaks count from here."""
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, float]:
        """Peaks since ``reset`` in GiB, and what the device has in use now, by all processes; nothing on a CPU."""
        if self.setting.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info()
        peaks = {"peak_allocated_gib": torch.cuda.max_memory_allocated(), "peak_reserved_gib": torch.cuda.max_memory_reserved()}
        return {name: round(value / GIB, 3) for name, value in {**peaks, "device_used_gib": total - free}.items()}
