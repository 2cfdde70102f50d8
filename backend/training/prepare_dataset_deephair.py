"""Stage 0: K-Hairstyle photos and labels become training data (DESIGN 4.1; docs/data.md, docs/scale.md).

Run: python backend/training/prepare_dataset_deephair.py [--config FILE] [key=value ...]   (the same as: deephair prepare)
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:  # run as a file: the checkout must be importable, this folder must not shadow libraries
    import importlib
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])
    raise SystemExit(importlib.import_module("backend.training.prepare_dataset_deephair").main())

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backend import artifacts, console, weights
from backend.config import Config
from backend.errors import DeepHairError, MissingInputError, require_all
from backend.machine import cores
from backend.training import prepare_records, prepare_report, results
from backend.training.data_processing.khairstyle import Index, index_dataset
from backend.training.data_processing.labels import Pair
from backend.training.data_processing.split import SplitRecord, assign_splits, split_record
from backend.training.evenly import evenly
from backend.training.prepare_photo import relative, start_worker, work
from backend.training.prepare_records import RECORDS, Task, photo_settings
from backend.training.prepare_report import Facts
from backend.training.workers import Casualty, run_in_workers

__all__ = ["RECORDS", "main", "photo_settings", "plan", "prepare", "verb"]

logger = logging.getLogger(__name__)

MEASURED_PHOTOS = 64  # so many finished photos tell what the next ones will take on disk
RESERVE = 2**30  # bytes that stay free


@dataclass
class Outcome:
    """What the photos came to. Of an accepted one only what split and report need is held; its row stays on disk."""

    accepted: list[tuple[SplitRecord, Facts, Path]] = field(default_factory=list)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    worked: int = 0

    def add(self, row: dict[str, Any], record: Path) -> None:
        """Takes in one photo's row."""
        if "reason" in row:
            self.quarantine.append(row)
        else:
            self.accepted.append((split_record(row), prepare_report.facts(row), record))

    def __len__(self) -> int:
        return len(self.accepted) + len(self.quarantine)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of Stage 0."""

    def run() -> int:
        parser = console.stage_parser("prepare_dataset_deephair.py", "Stage 0: photos and labels become training data")
        console.add_prepare_arguments(parser)
        return verb(console.stage_arguments(parser.parse_intermixed_args(argv)))

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
    tasks = prepare_records.tasks(index, config)
    processed = config.paths.processed
    done = [task for task in tasks if prepare_records.finished(task, prepare_records.read(task.record), processed)]
    to_do = len(tasks) - len(done)
    return {
        "inputs": index.inputs,
        "photos": len(tasks),
        "to_do": to_do,
        "workers": worker_count(config),
        "disk_gib": round(to_do * bytes_per_photo(config, done) / 2**30, 3),
        "disk_free_gib": round(_free_bytes(processed) / 2**30, 3),
    }


def worker_count(config: Config) -> int:
    """``data.workers``, or one per usable core and 8 at most."""
    return config.data.workers or cores(8)


def prepare(config: Config, *, resume: bool = True) -> dict[str, Any]:
    """Runs Stage 0 and returns its counts. Finished photos are skipped; the output equals that of an undisturbed run byte for byte.

    Raises MissingInputError when dataset or weights are not there or no photo at all was accepted, DeepHairError ("disk_full") before
    the first photo where the disk cannot hold the outputs.
    """
    check_inputs(config)
    start = time.monotonic()
    processed = config.paths.processed
    with artifacts.folder_lock(processed):
        artifacts.remove_stale_temporaries(processed)
        logger.info("reading %s", config.data.labels)
        index = index_dataset(config.data.images, config.data.labels)
        outcome = _process_all(prepare_records.tasks(index, config), config, resume=resume)
        counts = _assemble(index, outcome, config)
        result = {"seconds": round(time.monotonic() - start, 3), **counts}
        if outcome.worked or not results.recorded(config, "prepare"):
            results.record(config, "prepare", result)
    return result


# ---- the photos ----


def _process_all(tasks: list[Task], config: Config, *, resume: bool) -> Outcome:
    outcome = Outcome()
    done, waiting = _skip_finished(tasks, config, outcome) if resume else ([], tasks)
    check_disk(config, len(waiting), done)
    outcome.worked = len(waiting)
    progress = console.Progress("photos", len(tasks), unit="photo")
    progress.start_at(len(outcome))
    by_pair = {task.pair: task for task in waiting}
    for pair, result in _run(list(by_pair), config):
        task = by_pair.pop(pair)
        if isinstance(result, Casualty):
            cause = "" if result.killed else f" ({_exit(result.exitcode)})"
            detail = f"its worker process died {result.deaths} times{cause}"
            row = {"path": relative(pair.photo, config.data.images), "reason": "worker_killed", "detail": detail}
        else:
            row = result
        if not (isinstance(result, Casualty) and result.killed):  # where memory was short, another run may find more of it
            prepare_records.keep(task, row, config.paths.processed)
        outcome.add(row, task.record)
        progress.update()
    if waiting:  # a worker that was killed leaves what it was writing
        artifacts.remove_stale_temporaries(config.paths.processed)
    return outcome


def _skip_finished(tasks: list[Task], config: Config, outcome: Outcome) -> tuple[list[Task], list[Task]]:
    """Puts the rows of finished photos into ``outcome``; returns the finished and the others."""
    done, waiting = [], []
    outdated = 0
    for task in tasks:
        record = prepare_records.read(task.record)
        if record is not None and prepare_records.finished(task, record, config.paths.processed):
            outcome.add(record["row"], task.record)
            done.append(task)
        else:
            waiting.append(task)
            outdated += record is not None
    if done:
        logger.info("%d of %d photos are already done", len(done), len(tasks))
    if outdated:
        logger.info("%d photos were done by other settings, code or weights, have changed, or lack files: they are done again", outdated)
    return done, waiting


def _run(pairs: list[Pair], config: Config) -> Iterator[tuple[Pair, Any]]:
    """The photos' rows as they come, from this machine's processes or from those of a dask scheduler."""
    if not pairs:
        return iter(())
    settings = photo_settings(config)
    if config.data.scheduler:
        from backend.training.prepare_cluster import run_on_cluster

        return run_on_cluster(pairs, settings, config.data.scheduler)
    workers = min(worker_count(config), len(pairs))
    return run_in_workers(pairs, work, workers=workers, start=start_worker, start_args=(settings,))


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


# ---- the disk ----


def bytes_per_photo(config: Config, done: Sequence[Task] = ()) -> float:
    """What one more photo takes on disk: the mean of finished ones where there are enough, else what photographs usually take."""
    sizes = []
    for number in evenly(len(done), MEASURED_PHOTOS):
        record = prepare_records.read(done[number].record)
        files = prepare_records.files_of(record["row"]) if record else []
        if files:
            found = [config.paths.processed / file for file in files]
            sizes.append(sum(_on_disk(path) for path in (*found, done[number].record)))
    if len(sizes) >= MEASURED_PHOTOS // 2:
        return float(np.mean(sizes))
    data = config.data
    return 2.0 * data.resolution**2 + 1.9 * data.patches_per_photo * data.patch_size**2 + 110_000


def _on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.is_file() else 0


def _free_bytes(folder: Path) -> int:
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    return shutil.disk_usage(existing).free


def check_disk(config: Config, to_do: int, done: Sequence[Task]) -> None:
    """Raises DeepHairError where the disk of ``paths.processed`` cannot hold ``to_do`` more photos."""
    needed, free = to_do * bytes_per_photo(config, done), _free_bytes(config.paths.processed)
    if to_do and needed + RESERVE > free:
        raise DeepHairError(
            f"{to_do} photos need about {needed / 2**30:.1f} GiB at {config.paths.processed}, and {free / 2**30:.1f} GiB are free",
            hint="free some, choose another disk with paths.processed=..., or take fewer photos with --limit",
            code="disk_full",
        )


# ---- the whole ----


def _assemble(index: Index, outcome: Outcome, config: Config) -> dict[str, Any]:
    """Writes metadata, quarantine and reports; a file whose content would not change is left alone."""
    processed = config.paths.processed
    roots = (config.data.images, config.data.labels)
    quarantine = [{"path": _under(item.path, roots), "reason": item.reason, "detail": item.detail} for item in index.rejected]
    quarantine = sorted(quarantine + outcome.quarantine, key=lambda row: (row["path"], row["reason"], row["detail"]))
    if not outcome.accepted:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in Counter(row["reason"] for row in quarantine).most_common(5))
        raise MissingInputError(
            f"none of {len(quarantine)} inputs in {config.data.images} can be used ({reasons or 'the folders are empty'})",
            hint="see the documented folder layout in docs/data.md",
        )
    accepted = sorted(outcome.accepted, key=lambda item: item[0].id)
    groups = assign_splits((item[0] for item in accepted), seed=config.data.seed, fractions=config.data.split)
    facts = [item[1] for item in accepted]
    shown = prepare_report.chosen(facts, groups)
    rows = _rows(accepted, groups, shown)
    prepare_records.write_lines_if_changed(processed / "metadata.jsonl", prepare_records.lines(rows))
    prepare_records.write_lines_if_changed(processed / "quarantine.jsonl", prepare_records.lines(quarantine))
    settings = config.resolved()
    for who in ("workers", "scheduler"):  # who did it is no property of what was done
        del settings["data"][who]
    artifacts.write_if_changed(processed / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
    inputs = index.inputs - (len(index.pairs) - len(outcome))  # data.limit leaves photos out
    counts = {"inputs": inputs, "accepted": len(accepted), "quarantined": len(quarantine)}
    prepare_report.write(processed, counts, facts, groups, list(shown.values()), quarantine, config)
    logger.info("%d inputs: %d accepted, %d quarantined (see %s)", inputs, len(accepted), len(quarantine), processed / "report.html")
    return counts


def _rows(
    accepted: list[tuple[SplitRecord, Facts, Path]], groups: dict[str, tuple[str, str]], shown: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of metadata, one at a time from the records; those whose id is in ``shown`` are kept there for the report."""
    for item, _, path in accepted:
        record = prepare_records.read(path)
        if record is None:
            raise DeepHairError(f"{path} has gone while Stage 0 was running", hint="run 'deephair prepare' again")
        row: dict[str, Any] = record["row"]
        row["group"], row["split"] = groups[item.id]
        if item.id in shown:
            shown[item.id] = row
        yield row


def _under(path: Path, roots: Sequence[Path]) -> str:
    root = next((root for root in roots if path.is_relative_to(root)), None)
    return relative(path, root) if root else path.as_posix()
