"""An exponential moving average of a network's weights, beside the network itself."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


def follow(average: Mapping[str, Tensor], live: Mapping[str, Tensor], decay: float, step: int) -> None:
    """average <- d * average + (1 - d) * live in place, for two states of one network; what is not floating point is copied.

    d is ``decay``, and at first (step + 1) / (step + 10), so that the weights of the start do not stay in the average. step: from 0.
    """
    decay = min(decay, (step + 1) / (step + 10))
    moving = [name for name, value in average.items() if value.is_floating_point()]
    if moving:
        get_ema_multi_avg_fn(decay)([average[name] for name in moving], [live[name] for name in moving], None)
    for name in average.keys() - set(moving):
        average[name].copy_(live[name])
