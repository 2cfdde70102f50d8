"""What benchmarks/stage2_gpu.py measures, one function per arm; each runs in a process of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.lowmem_check import check
from benchmarks.stage2_meter import Setting
from benchmarks.stage2_others import adafactor_hooks, reference
from benchmarks.stage2_ours import capped, ours, profile


def kernel_check(setting: Setting) -> dict[str, Any]:
    """Do the optimizer's kernels agree with their eager definition here?"""
    if setting.device.type != "cuda":
        return {"skipped": "no card; TRITON_INTERPRET=1 python benchmarks/lowmem_check.py"}
    rows = check(setting.device)
    return {"agrees": all(row["agrees"] for row in rows), "rows": rows}


ARMS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "kernel-check": kernel_check,
    "ours": ours,
    "reference-vae": lambda setting: reference(setting, vae=True),
    "ours-vae": lambda setting: ours(setting, vae=True),
    "ours-capped": capped,
    "adafactor-hooks": adafactor_hooks,
    "ours-b2": lambda setting: ours(setting, batch=2),
    "ours-b4": lambda setting: ours(setting, batch=4),
    "reference-cached": lambda setting: reference(setting, vae=False),
    "ours-eager": lambda setting: ours(setting, arithmetic="eager"),
    "ours-compiled": lambda setting: ours(setting, compiled=True),
    "ours-vae-compiled": lambda setting: ours(setting, vae=True, compiled=True),
    "ours-profile": profile,
    **{f"preset-{name}": functools.partial(ours, preset=name) for name in ("full-8gb", "lora", "partial", "full-80gb", "full-exact")},
}


@contextlib.contextmanager
def quiet_failure() -> Iterator[dict[str, Any]]:
    """Collects an arm's result; running out of memory is a result too."""
    result: dict[str, Any] = {}
    try:
        yield result
    except torch.OutOfMemoryError as error:
        result["failed"] = f"out of memory: {str(error).splitlines()[0]}"
