"""The done-markers of Stage 0: one record per photo, so that a rerun does only what is missing (DESIGN 4.1).

A record holds the photo's row of metadata or of quarantine, and the state of everything that the row was made from. It is written after
the photo's files. Rows stay on disk: at 451,333 photos they are 5 GB, and the parent holds none of them.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backend import artifacts, weights
from backend.config import Config
from backend.errors import InvalidArtifactError
from backend.training.data_processing.khairstyle import Index
from backend.training.data_processing.labels import Pair
from backend.training.prepare_photo import PhotoSettings, relative
from backend.training.prepare_state import processing_digest

RECORDS = ".records"


@dataclass(frozen=True, slots=True)
class Task:
    """One photo to do: ``state`` identifies its bytes on disk, the settings and the code; ``record`` is where its row is kept."""

    pair: Pair
    record: Path
    state: str


def photo_settings(config: Config) -> PhotoSettings:
    """What a worker needs of the configuration."""
    data = config.data
    return PhotoSettings(
        processed=config.paths.processed,
        images=data.images,
        weights=config.paths.weights,
        identity_model=config.identity_model,
        resolution=data.resolution,
        patch_size=data.patch_size,
        patches_per_photo=data.patches_per_photo,
        patch_min_hair=data.patch_min_hair,
        bald=data.bald,
        max_pixels=data.max_pixels,
        min_hair_fraction=data.min_hair_fraction,
        seed=data.seed,
    )


def tasks(index: Index, config: Config) -> list[Task]:
    """The photos of the dataset (the first ``data.limit`` of them) in the order of their paths."""
    common = _common_state(config)
    pairs = index.pairs[: config.data.limit] if config.data.limit else index.pairs
    return [Task(pair, record_path(config, pair), _state(common, pair)) for pair in pairs]


def record_path(config: Config, pair: Pair) -> Path:
    """Where the record of a photo lies; it depends on the photo's place in the dataset alone."""
    name = hashlib.sha256(relative(pair.photo, config.data.images).encode()).hexdigest()[:24]
    return config.paths.processed / RECORDS / name[:2] / f"{name}.json"


def _common_state(config: Config) -> str:
    """Settings, code and weights. Which photos are taken, by whom and for which split is no property of a photo."""
    settings = {key: value for key, value in asdict(photo_settings(config)).items() if not isinstance(value, Path)}
    files = [path for name in ("face_detector", config.identity_model) for path in weights.files(config.paths.weights, name)]
    parts = [processing_digest(), settings, [artifacts.sha256_file(path) for path in files]]
    return artifacts.sha256_json(parts)


def _state(common: str, pair: Pair) -> str:
    return hashlib.sha256(f"{common}/{_stat(pair.photo)}/{_stat(pair.label)}/{pair.entry}".encode()).hexdigest()


def _stat(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "gone"
    return f"{found.st_size}-{found.st_mtime_ns}"


def read(path: Path) -> dict[str, Any] | None:
    """A record: ``state`` and ``row``; None where there is none that is whole."""
    try:
        record = artifacts.read_json(path)
    except (InvalidArtifactError, OSError):
        return None
    return record if isinstance(record, dict) and {"state", "row"} <= record.keys() else None


def finished(task: Task, record: dict[str, Any] | None, processed: Path) -> bool:
    """Whether a photo is done: same bytes, settings and code, and all its files are there."""
    return record is not None and record["state"] == task.state and all((processed / file).is_file() for file in files_of(record["row"]))


def files_of(row: dict[str, Any]) -> list[str]:
    """The files of an accepted photo, from the processed folder; none of a rejected one."""
    return [file for file in (*row.get("files", {}).values(), *row.get("patches", ())) if file]


def keep(task: Task, row: dict[str, Any], processed: Path) -> None:
    """Marks a photo as done. Files of its former row that the new one does not have are removed: a changed label may give fewer."""
    former = read(task.record)
    artifacts.write_text(task.record, json.dumps({"state": task.state, "row": row}, ensure_ascii=False, sort_keys=True))
    if former is not None:
        for file in set(files_of(former["row"])) - set(files_of(row)):
            (processed / file).unlink(missing_ok=True)


def lines(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Rows as lines of JSON."""
    return (json.dumps(row, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n" for row in rows)


def write_lines_if_changed(path: Path, content: Iterable[str]) -> None:
    """Writes a file line by line, whatever its size; where nothing differs the old one stays, time stamp and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}{artifacts.TMP_SUFFIX}")
    try:
        with fresh.open("w", encoding="utf-8", newline="\n") as handle:
            handle.writelines(content)
            handle.flush()
            os.fsync(handle.fileno())
        if not (path.is_file() and filecmp.cmp(path, fresh, shallow=False)):
            fresh.replace(path)
            artifacts.sync_folder(path.parent)
    finally:
        fresh.unlink(missing_ok=True)
