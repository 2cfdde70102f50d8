"""The texture encoder by itself: curl and volume of hair pictures (``deephair texture predict IMAGE...``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backend import artifacts
from backend.config import Config
from backend.errors import MissingInputError
from backend.imaging.decode import decode_reference, read_png, sniff
from backend.imaging.patches import cut_patches
from backend.training.models.texture_encoder import CURL_CLASSES, VOLUME_CLASSES, TextureEncoder, load_texture_encoder
from backend.training.texture_data import Pictures, fit_patch, to_unit
from backend.training.train_texture import RESULT


def predict(config: Config, images: Sequence[Path]) -> list[dict[str, Any]]:
    """Curl and volume of each picture, with the probability of every class, averaged over its patches.

    A picture is either a close-up that hair fills (a hair patch; a longer one is cut into squares), or a PNG whose alpha is the hair
    mask of a head crop, as Stage 0 writes it; then patches are cut as Stage 0 does. Raises MissingInputError for a missing file or
    encoder, ImageError for a picture that cannot be read or shows no patch of hair.
    """
    path = config.paths.checkpoints / RESULT
    if not path.is_file():
        raise MissingInputError(f"there is no texture encoder at {path}", hint="run 'deephair texture' first, or set paths.checkpoints")
    encoder = load_texture_encoder(path)
    side = int(artifacts.read_header(path)["config"]["image_size"])
    return [{"image": str(image), **_predict_one(encoder, hair_patches(config, image, side))} for image in images]


def hair_patches(config: Config, path: Path, side: int) -> Pictures:
    """The patches of one picture, (N, side, side, 3) uint8 RGB with N >= 1; ``predict`` says what a picture may be."""
    if not path.is_file():
        raise MissingInputError(f"there is no picture at {path}")
    data = path.read_bytes()
    stored = read_png(path) if sniff(data) == "PNG" else None
    if stored is not None and stored.ndim == 3 and stored.shape[2] == 4:
        size, count = config.data.patch_size, config.data.patches_per_photo
        patches = [
            p.image for p in cut_patches(stored[..., :3], stored[..., 3], size=size, count=count, min_hair=config.data.patch_min_hair)
        ]
        if not patches:
            raise MissingInputError(f"{path} has no window that hair fills", hint="give a close-up of the hair instead", code="no_hair")
    else:
        patches = _squares(decode_reference(data, max_pixels=config.data.max_pixels))
    return np.stack([fit_patch(patch, side) for patch in patches])


def _squares(image: Pictures) -> list[Pictures]:
    """The fewest squares of the short side that cover the picture, evenly spaced."""
    height, width = image.shape[:2]
    side = min(height, width)
    count = -(-max(height, width) // side)
    starts = np.linspace(0, max(height, width) - side, count).round().astype(int)
    return [image[s : s + side] if height > width else image[:, s : s + side] for s in starts]


@torch.inference_mode()
def _predict_one(encoder: TextureEncoder, patches: Pictures) -> dict[str, Any]:
    output = encoder(to_unit(torch.from_numpy(patches)))
    result: dict[str, Any] = {"patches": len(patches)}
    for name, logits, classes in (("curl", output.curl_logits, CURL_CLASSES), ("volume", output.volume_logits, VOLUME_CLASSES)):
        shares = logits.softmax(1).mean(0).tolist()
        best = int(np.argmax(shares))
        result[name] = {"class": best, "name": classes[best], "probabilities": dict(zip(classes, shares, strict=True))}
    return result
