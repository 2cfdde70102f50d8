"""Large miniature weights as the repository holds them: 8 bits a value, with a scale for each output channel.

``miniature.build`` expands them to half precision, so every other part of the program reads ordinary files. Scores on a part's card are
those of the expanded weights.
"""

from __future__ import annotations

from pathlib import Path

import torch

from backend import artifacts

FORMAT = "deephair-int8-1"
SMALLEST = 1024  # values; smaller tensors, norms and biases keep half precision
_SCALE = "|scale"


def squeeze(path: Path) -> None:
    """Rewrites a safetensors file in 8 bits; one that is in that form already is left alone."""
    header = artifacts.read_header(path)
    if header.get("format") == FORMAT:
        return
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in artifacts.load_tensors(path).items():
        if not tensor.is_floating_point():
            stored[name] = tensor
        elif tensor.ndim < 2 or tensor.numel() < SMALLEST:
            stored[name] = tensor.half()
        else:
            flat = tensor.float().flatten(1)
            scale = (flat.abs().amax(dim=1) / 127).clamp_min(1e-12)
            stored[name] = (flat / scale[:, None]).round().to(torch.int8).view(tensor.shape)
            stored[name + _SCALE] = scale
    artifacts.save_tensors(path, stored, {"format": FORMAT, "header": header})


def expand(source: Path, target: Path) -> bool:
    """Writes the half-precision form of a squeezed file; False, and nothing written, for a file of another kind."""
    header = artifacts.read_header(source)
    if header.get("format") != FORMAT:
        return False
    stored = artifacts.load_tensors(source)
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE):
            continue
        scale = stored.get(name + _SCALE)
        if scale is None:
            tensors[name] = tensor
        else:
            tensors[name] = (tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))).half()
    artifacts.save_tensors(target, tensors, header["header"])
    return True
