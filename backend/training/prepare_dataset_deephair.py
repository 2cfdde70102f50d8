"""Stage 0: K-Hairstyle photos and labels become training data (DESIGN 4.1).

Run: python backend/training/prepare_dataset_deephair.py [--config FILE] [key=value ...]   (the same as: deephair prepare)
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:  # run as a file: the checkout must be importable, this folder must not shadow libraries
    import importlib
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])
    raise SystemExit(importlib.import_module("backend.training.prepare_dataset_deephair").main())

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend import artifacts, console, weights
from backend.config import Config
from backend.errors import InvalidArtifactError, MissingInputError, require_all
from backend.training import prepare_report, results
from backend.training.data_processing.khairstyle import Index, index_dataset
from backend.training.data_processing.labels import Pair
from backend.training.data_processing.split import SplitRecord, assign_splits
from backend.training.prepare_photo import PhotoSettings, relative, start_worker, work
from backend.training.workers import Casualty, run_in_workers

logger = logging.getLogger(__name__)

FORMAT = 1  # raised when the same input and settings would give other files
RECORDS = ".records"


@dataclass(frozen=True)
class Task:
    """One photo to do: ``state`` identifies its bytes on disk and the settings, ``record`` is where its finished row is kept."""

    pair: Pair
    record: Path
    state: str


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of Stage 0."""

    def run() -> int:
        arguments = console.parse_stage_arguments(argv, "prepare_dataset_deephair.py", "Stage 0: photos and labels become training data")
        return verb(arguments)

    return console.guarded(run)


def verb(arguments: console.StageArguments) -> int:
    """``deephair prepare``: exit code 0, or 3 when some inputs were quarantined."""
    result = plan(arguments.config) if arguments.dry_run else prepare(arguments.config, resume=arguments.resume)
    if arguments.json or arguments.dry_run:
        console.print_result(result)
    return console.REJECTED_ITEMS if result.get("quarantined") else console.DONE


def check_inputs(config: Config) -> None:
    """Raises MissingInputError naming every folder and weight that Stage 0 lacks and where to put it."""
    require_all(
        lambda: _check_dataset(config),
        lambda: weights.require(config.paths.weights, "face_detector", config.identity_model),
    )


def _check_dataset(config: Config) -> None:
    problems = []
    for name, folder in (("photos", config.data.images), ("labels", config.data.labels)):
        if not folder.is_dir():
            problems.append(f"no {name} at {folder}{os.sep}  (setting data.{'images' if name == 'photos' else 'labels'})")
    if problems:
        raise MissingInputError(
            "the K-Hairstyle dataset is missing:\n  " + "\n  ".join(problems),
            hint="K-Hairstyle comes from AI-Hub (dataset 85) or its authors' page: unpack photos and labels there, or name their folders; "
            "'make demo' builds a miniature set and needs nothing",
        )


def plan(config: Config) -> dict[str, Any]:
    """What a run would do: inputs, photos still to do, workers and the disk that the outputs will take, without writing anything."""
    check_inputs(config)
    index = index_dataset(config.data.images, config.data.labels)
    tasks = _tasks(index, config)
    waiting = [task for task in tasks if _finished(task, config.paths.processed) is None]
    per_photo = 6.5 * config.data.resolution**2 + 12 * 2.2 * config.data.patch_size**2 + 90_000  # bytes, PNG of photographs
    return {
        "inputs": index.inputs,
        "photos": len(tasks),
        "to_do": len(waiting),
        "workers": worker_count(config),
        "disk_gib": round(len(waiting) * per_photo / 2**30, 3),
    }


def worker_count(config: Config) -> int:
    """``data.workers``, or one per usable core and 8 at most."""
    return config.data.workers or min(8, len(os.sched_getaffinity(0)))


def prepare(config: Config, *, resume: bool = True) -> dict[str, Any]:
    """Runs Stage 0 and returns its counts. Finished photos are skipped; the output equals that of an undisturbed run byte for byte.

    Raises MissingInputError when dataset or weights are not there, MissingInputError when no photo at all was accepted.
    """
    check_inputs(config)
    start = time.monotonic()
    processed = config.paths.processed
    with artifacts.folder_lock(processed):
        artifacts.remove_stale_temporaries(processed)
        logger.info("reading %s", config.data.labels)
        index = index_dataset(config.data.images, config.data.labels)
        tasks = _tasks(index, config)
        rows, worked = _process_all(tasks, config, resume=resume)
        counts = _assemble(index, rows, config)
        result = {"seconds": round(time.monotonic() - start, 3), **counts}
        if worked or not results.recorded(config, "prepare"):
            results.record(config, "prepare", result)
    return result


