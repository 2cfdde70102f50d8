"""``deephair tryon``: the pipeline on files, without a server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backend import artifacts, console
from backend.config import Config
from backend.errors import MissingInputError
from backend.imaging.decode import decode_upload, encode_png
from backend.tryon.pipeline import TryOn, TryOnRequest


def try_on_files(config: Config, options: argparse.Namespace) -> int:
    """Reads the photos, tries the hair on and writes the picture; all of it or nothing."""
    target = _read(options.photo, config)
    reference = _read(options.reference, config) if options.reference else None
    progress = console.Progress("painting", config.sample.steps, unit="step")
    request = TryOnRequest(target, reference, options.prompt or None, seed=options.seed, face=options.face)
    result = TryOn.load(config).run(request, on_step=lambda done, total: progress.update())
    content = encode_png(result.image)
    if options.output == "-":
        sys.stdout.buffer.write(content)
    else:
        artifacts.write_bytes(Path(options.output), content)
    if options.json:
        sys.stderr.write(json.dumps(result.info) + "\n")
    return console.DONE


def _read(name: str, config: Config) -> NDArray[np.uint8]:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except FileNotFoundError as error:
        raise MissingInputError(f"no photo at {name}") from error
    return decode_upload(data, max_pixels=int(config.app.max_megapixels * 1e6))
