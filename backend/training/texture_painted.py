"""Hair as the painter's autoencoder gives it back, which Stage 1 learns to read beside the photos (DESIGN 4.2).

What Stage 1 judges in the end, a result of Stage 2, comes out of this autoencoder. An encoder that has only seen photos may take its
softer strands for another curl.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from backend import artifacts, console
from backend.config import Config
from backend.imaging import patches
from backend.imaging.decode import write_png
from backend.training.evenly import evenly
from backend.training.prepared import Prepared
from backend.tryon import conditioning

FOLDER, MARK = "stage1_painted", "made_from.json"
_TOGETHER = 8  # photos in the autoencoder at once


def autoencoder_file(config: Config) -> Path:
    """The weights of the base model's autoencoder."""
    return conditioning.inpainting_folder(config.paths.weights) / "vae" / "diffusion_pytorch_model.safetensors"


def painted_styles(config: Config, device: torch.device) -> dict[str, Path]:
    """Style pictures of ``texture.painted`` training photos, evenly spread, after the autoencoder: PNG files by photo id.

    Made once and kept in the checkpoint folder; a stopped run goes on, and another autoencoder, resolution or Stage 0 output makes new
    ones. A photo goes through as Stage 2 sees it, at ``data.resolution``, and its hair's mask is the photo's own.
    """
    prepared = Prepared(config.paths.processed)
    rows = [row for row in prepared.rows("train") if row["curl"] is not None and "style" in row["files"]]
    rows = [rows[number] for number in evenly(len(rows), config.texture.painted)]
    folder = config.paths.checkpoints / FOLDER
    made_from = {"data": prepared.digest, "autoencoder": artifacts.sha256_file(autoencoder_file(config))}
    mark = folder / MARK
    if not mark.is_file() or artifacts.read_json(mark) != made_from:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        artifacts.write_json(mark, made_from)
    files = {row["id"]: folder / Path(row["files"]["style"]).name for row in rows}
    missing = [row for row in rows if not files[row["id"]].is_file()]
    if not missing:
        return files
    base = conditioning.inpainting_folder(config.paths.weights)
    vae = conditioning.load_vae(base, device=device, dtype=conditioning.encoder_dtype(device))
    bar = console.Progress("hair after the autoencoder", len(missing), unit="photo")
    for start in range(0, len(missing), _TOGETHER):
        some = missing[start : start + _TOGETHER]
        photos, masks = zip(*(prepared.picture(row) for row in some), strict=True)
        with torch.no_grad():
            latents, _ = conditioning.encode_latents(vae, conditioning.to_tensor(photos))
            painted = conditioning.to_pictures(conditioning.decode_latents(vae, latents))
        for row, picture, hair in zip(some, painted, masks, strict=True):
            write_png(files[row["id"]], patches.style_picture(picture, hair))
        bar.update(len(some))
    return files
