"""Stage 2: fine-tunes the 9-channel SDXL inpainting UNet with style and identity tokens (DESIGN 4.3).

Run: python backend/training/train_stage2.py [--config FILE] [key=value ...]   (the same as: deephair train)
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:  # run as a file: the checkout must be importable, this folder must not shadow libraries
    import importlib
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])
    raise SystemExit(importlib.import_module("backend.training.train_stage2").main())

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from backend import artifacts, console, weights
from backend.config import Config
from backend.errors import DeepHairError, MissingInputError, UsageError, require_all
from backend.machine import choose_allocator
from backend.training import results
from backend.training.stage2_files import LATEST, LAYOUT, PREFIX, require_texture_encoder, texture_encoder_path

if TYPE_CHECKING:
    from backend.training.processes import Processes
    from backend.training.stage2_run import Stage2Run

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of Stage 2."""

    def run() -> int:
        return verb(console.parse_stage_arguments(argv, "train_stage2.py", "Stage 2: fine-tunes the SDXL inpainting UNet"))

    return console.guarded(run)


def verb(arguments: console.StageArguments) -> int:
    """``deephair train``. ``--dry-run`` prints the memory plan and loads no weight."""
    if arguments.dry_run:
        from backend.training.memory_plan import memory_plan, plan_text

        plan = memory_plan(arguments.config)
        if arguments.json:
            console.print_result({"plan": plan})
        else:
            logger.info(plan_text(plan))
        return console.DONE
    result = train(arguments.config, resume=arguments.resume)
    if arguments.json:
        console.print_result(result)
    return console.DONE


def finished(config: Config) -> dict[str, Any] | None:
    """The result of a run that is already complete with these settings, data and Stage 1 encoder; None when there is work to do."""
    latest = config.paths.checkpoints / f"{LATEST}.safetensors"
    if not latest.is_file() or not texture_encoder_path(config).is_file():
        return None
    try:
        header = artifacts.read_header(latest)
    except DeepHairError:
        return None
    done = header.get("step") == config.train.steps and header.get("run") == run_digest(config)
    return dict(header["result"]) if done and "result" in header else None


def run_digest(config: Config) -> str:
    """What a run's weights depend on, so that a checkpoint of other settings or data is never continued."""
    from backend.training.prepared import Prepared

    prepared = Prepared(config.paths.processed)
    texture = artifacts.sha256_file(texture_encoder_path(config))
    start = "" if config.train.start is None else f"/{artifacts.sha256_file(config.train.start)}"
    return f"{config.digest('train', 'data')}/{prepared.digest}/{texture}{start}/{LAYOUT}"


def train(config: Config, *, resume: bool = True) -> dict[str, Any]:
    """Trains to ``train.steps`` and returns seconds, steps and the validation loss before and after.

    Goes on from the newest whole checkpoint of the same settings, bit by bit as if it had never stopped. Raises MissingInputError when
    Stage 0's or Stage 1's output or a weight is missing, UsageError when a checkpoint of other settings is in the way.
    """
    check_inputs(config)
    if resume and (result := finished(config)) is not None:
        logger.info("Stage 2 is complete (%d steps); nothing to do", config.train.steps)
        return results.read(config, "train") if results.recorded(config, "train") else result
    choose_allocator()
    import torch  # late: heavy

    from backend.training import presets
    from backend.training.device_memory import cap_memory
    from backend.training.memory_plan import memory_plan, plan_and_measured, plan_text, shortage
    from backend.training.processes import join_processes

    start = time.monotonic()
    processes = join_processes(config.device)
    bound = cap_memory(processes.device, config.train.memory_fraction)
    plan = memory_plan(config) if processes.device.type == "cuda" else None
    if plan is not None:
        logger.info(plan_text(plan))
        if bound is not None and (short := shortage(plan, bound)):
            logger.warning("%s", short)
    try:
        with artifacts.folder_lock(config.paths.checkpoints) if processes.is_main else contextlib.nullcontext():
            if processes.is_main:
                artifacts.remove_stale_temporaries(config.paths.checkpoints)
                if not resume:
                    _refuse_to_overwrite(config)
            run = _run(config, processes, resume=resume)
            result = {"seconds": round(time.monotonic() - start, 3), **run.result()}
            if processes.is_main:
                results.record(config, "train", result)
                if plan is not None:
                    logger.info(plan_and_measured(plan, **run.held()))
    except torch.OutOfMemoryError as error:
        raise presets.out_of_memory(config.train, error) from error
    return result


def _run(config: Config, processes: Processes, *, resume: bool) -> Stage2Run:
    """Builds the run and takes it to its end; all processes do so together, the first alone writes."""
    from backend.training.stage2_run import Stage2Run

    run = Stage2Run(config, run_digest(config), processes)
    if resume:
        run.resume()
    processes.wait()  # all have read the checkpoint that the first may prune
    run.train()
    return run


def check_inputs(config: Config) -> None:
    """Raises one MissingInputError naming everything that Stage 2 lacks."""
    require_all(
        lambda: results.require_prepared(config),
        lambda: require_texture_encoder(config),
        lambda: weights.require(config.paths.weights, "inpainting", "perceptual"),
        lambda: _require_start(config),
    )


def _require_start(config: Config) -> None:
    start = config.train.start
    if start is not None and not start.is_file():
        raise MissingInputError(
            f"train.start names {start}, which is not there",
            hint="give a Stage 2 checkpoint, or leave train.start out to begin at the base",
        )


def _refuse_to_overwrite(config: Config) -> None:
    from backend.training import checkpoints

    if checkpoints.steps(config.paths.checkpoints, PREFIX):
        raise UsageError(
            f"{config.paths.checkpoints} holds checkpoints of an earlier run",
            hint="move them away, or give this run a folder of its own: paths.checkpoints=FOLDER",
        )
