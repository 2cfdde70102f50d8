"""The process pool that survives its workers. A module of its own: every worker imports it, so it must be light."""

import os
import signal
from pathlib import Path

import pytest

from backend.training.workers import Casualty, run_in_workers


def _nothing() -> None:
    pass


def _fragile(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def _dies_once(marker: str) -> str:
    path = Path(marker)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def _raises(number: int) -> int:
    raise ValueError(f"no {number}")


def test_the_item_that_kills_twice_is_a_casualty_and_no_other_is_lost() -> None:
    results = dict(run_in_workers(range(12), _fragile, workers=2, start=_nothing, start_args=()))
    assert isinstance(results.pop(5), Casualty)
    assert results == {n: n * n for n in range(12) if n != 5}


def test_a_worker_that_dies_by_chance_costs_nothing(tmp_path: Path) -> None:
    items = [str(tmp_path / name) for name in "abc"]
    (tmp_path / "a").touch()
    (tmp_path / "c").touch()
    assert dict(run_in_workers(items, _dies_once, workers=1, start=_nothing, start_args=())) == dict(zip(items, "abc", strict=True))


def test_an_error_in_the_work_is_the_callers() -> None:
    with pytest.raises(ValueError, match="no 1"):
        list(run_in_workers([1], _raises, workers=1, start=_nothing, start_args=()))
