"""The smallest miniature world that runs all stages, built once per test session and shared. Tests that change it copy it first."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from backend.config import REPO_ROOT, Config, load_config
from backend.training import pipeline_run

SETTINGS = {
    "data.workers": 2,
    "data.split": "[0.5,0.2,0.3]",
    "data.patches_per_photo": 4,
    "texture.steps": 4,
    "texture.warmup": 1,
    "texture.batch_size": 8,
    "texture.save_every": 2,
    "train.steps": 6,
    "train.warmup": 1,
    "train.batch_size": 2,
    "train.save_every": 3,
    "train.validate_every": 3,
    "train.preview_every": 6,
    "train.validation_samples": 4,
    "train.texture_every": 2,
    "train.texture_max_timestep": 900,
    "train.log_every": 1,
    "evaluate.samples": 4,
    "evaluate.samples_reconstruction": 4,
    "evaluate.steps": 3,
    "evaluate.bootstrap": 100,
    "evaluate.pictures": 2,
    "sample.steps": 3,
    "gate.force": "six steps on eleven heads are no evidence",
}


@dataclass(frozen=True)
class World:
    """A folder that holds a whole world, and the configuration that works in it."""

    root: Path

    def arguments(self, **changes: object) -> list[str]:
        """The command line that works in this folder; ``changes`` use __ for the dot."""
        paths = {"data.images": "photos", "data.labels": "labels", "paths.processed": "processed", "paths.checkpoints": "checkpoints",
                 "paths.models": "models", "paths.report": "report", "paths.weights": "weights", "paths.jobs": "jobs",
                 "train.start": "weights/deephair/stage2_start.safetensors"}  # fmt: skip
        settings = {**SETTINGS, **{key: self.root / folder for key, folder in paths.items()}}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        return ["--config", str(REPO_ROOT / "configs/demo.yaml"), *(f"{key}={value}" for key, value in settings.items())]

    def config(self, **changes: object) -> Config:
        """The configuration of ``arguments``."""
        return load_config(self.arguments()[1], self.arguments(**changes)[2:])

    def copy(self, target: Path, *folders: str) -> World:
        """A world of its own in ``target`` with copies of the named folders; photos, labels and weights are shared by links."""
        target.mkdir(parents=True, exist_ok=True)
        for name in ("photos", "labels", "weights"):
            (target / name).symlink_to(self.root / name)
        for name in folders:
            shutil.copytree(self.root / name, target / name)
        return World(target)

    def untrained(self, target: Path, *folders: str) -> World:
        """As ``copy``, with this world's prepared data and Stage 1, and no Stage 2 yet."""
        world = self.copy(target, *folders)
        (target / "processed").symlink_to(self.root / "processed")
        (target / "checkpoints").mkdir()
        for name in ("texture_encoder.safetensors", "stage1_metrics.json"):
            shutil.copy(self.root / "checkpoints" / name, target / "checkpoints")
        return world


@pytest.fixture(scope="session")
def raw_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Photos, labels and miniature weights; no stage has run."""
    from backend.demo.khairstyle_set import write_khairstyle
    from backend.demo.miniature import build

    world = World(tmp_path_factory.mktemp("world"))
    write_khairstyle(world.root / "photos", world.root / "labels", heads=11, views=4, size=256, seed=5)
    build(world.root / "weights")
    return world


@pytest.fixture(scope="session")
def schooled_world(raw_world: World) -> World:
    """The same world after Stage 0 and Stage 1, for tests that run Stage 2 themselves; read-only."""
    for _, stage in pipeline_run.stages(raw_world.config(), resume=True)[:2]:
        stage()
    return raw_world


@pytest.fixture(scope="session")
def finished_world(schooled_world: World) -> World:
    """The same world after all four stages; read-only for tests."""
    for _, stage in pipeline_run.stages(schooled_world.config(), resume=True):
        stage()
    return schooled_world


def tree(folder: Path, *, ignore: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Every file below a folder with its bytes, but for lock files and what ``ignore`` names (parts of paths)."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and not any(part in path.as_posix() for part in ignore)
    }
