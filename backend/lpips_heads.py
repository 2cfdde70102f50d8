"""The linear heads of LPIPS v0.1 (Zhang et al. 2018), taken from the installed lpips package without unpickling anything.

The package carries them in a pickle. The file is pinned by its digest, so the places of its values are known, and nothing else is read.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.errors import InvalidArtifactError, MissingInputError

SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"  # weights/v0.1/vgg.pth of lpips 0.1.4
_PLACES = ((64, 6001), (128, 5481), (256, 6265), (512, 3425), (512, 1369))  # channels, first byte, of VGG16's five feature maps


def packaged_file() -> Path:
    """The heads for VGG16 in the installed lpips package. Raises MissingInputError where there is none."""
    spec = importlib.util.find_spec("lpips")
    path = Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth" if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise MissingInputError("the package lpips, which carries the LPIPS heads, is not installed", hint="make, or pip install lpips")
    return path


def read_heads(path: Path) -> dict[str, NDArray[np.float32]]:
    """``lin{0..4}.model.1.weight``, each (1, C, 1, 1) float32, from the package's file.

    Raises InvalidArtifactError where the file is not the published one.
    """
    digest = artifacts.sha256_file(path)
    if digest != SHA256:
        raise InvalidArtifactError(f"{path} has sha256 {digest}, the published file of lpips 0.1.4 has {SHA256}", code="wrong_checksum")
    content = path.read_bytes()
    return {
        f"lin{number}.model.1.weight": np.frombuffer(content, "<f4", channels, first).astype(np.float32).reshape(1, channels, 1, 1)
        for number, (channels, first) in enumerate(_PLACES)
    }
