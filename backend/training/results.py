"""What each stage says of itself, kept beside its output for the final report."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from backend import artifacts, weights
from backend.config import REPO_ROOT, Config
from backend.errors import MissingInputError
from backend.machine import cores

_KEYS = {
    "prepare": ("seconds", "inputs", "accepted", "quarantined"),
    "train": ("seconds", "steps", "loss_first", "loss_last"),
}


def _path(config: Config, stage: str) -> Path:
    folder = config.paths.processed if stage == "prepare" else config.paths.checkpoints
    return folder / f"{stage}_result.json"


def record(config: Config, stage: str, result: dict[str, Any]) -> None:
    """Keeps a stage's result. A stage that found nothing to do does not call this, so the time of the real work stays."""
    artifacts.write_json(_path(config, stage), {key: result.get(key) for key in _KEYS[stage]})


def read(config: Config, stage: str) -> dict[str, Any]:
    """The recorded result; all values None when the stage was run elsewhere."""
    path = _path(config, stage)
    return dict(artifacts.read_json(path)) if path.is_file() else dict.fromkeys(_KEYS[stage])


def recorded(config: Config, stage: str) -> bool:
    """Whether a result is kept."""
    return _path(config, stage).is_file()


def require_prepared(config: Config) -> None:
    """Raises MissingInputError when Stage 0 has not run."""
    if not (config.paths.processed / "metadata.jsonl").is_file():
        raise MissingInputError(f"no prepared data at {config.paths.processed}", hint="run Stage 0 first: deephair prepare")


def shown_path(path: Path) -> str:
    """A path for reports: from the checkout where it lies inside it."""
    return path.relative_to(REPO_ROOT).as_posix() if path.is_relative_to(REPO_ROOT) else path.as_posix()


def environment(config: Config) -> dict[str, Any]:
    """Where figures were measured: versions, device, weights, commit."""
    import torch

    cuda = torch.cuda.is_available() and config.device != "cpu"
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": cores(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "libraries": {name: metadata.version(name) for name in ("torch", "diffusers", "transformers", "numpy", "opencv-python-headless")},
        "weights": weights.describe(config.paths.weights),
        "git_commit": git_commit(),
    }


def git_commit() -> str:
    """The checkout's commit, "unknown" outside a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(REPO_ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
