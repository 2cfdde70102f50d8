"""A small Stage 1 set of drawn strands, and what the tests of Stage 1 share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from backend import artifacts
from backend.config import Config
from backend.training.models.texture_encoder import new_encoder

LAYERS = (1, 1, 1, 1)
ROOT = Path(__file__).resolve().parents[1]


def draw_patch(curl: int, volume: int, colour: np.ndarray, rng: np.random.Generator, side: int = 32) -> np.ndarray:
    """Strands: parallel lines whose waviness is the curl, and whose width is the volume; (side, side, 3) uint8 RGB."""
    scale = 4
    canvas = np.empty((side * scale, side * scale, 3), np.float32)
    canvas[:] = colour * 0.7
    along = np.arange(0, side * scale, 2)
    waves = (0.0, 1.0, 2.0, 4.0)[curl]
    for start in np.arange(-10, side * scale + 10, (7, 14, 28)[volume]):
        phase = rng.uniform(0, 2 * math.pi)
        across = start + rng.normal(0, 1) + (8 if waves else 0) * np.sin(2 * math.pi * waves * along / (side * scale) + phase)
        points = np.stack([across, along], axis=1).round().astype(np.int32)
        shade = tuple(float(v) for v in colour * rng.uniform(0.9, 1.3))
        cv2.polylines(canvas, [points], False, shade, (3, 6, 12)[volume], cv2.LINE_AA)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).clip(0, 255).round().astype(np.uint8)


def write_set(processed: Path, *, heads: int, photos: int = 2, patches: int = 3, side: int = 32, seed: int = 0) -> None:
    """A Stage 0 output folder as far as Stage 1 reads it, 12 heads of a split at a time. Some heads lack a label."""
    rng = np.random.default_rng(seed)
    folder = processed / "hair_patches"
    folder.mkdir(parents=True)
    rows = []
    for head in range(heads):
        curl, volume = head % 4, (head // 4) % 3
        colour = rng.uniform(30, 190, 3)
        split = ("train", "val", "test", "train", "train")[(head // 12) % 5]
        for photo in range(photos):
            identifier = f"CP{head:06d}-{photo:03d}"
            names = [f"hair_patches/{identifier}_{k:03d}.png" for k in range(patches)]
            for name in names:
                cv2.imwrite(str(processed / name), draw_patch(curl, volume, colour, rng, side)[..., ::-1])
            rows.append({"id": identifier, "group": f"g{head}", "split": split, "curl": None if head % 6 == 5 else curl,
                         "volume": None if head % 5 == 4 else volume, "phase": "after", "patches": names})  # fmt: skip
    artifacts.write_jsonl(processed / "metadata.jsonl", rows)


def write_start(weights: Path) -> None:
    """A ResNet file of torchvision's layout, in half precision, as the miniature's is."""
    (weights / "resnet50").mkdir(parents=True)
    state = new_encoder(LAYERS, dropout=0.0, seed=1).backbone.state_dict()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file({**halves, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, weights / "resnet50" / "model.safetensors")


def configured(root: Path, **texture: Any) -> Config:
    defaults = {
        "layers": LAYERS,
        "image_size": 32,
        "steps": 4,
        "batch_size": 4,
        "warmup": 1,
        "save_every": 2,
        "keep": 1,
        "precision": "fp32",
        "workers": 0,
    }
    paths = {"processed": root / "processed", "checkpoints": root / "checkpoints", "weights": root / "weights"}
    return Config.model_validate({"name": "test", "device": "cpu", "paths": paths, "texture": {**defaults, **texture}})


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four heads, half of them for validation: enough to run on."""
    root = tmp_path_factory.mktemp("few")
    write_set(root / "processed", heads=24, photos=1, patches=2)
    write_start(root / "weights")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty heads in processed/, and start weights; read by all tests, written by none."""
    root = tmp_path_factory.mktemp("texture")
    write_set(root / "processed", heads=60)
    write_start(root / "weights")
    return root


def own(shared: Path, root: Path) -> Path:
    """The same data with a checkpoint folder of one's own."""
    for name in ("processed", "weights"):
        (root / name).symlink_to(shared / name)
    return root


@pytest.fixture
def root(few: Path, tmp_path: Path) -> Path:
    return own(few, tmp_path)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
