"""Places spread evenly over a sequence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def evenly(length: int, count: int) -> NDArray[np.int64]:
    """At most ``count`` evenly spaced places of ``length``, ascending, first and last among them; none of nothing."""
    if not length:
        return np.zeros(0, np.int64)
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))
