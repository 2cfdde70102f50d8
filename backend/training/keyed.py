"""Randomness that needs no state: every draw is keyed by (seed, purpose, step), so a resumed run repeats nothing and misses nothing."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def key(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed from a run seed, a purpose and a position; equal arguments give equal keys on every machine."""
    text = "/".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, purpose: str, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose at one position. On the CPU its numbers are the same on every machine; ``device`` draws its own, which is
    quicker where there are many."""
    import torch  # late: a Stage 0 worker takes its keys from here and would hold 500 MB of torch for them

    return torch.Generator(device).manual_seed(key(seed, purpose, *position))


def numpy_generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """The numpy twin of ``torch_generator``."""
    return np.random.default_rng(key(seed, purpose, *position))


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of ``count`` samples in an epoch: int64 (count,), a permutation. Kept for the last two epochs; do not write into it."""
    order = numpy_generator(seed, "order", epoch).permutation(count)
    order.flags.writeable = False
    return order


def batches(count: int, batch_size: int, seed: int, first_step: int, last_step: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (step, indices) for steps ``first_step``..``last_step`` - 1 of a run over ``count`` samples.

    The samples form one endless stream of shuffled epochs, cut into batches, so a batch may straddle two epochs and none is dropped.
    """
    if count < 1:
        raise ValueError("there is no sample to train on")
    for step in range(first_step, last_step):
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        yield step, np.array([epoch_order(count, seed, int(p // count))[p % count] for p in positions])


def warmup_cosine(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Learning-rate factor at 0-based ``step``: linear from 1/warmup to 1, then a half cosine down to ``floor`` (arXiv 1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
