"""Library networks from a folder of the pretrained parts, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backend.errors import InvalidArtifactError


def load_network(kind: Any, folder: Path, what: str, **options: Any) -> Any:
    """A diffusers or transformers network from the safetensors of a local folder, on the CPU; nothing connects, nothing is unpickled.

    Both libraries fill tensors that the file lacks with random numbers and go on with a warning; here the file must hold them all. Tensors
    that the network does not have are left aside, as in CLIP's one file for its two halves. ``options`` go to ``kind.from_pretrained``.
    Raises InvalidArtifactError, which calls the network ``what``.
    """
    try:
        network, report = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidArtifactError(f"{what} in {folder} cannot be loaded as {kind.__name__}: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InvalidArtifactError(
            f"{what} in {folder} lacks {len(missing)} tensors of {kind.__name__}, first '{missing[0]}'",
            hint="the file is of another network, or of a layout that this version of the library does not know",
        )
    return network
