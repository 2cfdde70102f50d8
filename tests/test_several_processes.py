"""Stage 2 in two processes on one machine (gloo): it trains what one process trains, and goes on after a kill as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backend import artifacts
from backend.config import REPO_ROOT
from backend.errors import UsageError
from backend.training import checkpoints, train_stage2
from backend.training.stage2_run import Stage2Run
from tests.conftest import World

LAUNCH = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}

WORKER = """
import sys, torch, logging
logging.disable(logging.WARNING)
from tests.stage2_set import Toy, settings
preset, out = sys.argv[1], sys.argv[2]
from backend.training.processes import join_processes
from backend.training.sharding import whole
processes = join_processes("cpu")
accumulate = 2 // processes.count
toy = Toy(settings(preset=preset, lr=1e-3, injector_lr=1e-3, batch_size=1, accumulate=accumulate), None, processes)
toy.train(3)
processes.wait()
torch.save({name: whole(value).float() for name, value in toy.model.state_dict().items()}, f"{out}.{processes.rank}")
"""


def _launch(preset: str, count: int, out: Path) -> list[dict[str, torch.Tensor]]:
    script = out.with_suffix(".py")
    script.write_text(WORKER)
    command = [sys.executable, *(LAUNCH if count == 2 else []), str(script), preset, str(out)]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(count)]


@pytest.mark.long
@pytest.mark.parametrize("preset", ["full-exact", "full-80gb", "partial", "lora"])
def test_two_processes_equal_one_of_the_same_global_batch(preset: str, tmp_path: Path) -> None:
    """Every weight, whatever its precision; the first two presets with their weights spread (FSDP)."""
    (alone,) = _launch(preset, 1, tmp_path / "one")
    first, second = _launch(preset, 2, tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    apart = max(float((alone[name] - first[name]).abs().max()) for name in first)
    print(f"{preset}: largest difference of a weight {apart:.2e}")
    assert apart <= 1e-5


# Trains as the script does; the first process dies when the checkpoint of step 2 stands, and the launcher ends the other.
DYING = """
import os, signal
from backend.training import checkpoints, train_stage2

link = checkpoints.link

def last_deed(path, name):
    link(path, name)
    if path.stem == "stage2_step_2":
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.link = last_deed
raise SystemExit(train_stage2.main())
"""


def _train(world: World, count: int, script: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(LAUNCH if count == 2 else []), str(script), *world.arguments(**changes, train__accumulate=2 // count)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


@pytest.mark.long
@pytest.mark.parametrize("preset", ["full-exact", "lora"])
def test_a_launched_run_that_was_killed_ends_where_one_process_does(finished_world: World, tmp_path: Path, preset: str) -> None:
    """The whole of Stage 2 as it is launched: caches, validation, previews, average, checkpoint, kill, resume."""
    changes = {"train__preset": preset, "train__batch_size": 1, "train__steps": 4, "train__save_every": 2, "train__texture_every": 0,
               "train__preview_every": 4, "train__ema": 0.9, "train__ema_every": 1, "train__lr": 1e-4}  # fmt: skip
    alone, two = (finished_world.untrained(tmp_path / name) for name in ("alone", "two"))
    script, dying = REPO_ROOT / "backend/training/train_stage2.py", tmp_path / "dying.py"
    dying.write_text(DYING)
    done = _train(alone, 1, script, **changes)
    assert done.returncode == 0, done.stderr[-2000:]
    assert _train(two, 2, dying, **changes).returncode != 0
    assert checkpoints.steps(two.root / "checkpoints", "stage2")[0][0] == 2
    done = _train(two, 2, script, **changes)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "going on from stage2_step_2" in done.stderr
    for name in ("stage2_step_4.safetensors", "stage2_step_4.state/optimizer.safetensors"):
        one, other = (artifacts.load_tensors(world.root / "checkpoints" / name) for world in (alone, two))
        assert one.keys() == other.keys()
        apart = max(float((one[n].double() - other[n].double()).abs().max()) for n in one)
        print(f"{preset}, {name}: largest difference {apart:.2e}")
        assert apart <= 1e-5
    losses = [train_stage2.results.read(world.config(), "train")["loss_last"] for world in (alone, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(list((two.root / "checkpoints/previews").glob("*.png"))) == 2


def test_a_run_goes_on_with_as_many_samples_per_step_as_before(finished_world: World, tmp_path: Path) -> None:
    """A checkpoint of four processes: one process would take other samples."""
    world = finished_world.copy(tmp_path / "other", "processed", "checkpoints")
    folder = world.root / "checkpoints"
    found = checkpoints.newest(folder, "stage2")
    assert found is not None
    checkpoints.save(folder, found.weights_path.stem, weights=found.weights, optimizer=found.optimizer, header=found.header,
                     position={**found.position, "samples_per_step": 8})  # fmt: skip
    config = world.config()
    run = Stage2Run(config, train_stage2.run_digest(config))
    with pytest.raises(UsageError, match="8 samples per step, 1 processes make it 2 now"):
        run.resume()


def test_presets_that_step_inside_the_backward_pass_refuse_several_processes(finished_world: World) -> None:
    from backend.training.processes import Processes

    config = finished_world.config(train__preset="full-12gb")
    with pytest.raises(UsageError, match="cannot average over 2 processes"):
        Stage2Run(config, "", Processes(torch.device("cpu"), 0, 2))