def _tasks(index: Index, config: Config) -> list[Task]:
    settings = hashlib.sha256(f"{FORMAT}/{config.identity_model}/{config.digest('data')}/{_weights_state(config)}".encode()).hexdigest()
    pairs = index.pairs[: config.data.limit] if config.data.limit else index.pairs
    tasks = []
    for pair in pairs:
        name = hashlib.sha256(relative(pair.photo, config.data.images).encode()).hexdigest()[:24]
        state = hashlib.sha256(f"{settings}/{_stat(pair.photo)}/{_stat(pair.label)}/{pair.entry}".encode()).hexdigest()
        tasks.append(Task(pair, config.paths.processed / RECORDS / name[:2] / f"{name}.json", state))
    return tasks


def _weights_state(config: Config) -> str:
    files = [path for name in ("face_detector", config.identity_model) for path in weights.files(config.paths.weights, name)]
    return "/".join(artifacts.sha256_file(path) for path in files)


def _stat(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "gone"
    return f"{found.st_size}-{found.st_mtime_ns}"


def _finished(task: Task, processed: Path) -> dict[str, Any] | None:
    """The row of a photo that is done: same bytes, same settings, and all its files still there."""
    try:
        record = artifacts.read_json(task.record)
    except (InvalidArtifactError, OSError):
        return None
    if record.get("state") != task.state:
        return None
    row: dict[str, Any] = record["row"]
    files = [file for file in (*row.get("files", {}).values(), *row.get("patches", ())) if file]
    return row if all((processed / file).is_file() for file in files) else None


def _process_all(tasks: list[Task], config: Config, *, resume: bool) -> tuple[list[dict[str, Any]], int]:
    """The rows of all photos, and how many were processed now."""
    processed = config.paths.processed
    rows: list[dict[str, Any]] = []
    waiting: dict[Pair, Task] = {}
    for task in tasks:
        row = _finished(task, processed) if resume else None
        if row is None:
            waiting[task.pair] = task
        else:
            rows.append(row)
    progress = console.Progress("photos", len(tasks), unit="photo")
    progress.start_at(len(rows))
    if rows:
        logger.info("%d of %d photos are already done", len(rows), len(tasks))
    workers = min(worker_count(config), max(1, len(waiting)))
    for pair, result in run_in_workers(list(waiting), work, workers=workers, start=start_worker, start_args=(photo_settings(config),)):
        task = waiting[pair]
        if isinstance(result, Casualty):
            row = {"path": relative(pair.photo, config.data.images), "reason": "worker_killed", "detail": "its worker process died twice"}
        else:
            row = result
        artifacts.write_text(task.record, json.dumps({"state": task.state, "row": row}, ensure_ascii=False, sort_keys=True))
        rows.append(row)
        progress.update()
    return rows, len(waiting)


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


def _assemble(index: Index, rows: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Writes metadata, quarantine and reports from the rows; a file whose content would not change is left alone."""
    processed = config.paths.processed
    accepted = sorted((row for row in rows if "reason" not in row), key=lambda row: row["id"])
    quarantine = [row for row in rows if "reason" in row]
    roots = (config.data.images, config.data.labels)
    quarantine += [{"path": _under(item.path, roots), "reason": item.reason, "detail": item.detail} for item in index.rejected]
    quarantine.sort(key=lambda row: (row["path"], row["reason"], row["detail"]))
    if not accepted:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in Counter(row["reason"] for row in quarantine).most_common(5))
        raise MissingInputError(
            f"none of {len(quarantine)} inputs in {config.data.images} can be used ({reasons or 'the folders are empty'})",
            hint="see the documented folder layout in docs/data.md",
        )
    groups = assign_splits(map(_split_record, accepted), seed=config.data.seed, fractions=config.data.split)
    for row in accepted:
        row["group"], row["split"] = groups[row["id"]]
    _write_lines(processed / "metadata.jsonl", accepted)
    _write_lines(processed / "quarantine.jsonl", quarantine)
    artifacts.write_if_changed(processed / "config.json", json.dumps(config.resolved(), indent=2, sort_keys=True) + "\n")
    inputs = index.inputs - (len(index.pairs) - len(rows))  # data.limit leaves photos out
    counts = {"inputs": inputs, "accepted": len(accepted), "quarantined": len(quarantine)}
    prepare_report.write(processed, counts, accepted, quarantine, config)
    logger.info("%d inputs: %d accepted, %d quarantined (see %s)", inputs, len(accepted), len(quarantine), processed / "report.html")
    return counts


def _split_record(row: dict[str, Any]) -> SplitRecord:
    raw = {name: (row["attributes"].get(name) or {}).get("raw") for name in ("sex", "age")}
    return SplitRecord(row["id"], row["source"], row["prefix"], row["folder_index"], row["basestyle"], raw["sex"], raw["age"])


def _under(path: Path, roots: Sequence[Path]) -> str:
    root = next((root for root in roots if path.is_relative_to(root)), None)
    return relative(path, root) if root else path.as_posix()


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    artifacts.write_if_changed(path, "".join(json.dumps(row, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n" for row in rows))
