"""The process pool that survives its workers. A module of its own: every worker imports it, so it must be light."""

import os
import signal
import time
from pathlib import Path

import pytest

from backend.errors import DeepHairError
from backend.training.workers import Casualty, run_in_workers


def _nothing() -> None:
    pass


def _die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def _fragile(number: int) -> int:
    if number == 5:
        _die(signal.SIGSEGV)
    if number == 7:
        _die(signal.SIGKILL)
    return number * number


def _counted(item: tuple[str, int]) -> str:
    """Leaves a mark for every time it is worked on; the item "b" kills its worker at its first time."""
    folder, _ = item
    marks = Path(folder)
    (marks / f"{time.monotonic_ns()}").touch()
    if marks.name == "b" and len(list(marks.iterdir())) == 1:
        _die()
    return marks.name


def _raises(number: int) -> int:
    raise EOFError(f"no {number}")  # an error that the pipes raise too


def _slow(marker: str) -> None:
    Path(marker).touch()
    time.sleep(0.5)
    Path(marker + ".done").touch()


def test_an_item_that_keeps_killing_is_a_casualty_and_no_other_is_lost() -> None:
    results = dict(run_in_workers(range(12), _fragile, workers=2, start=_nothing, start_args=()))
    assert results.pop(5) == Casualty(5, deaths=2, exitcode=-signal.SIGSEGV)
    killed = results.pop(7)
    assert killed == Casualty(7, deaths=3, exitcode=-signal.SIGKILL) and killed.killed
    assert results == {n: n * n for n in range(12) if n not in (5, 7)}


def test_a_worker_that_dies_by_chance_costs_what_it_held_and_nothing_else(tmp_path: Path) -> None:
    items = [(str(tmp_path / name), number) for number, name in enumerate("abcdef")]
    for folder, _ in items:
        Path(folder).mkdir()
    results = dict(run_in_workers(items, _counted, workers=2, start=_nothing, start_args=()))
    assert {item[0][-1]: row for item, row in results.items()} == {name: name for name in "abcdef"}
    assert {folder[-1]: len(list(Path(folder).iterdir())) for folder, _ in items} == {name: 2 if name == "b" else 1 for name in "abcdef"}


def test_an_error_in_the_work_is_the_callers() -> None:
    with pytest.raises(EOFError, match="no 1"):
        list(run_in_workers([1], _raises, workers=1, start=_nothing, start_args=()))


def test_workers_that_cannot_start_are_an_error_and_no_endless_loop() -> None:
    with pytest.raises(DeepHairError, match="died while starting"):
        list(run_in_workers([1, 2], _fragile, workers=2, start=_die, start_args=()))


def test_leaving_early_lets_the_workers_finish_and_ends_them(tmp_path: Path) -> None:
    items = [str(tmp_path / f"{number}") for number in range(8)]
    results = run_in_workers(items, _slow, workers=2, start=_nothing, start_args=())
    next(results)
    results.close()
    begun = [item for item in items if Path(item).exists()]
    assert 2 <= len(begun) <= 4, "the first two and what was handed out next"
    assert all(Path(item + ".done").exists() for item in begun)
