"""Hair after the autoencoder, for Stage 1: what is made of it, when, and who sees it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from backend import artifacts
from backend.config import Config
from backend.demo import miniature
from backend.imaging import patches
from backend.imaging.decode import read_png, write_png
from backend.training.models.supcon import UNKNOWN
from backend.training.texture_data import WINDOWS, read_patch_tables
from backend.training.texture_painted import FOLDER, painted_styles
from backend.tryon import conditioning

CPU = torch.device("cpu")
SIDE = 64


def write_photo(folder: Path, number: int, *, split: str, curl: int | None) -> dict[str, object]:
    """One photo of Stage 0: a smooth picture with a disc of hair."""
    rng = np.random.default_rng(number)
    photo = cv2.resize(rng.integers(0, 255, (8, 8, 3), np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    hair = cv2.circle(np.zeros((SIDE, SIDE), np.uint8), (32, 24), 18, 255, -1)
    names = {kind: f"{split}/{number}_{kind}.png" for kind in ("bald", "hair_only", "style")}
    write_png(folder / names["bald"], np.where(hair[..., None] > 0, np.uint8(0), photo))
    write_png(folder / names["hair_only"], np.dstack([photo, hair]))
    write_png(folder / names["style"], patches.style_picture(photo, hair))
    return {"id": f"photo{number}", "split": split, "group": f"head{number}", "curl": curl, "volume": 1, "patches": [], "files": names}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rows = [write_photo(tmp_path / "processed", number, split="train", curl=number % 4) for number in range(5)]
    rows += [write_photo(tmp_path / "processed", 5, split="train", curl=None), write_photo(tmp_path / "processed", 6, split="val", curl=0)]
    artifacts.write_jsonl(tmp_path / "processed/metadata.jsonl", rows)  # type: ignore[arg-type]
    miniature.create("vae", tmp_path / "weights")
    paths = {name: tmp_path / name for name in ("processed", "checkpoints", "weights")}
    return Config.model_validate({"name": "test", "device": "cpu", "paths": paths, "texture": {"painted": 100}})


def asking(config: Config, painted: int) -> Config:
    return config.model_copy(update={"texture": config.texture.model_copy(update={"painted": painted})})


def test_the_hair_is_what_the_autoencoder_gives_back(config: Config) -> None:
    files = painted_styles(config, CPU)
    assert sorted(files) == [f"photo{number}" for number in range(5)]  # of the training split, and with a curl to learn
    vae = conditioning.load_vae(conditioning.inpainting_folder(config.paths.weights), device=CPU, dtype=torch.float32)
    hair = read_png(config.paths.processed / "train/3_hair_only.png")[..., 3]
    photo = np.where(
        hair[..., None] > 0,
        read_png(config.paths.processed / "train/3_hair_only.png")[..., :3],
        read_png(config.paths.processed / "train/3_bald.png"),
    )
    with torch.no_grad():
        latents = vae.encode(conditioning.to_tensor([photo])).latent_dist.mean
        back = conditioning.to_pictures(vae.decode(latents).sample)[0]
    expected, found = patches.style_picture(back, hair).astype(int), read_png(files["photo3"]).astype(int)
    assert np.abs(found - expected).max() <= 1  # another batch size may round otherwise
    assert np.abs(found - patches.style_picture(photo, hair).astype(int)).mean() > 5


def test_only_training_sees_it_and_only_as_windows(config: Config) -> None:
    plain, more = read_patch_tables(config.paths.processed), read_patch_tables(config.paths.processed, painted_styles(config, CPU))
    assert len(more["train"]) == len(plain["train"]) + 5 * WINDOWS and len(more["val"]) == len(plain["val"])
    new = [n for n, path in enumerate(more["train"].paths) if FOLDER in path.parts]
    assert len(new) == 5 * WINDOWS and set(more["train"].window[new]) == set(range(WINDOWS))
    assert set(more["train"].curl[new]) == {0, 1, 2, 3} and set(more["train"].volume[new]) == {UNKNOWN}


def test_what_is_there_is_kept_and_what_fits_no_longer_is_made_anew(config: Config) -> None:
    few = painted_styles(asking(config, 2), CPU)
    assert sorted(few) == ["photo0", "photo4"]  # evenly spread
    files = painted_styles(config, CPU)
    times = {name: path.stat().st_mtime_ns for name, path in files.items()}
    files["photo2"].unlink()  # a run that was killed before it came here
    again = {name: path.stat().st_mtime_ns for name, path in painted_styles(config, CPU).items()}
    assert {name for name in times if again[name] != times[name]} == {"photo2"}
    before = files["photo1"].read_bytes()
    miniature.create("vae", config.paths.weights, seed=1)
    assert painted_styles(config, CPU)["photo1"].read_bytes() != before
