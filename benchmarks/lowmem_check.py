"""Are the optimizer's Triton kernels right on this device? They are compared with their eager definition on the CPU.

    python benchmarks/lowmem_check.py                      on a card
    TRITON_INTERPRET=1 python benchmarks/lowmem_check.py   without one, in Triton's interpreter

Both draw the same rounding noise, so weights may differ only where float32 sums in another order tip a rounding over.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
from typing import Any

import torch
from torch import nn

from backend.training.lowmem import FusedFactoredAdam, dequantized

SHAPES = [(34, 9, 3, 3), (40, 272), (7,), (1, 2, 48), (1030, 16), (2, 1040), (5, 1)]
UPDATES = 2


def optimizer_pair(
    device: torch.device, dtype: torch.dtype, clip_norm: float | None, momentum: bool
) -> list[tuple[FusedFactoredAdam, dict[str, nn.Parameter]]]:
    """The kernels on ``device`` and the eager twin on the CPU, over equal parameters."""
    draw = torch.Generator().manual_seed(3)
    values = {str(n): (torch.randn(shape, generator=draw) * 0.05).to(dtype) for n, shape in enumerate(SHAPES)}
    pair = []
    for arithmetic, place in (("triton", device), ("eager", torch.device("cpu"))):
        parameters = {name: nn.Parameter(value.clone().to(place)) for name, value in values.items()}
        rates = [(name, parameter, 1e-3) for name, parameter in parameters.items()]
        pair.append(
            (FusedFactoredAdam(rates, weight_decay=0.1, seed=7, clip_norm=clip_norm, momentum=momentum, arithmetic=arithmetic), parameters)
        )
    return pair


def compare(device: torch.device, dtype: torch.dtype, clip_norm: float | None, momentum: bool) -> dict[str, Any]:
    """Runs both for a few updates on equal gradients and returns the largest differences, in the units named."""
    pair = optimizer_pair(device, dtype, clip_norm, momentum)
    draw = torch.Generator().manual_seed(4)
    for number in range(UPDATES):
        # Columns of very different sizes, and outliers that the bound on the update's size cuts.
        gradients = [torch.randn(shape, generator=draw) * torch.rand(shape[-1], generator=draw).pow(4) * 10.0**-number for shape in SHAPES]
        for optimizer, parameters in pair:
            optimizer.begin(number, 0.5 + 0.25 * number)
            loss = torch.stack([(p.float() * g.to(p.device)).sum() for p, g in zip(parameters.values(), gradients, strict=True)]).sum()
            loss.backward()
            optimizer.end()
    (ours, weights), (eager, expected) = pair
    states, wanted = ({k: v.cpu() for k, v in optimizer.tensors().items()} for optimizer in (ours, eager))
    ulp = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
    different = far = total = 0
    momentum_steps = moments = 0.0
    for name, parameter in expected.items():
        got, want = weights[name].detach().cpu().float(), parameter.detach().float()
        gap = (got - want).abs()
        different += int((gap > 0).sum())
        far += int((gap > 4 * ulp * want.abs() + 1e-7).sum())
        total += gap.numel()
        if momentum:
            momenta = [dequantized(s[f"{name}|momentum"], s[f"{name}|scale"], parameter.shape) for s in (states, wanted)]
            quantum = wanted[f"{name}|scale"].repeat_interleave(256)[: parameter.numel()].view(parameter.shape)
            momentum_steps = max(momentum_steps, float(((momenta[0] - momenta[1]).abs() / quantum.clamp_min(1e-30)).max()))
        for field in ("row", "column"):
            theirs = wanted[f"{name}|{field}"]
            moments = max(moments, float(((states[f"{name}|{field}"] - theirs).abs() / theirs).max()))
    norms = [float(s["clipping|previous_square"]) ** 0.5 for s in (states, wanted)]
    return {
        "dtype": str(dtype).removeprefix("torch."), "clip_norm": clip_norm, "momentum": momentum, "weights_different_share": different / total,
        "weights_far_share": far / total, "momentum_max_steps": momentum_steps, "second_moment_max_relative": moments,
        "norm_relative": abs(norms[0] - norms[1]) / norms[1],
    }  # fmt: skip


def agrees(row: dict[str, Any]) -> bool:
    """Whether the differences are those of float32 rounding: hardly a weight is further off than its last bits, no momentum by more
    than the steps of 8 bits that a tipped rounding makes."""
    return bool(
        row["weights_far_share"] < 1e-3
        and (row["dtype"] == "float32" or row["weights_different_share"] < 0.01)
        and row["momentum_max_steps"] < 2.01
        and row["second_moment_max_relative"] < 1e-4
        and row["norm_relative"] < 1e-4
    )


def check(device: torch.device) -> list[dict[str, Any]]:
    """Both weight types, both kinds of clipping, with and without momentum; each row says whether it agrees."""
    kinds = ((torch.bfloat16, None, True), (torch.float32, 0.5, True), (torch.bfloat16, None, False))
    rows = [compare(device, *kind) for kind in kinds]
    return [{**row, "agrees": agrees(row)} for row in rows]


def main() -> int:
    """Prints one JSON object per combination; exit code 1 when one does not agree."""
    rows = check(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for row in rows:
        print(json.dumps(row))
    return 0 if all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
