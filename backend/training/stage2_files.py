"""Names of Stage 2's files below ``paths.checkpoints`` (DESIGN 4.3), for everyone who writes or reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backend.config import Config
from backend.errors import MissingInputError

PREFIX = "stage2"
LATEST = "deep_hair_v1_latest"
FORMAT = "deephair-stage2-1"
LAYOUT = 6  # raise when a run draws or files its samples otherwise: caches and checkpoints of the older kind are then not used


def texture_encoder_path(config: Config) -> Path:
    """Where Stage 1 leaves its encoder."""
    return config.paths.checkpoints / "texture_encoder.safetensors"


def require_texture_encoder(config: Config) -> None:
    """Raises MissingInputError when Stage 1 has not run."""
    if not texture_encoder_path(config).is_file():
        raise MissingInputError(f"no Stage 1 encoder at {texture_encoder_path(config)}", hint="run Stage 1 first: deephair texture")


def log_path(config: Config) -> Path:
    """One JSON object per line: training losses every few steps, validation losses."""
    return config.paths.checkpoints / "stage2_log.jsonl"


def log_rows(config: Config) -> list[dict[str, Any]]:
    """The lines of the training log, oldest first; empty when there is none."""
    path = log_path(config)
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
