"""``deephair tryon``: the pipeline on files and folders, without a server."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backend import artifacts, console
from backend.config import Config
from backend.errors import DeepHairError, MissingInputError, UsageError
from backend.imaging.decode import Photo, decode_mask, decode_portrait, decode_reference, encode_png
from backend.tryon.pipeline import TryOn, TryOnRequest
from backend.tryon.values import sampling_of

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def try_on_files(config: Config, options: argparse.Namespace) -> int:
    """Reads the photos, tries the hair on and writes the pictures, each of them whole or not at all.

    PHOTO may be a folder: each picture in it is done, OUT is the folder of the results, and a photo that cannot be worked with is named
    and skipped (exit code 3). Raises UsageError, MissingInputError, ImageError, TryOnError.
    """
    reference = decode_reference(_bytes(options.reference), max_pixels=_max_pixels(config)) if options.reference else None
    if Path(options.photo).is_dir():
        return _try_on_folder(config, options, reference)
    request = _request(options, config, _read(options.photo, config), reference)
    request.check()  # before the model is loaded for nothing
    sampling_of(config.sample, request.steps, request.guidance, request.strength)
    content = _paint(TryOn.load(config), config, options, request)
    if options.output == "-":
        sys.stdout.buffer.write(content)
    else:
        artifacts.write_bytes(Path(options.output), content)
    return console.DONE


def _try_on_folder(config: Config, options: argparse.Namespace, reference: NDArray[np.uint8] | None) -> int:
    photos = sorted(path for path in Path(options.photo).iterdir() if path.suffix.lower() in SUFFIXES)
    if options.output == "-" or options.mask:
        raise UsageError("a folder of photos goes into a folder, and each photo would want a mask of its own", hint="name one photo")
    if not photos:
        raise MissingInputError(f"there is no picture in {options.photo}", hint=f"pictures end in {', '.join(SUFFIXES)}")
    tryon, failed = TryOn.load(config), 0
    for photo in photos:
        try:
            content = _paint(tryon, config, options, _request(options, config, _read(str(photo), config), reference))
        except DeepHairError as error:
            if error.code in ("nothing_to_try", "usage", "few_step"):
                raise
            failed += 1
            logger.warning("%s: %s", photo.name, error)
            continue
        artifacts.write_bytes(Path(options.output) / f"{photo.stem}.png", content)
    return console.REJECTED_ITEMS if failed else console.DONE


def _paint(tryon: TryOn, config: Config, options: argparse.Namespace, request: TryOnRequest) -> bytes:
    progress = console.Progress("painting", sampling_of(config.sample, request.steps, request.guidance, request.strength)[0], unit="step")
    result = tryon.run(request, on_step=lambda done, total: progress.update())
    if options.json:
        sys.stderr.write(json.dumps(result.info) + "\n")
    return encode_png(result.image, profile=request.profile)


def _request(options: argparse.Namespace, config: Config, target: Photo, reference: NDArray[np.uint8] | None) -> TryOnRequest:
    return TryOnRequest(
        target=target.pixels,
        profile=target.profile,
        reference=reference,
        prompt=options.prompt or None,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        face=options.face,
        mask=decode_mask(_bytes(options.mask), max_pixels=_max_pixels(config)) if options.mask else None,
        mode=options.mode,
        strength=options.strength,
        length=options.length,
        curl=options.curl,
        color=options.color,
        bangs=options.bangs,
    )


def _max_pixels(config: Config) -> int:
    return int(config.app.max_megapixels * 1e6)


def _read(name: str, config: Config) -> Photo:
    return decode_portrait(_bytes(name), max_pixels=_max_pixels(config))


def _bytes(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except FileNotFoundError as error:
        raise MissingInputError(f"no photo at {name}") from error
