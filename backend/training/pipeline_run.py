"""All four stages in order: the same functions that the verbs call, each of which skips what is already done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from backend import console
from backend.config import Config
from backend.machine import choose_allocator
from backend.training import export_model, prepare_dataset_deephair, results, train_stage2

logger = logging.getLogger(__name__)


def run_stages(arguments: console.StageArguments) -> int:
    """``deephair run``: exit code 0, or 3 when Stage 0 quarantined inputs."""
    first = getattr(arguments.rest, "from_stage", 0)
    config = export_model.with_force(arguments.config, getattr(arguments.rest, "force", ""))
    if arguments.dry_run:
        console.print_result(dry_run(config))
        return console.DONE
    choose_allocator()  # before Stage 1 puts anything on a card
    start = time.monotonic()
    outcome: dict[str, Any] = {}
    for number, (name, stage) in enumerate(stages(config, resume=arguments.resume)):
        if number >= first:
            with console.timed(f"stage {number} of 3: {name}"):
                outcome[name] = stage()
    logger.info("all done in %s", console.duration(time.monotonic() - start))
    if arguments.json:
        console.print_result(outcome)
    quarantined = (outcome.get("prepare") or results.read(config, "prepare"))["quarantined"]
    return console.REJECTED_ITEMS if quarantined else console.DONE


def stages(config: Config, *, resume: bool) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """The four stages by name, in order; each is called without arguments and returns its result."""
    return [
        ("prepare", lambda: prepare_dataset_deephair.prepare(config, resume=resume)),
        ("texture", lambda: _texture(config, resume=resume)),
        ("train", lambda: train_stage2.train(config, resume=resume)),
        ("export", lambda: export_model.export(config, resume=resume)),
    ]


def _texture(config: Config, *, resume: bool) -> dict[str, Any]:
    from backend.training.train_texture import train_texture  # late: torch

    return train_texture(config, resume=resume)


def dry_run(config: Config) -> dict[str, Any]:
    """What a run would find and need; raises MissingInputError where the first stage cannot start."""
    from backend.training.memory_plan import memory_plan

    return {"prepare": prepare_dataset_deephair.plan(config), "train": {"plan": memory_plan(config)}}
