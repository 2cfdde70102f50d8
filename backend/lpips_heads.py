"""The linear heads of LPIPS v0.1 (Zhang et al. 2018), taken from the installed lpips package without unpickling anything.

The package carries them as a torch.save file of before torch 1.6: five pickles, then each tensor's length and its float32 values. Here the
pickles are only walked, opcode by opcode, for the names and the order of the tensors; no opcode is executed.
"""

from __future__ import annotations

import importlib.util
import io
import struct
from pathlib import Path
from pickletools import genops
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.errors import InvalidArtifactError, MissingInputError

SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"  # weights/v0.1/vgg.pth of lpips 0.1.4
CHANNELS = (64, 128, 256, 512, 512)  # of the five VGG16 feature maps


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
    return parse_heads(path.read_bytes())


def parse_heads(content: bytes) -> dict[str, NDArray[np.float32]]:
    """What ``read_heads`` does with the bytes, whatever their digest. Raises InvalidArtifactError for any other layout."""
    stream = io.BytesIO(content)
    try:
        pickles = [
            [argument for _, argument, _ in genops(stream)] for _ in range(5)
        ]  # magic, protocol, system, tensors, order of the storages
        of_storage = _names_by_storage(pickles[3])
        heads = {}
        for storage in (argument for argument in pickles[4] if isinstance(argument, str)):
            (count,) = struct.unpack("<q", stream.read(8))
            values = np.frombuffer(stream.read(4 * count), "<f4").astype(np.float32)
            heads[of_storage[storage]] = values.reshape(1, count, 1, 1)
    except (ValueError, KeyError, struct.error) as error:
        raise InvalidArtifactError(f"these are not LPIPS' heads in torch's old file format: {error}") from error
    if {name: head.shape[1] for name, head in heads.items()} != {f"lin{k}.model.1.weight": count for k, count in enumerate(CHANNELS)}:
        raise InvalidArtifactError(f"LPIPS has five heads for {CHANNELS} channels, these are {sorted(heads)}")
    return heads


def _names_by_storage(arguments: list[Any]) -> dict[str, str]:
    """Each tensor's name by its storage's key: in the pickle a name is followed by the key, which is a decimal number written as text."""
    names, current = {}, ""
    for argument in arguments:
        if isinstance(argument, str) and argument.endswith(".weight"):
            current = argument
        elif isinstance(argument, str) and argument.isdecimal():
            names[argument] = current
    return names
