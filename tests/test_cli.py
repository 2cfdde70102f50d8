"""The command line: quick help, exit codes, one message for a mistake."""

import json
import logging
import subprocess
import sys
import time

import pytest

from backend import console
from backend.config import load_config
from backend.training.memory_plan import memory_plan

DEEPHAIR = [sys.executable, "-m", "backend.cli"]
VERBS = "run prepare texture train evaluate export serve tryon verify models doctor demo-data".split()


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DEEPHAIR, *words], capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy() -> None:
    """--help must answer within 0.3 s; what would break that is an import of a large library, which is what is checked here."""
    code = "import sys, backend.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\nprint(sorted(set(sys.modules) & set(sys.argv[1:])))"
    heavy = ["torch", "numpy", "pydantic", "cv2", "diffusers", "transformers", "fastapi", "rich", "yaml"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_help_is_not_much_slower_than_python_itself() -> None:
    """As a ratio in one run, the machine being noisy: the best of five against starting the interpreter with argparse."""

    def best(command: list[str]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run(command, capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best([*DEEPHAIR, "--help"]) < 4 * best([sys.executable, "-c", "import argparse, json, logging"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    done = _call(verb, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["run", "trian.lr=1"], 2, "did you mean 'train.lr'"),
        (["train", "--config", "nowhere.yaml"], 2, "no configuration file"),
        (["train", "train.steps=-4"], 2, "train.steps"),
        (["dance"], 2, "invalid choice"),
        (["verify", "nowhere.safetensors"], 1, "is missing"),
        (["models", "dance"], 2, "unknown action"),
        (["texture", "predict"], 2, "no picture was named"),
    ],
)
def test_mistakes_have_one_message_and_an_exit_code(words: list[str], code: int, says: str) -> None:
    done = _call(*words)
    assert done.returncode == code
    assert says in done.stderr and "Traceback" not in done.stderr


def test_the_memory_plan_needs_no_weight_and_counts_sdxl_exactly() -> None:
    done = _call("train", "train.batch_size=2", "--dry-run", "train.preset=full-12gb", "--json", "paths.weights=/nonexistent")
    plan = json.loads(done.stdout)["plan"]
    assert done.returncode == 0 and plan["preset"] == "full-12gb"
    assert any("batch 2 at 1024 px" in line["name"] for line in plan["lines"])  # overrides may stand among options
    assert plan["total_gib"] == pytest.approx(sum(line["gib"] for line in plan["lines"]), abs=0.01)
    assert plan["total_gib"] < 11.0
    # 2,567,478,084 of the UNet, and the style and identity projections into 2048
    injector = (2048 * 2048 + 2048) + 2 * 2048 + (512 * 2048 + 2048) + (2048 * 2048 + 2048) + 2 * 2048
    assert f"{2_567_478_084 + injector:,} parameters" in plan["lines"][0]["name"]
    exact = memory_plan(load_config(overrides=["train.preset=full-exact", "paths.weights=/nonexistent"]))
    assert exact["total_gib"] < 8 and exact["host_gib"] == pytest.approx(4 * 4 * 2_567_478_084 / 2**30, abs=0.01)


def test_progress_says_the_rate_and_the_time_left_of_this_run_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO):
        progress = console.Progress("photos", 7_300, unit="photo", every_s=5)
        progress.start_at(40)  # done by an earlier run
        now[0] += 30  # what comes once
        progress.update(1)
        now[0] += 2
        progress.update(3)  # too early for a line
        now[0] += 6
        progress.update(13)
        assert progress.rate() == 2.0
        now[0] += 1
        progress.update(7_243)
    assert [record.getMessage() for record in caplog.records] == [
        "photos: 41/7300 photo, the first took 30 s",
        "photos: 57/7300 photo, 2 photo/s, 1 h 0 min left",
        "photos: 7300/7300 photo, 807 photo/s, took 39 s",
    ]
