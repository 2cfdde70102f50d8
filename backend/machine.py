"""What the machine is that this process runs on."""

from __future__ import annotations

import os
import platform


def cores(most: int | None = None) -> int:
    """Processor cores that this process may use, at most ``most``."""
    available = len(os.sched_getaffinity(0))
    return available if most is None else min(available, most)


def in_wsl() -> bool:
    """Whether this Linux runs inside Windows."""
    return "microsoft" in platform.release().lower()
