"""What the machine is that this process runs on."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import resource
import subprocess
import sys

logger = logging.getLogger(__name__)

ALLOCATOR, ALLOCATOR_NAMES = "expandable_segments:True", ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3  # malloc.h


def cores(most: int | None = None) -> int:
    """Processor cores that this process may use, at most ``most``."""
    available = len(os.sched_getaffinity(0))
    return available if most is None else min(available, most)


def in_wsl() -> bool:
    """Whether this Linux runs inside Windows."""
    return "microsoft" in platform.release().lower()


def choose_allocator() -> None:
    """Has PyTorch's allocator grow the segments that it has on a card, so that less is lost to gaps between them. Call it before anything lies
    on the card: the variable is read once. What a person has set stays.

    Under WSL some drivers fail at the first allocation of this kind (pytorch issue 192330), so it is tried in a process of its own first.
    """
    if any(name in os.environ for name in ALLOCATOR_NAMES):
        return
    if in_wsl() and not _allocates():
        logger.warning(
            "this driver cannot do %s=%s under WSL; training goes on without, and needs a little more of the card",
            ALLOCATOR_NAMES[0],
            ALLOCATOR,
        )
        return
    os.environ[ALLOCATOR_NAMES[0]] = ALLOCATOR


def _allocates() -> bool:
    """Whether a new process can allocate on the card with ``ALLOCATOR``; yes where there is no card."""
    script = "import torch\nif torch.cuda.is_available(): torch.zeros(1, device='cuda')"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, ALLOCATOR_NAMES[0]: ALLOCATOR}, capture_output=True, check=False
    )
    return done.returncode == 0


def forbid_core_dumps() -> None:
    """Has this process and those that it starts leave no image of their memory when they crash: faces and prompts are in it.

    One byte and not none: where a program takes the images in, as under WSL, the kernel ignores a limit of 0 and takes 1 for "do not" (core(5)).
    """
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    limit = 0 if hard == 0 else 1
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def give_memory_back() -> None:
    """Has glibc return freed pictures to the system at once, in this process; other C libraries are left alone.

    By itself it keeps them: each thread has an arena, and once a picture was freed, others of its size come from an arena, too. The HTTP
    process then grew from 147 to 198 MB over 200 jobs; with this it stays at about 100.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
