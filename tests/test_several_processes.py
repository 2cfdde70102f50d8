"""Stage 2 in two processes on one machine (gloo): it trains what one process trains, and goes on after a kill as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from backend import artifacts
from backend.config import REPO_ROOT
from backend.errors import UsageError
from backend.training import checkpoints, presets, stage2_step, train_stage2
from backend.training.processes import Processes
from backend.training.sharding import whole
from backend.training.stage2_run import Stage2Run
from tests.conftest import World
from tests.stage2_set import Toy, settings

LAUNCH = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}

WORKER = """
import sys, torch, logging
logging.disable(logging.WARNING)
from tests.test_several_processes import trained_weights
from backend.training.processes import join_processes
processes = join_processes("cpu")
for preset in sys.argv[2:]:
    torch.save(trained_weights(preset, processes), f"{sys.argv[1]}.{preset}.{processes.rank}")
processes.wait()
"""
PRESETS = ["full-exact", "full-80gb", "partial", "lora"]


def trained_weights(preset: str, processes: Processes) -> dict[str, torch.Tensor]:
    """All weights after three steps of two samples, put together in every process."""
    accumulate = 2 // processes.count
    toy = Toy(settings(preset=preset, lr=1e-3, injector_lr=1e-3, batch_size=1, accumulate=accumulate), None, processes)
    toy.train(3)
    return {name: whole(value).float() for name, value in toy.model.state_dict().items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What both of two launched processes have after training each preset in turn; launched once, for it takes longer than the training."""
    out = tmp_path_factory.mktemp("pair") / "two"
    script = out.with_suffix(".py")
    script.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, *LAUNCH, str(script), str(out), *PRESETS],
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {preset: [torch.load(f"{out}.{preset}.{rank}", weights_only=True) for rank in range(2)] for preset in PRESETS}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the launched processes have: another number of threads adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_that_holds_all_shares(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process alone, with the weights of the presets that share them out spread over one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(presets, "sharded", lambda train, processes: presets.of(train).adamw)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.long
@pytest.mark.usefixtures("one_thread", "one_that_holds_all_shares")
@pytest.mark.parametrize("preset", PRESETS)
def test_two_processes_equal_one_of_the_same_global_batch(preset: str, pair: dict[str, list[dict[str, torch.Tensor]]]) -> None:
    """Every weight, whatever its precision; the first two presets with their weights spread (FSDP) in both runs."""
    alone, (first, second) = trained_weights(preset, Processes(torch.device("cpu"))), pair[preset]
    assert all(torch.equal(first[name], second[name]) for name in first)
    apart = max(float((alone[name] - first[name]).abs().max()) for name in first)
    print(f"{preset}: largest difference of a weight {apart:.2e}")
    assert apart <= 1e-5


def test_spread_weights_change_gradients_by_rounding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP hooks into the graph and so adds gradients in another order where three paths meet. A bias before a group norm that has no
    gradient gets one of 1e-8 or so by rounding, which Adam makes a step of full length: weights are therefore not compared here."""

    def gradients() -> dict[str, torch.Tensor]:
        toy = Toy(settings(preset="full-exact", lr=1e-3, injector_lr=1e-3, batch_size=2))
        found = {}

        def seen(parameters: list[torch.nn.Parameter], bound: float) -> None:
            found.update({name: whole(p.grad).clone() for name, p in toy.model.named_parameters() if p.grad is not None})

        monkeypatch.setattr(stage2_step, "clip_grad_norm", seen)
        toy.train(1)
        return found

    plain = gradients()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(presets, "sharded", lambda train, processes: True)
        spread = gradients()
    finally:
        torch.distributed.destroy_process_group()
    largest = max(float(value.abs().max()) for value in plain.values())
    assert plain.keys() == spread.keys() and largest > 0.01
    for name, value in plain.items():
        assert float((value - spread[name]).abs().max()) <= 1e-5 * float(value.abs().max()) + 1e-6 * largest, name


# Trains as the script does, once for each line of arguments; the first process dies when the checkpoint of step 2 stands, if it shall,
# and the launcher ends the other.
RUNS = """
import json, os, signal, sys
from backend.training import checkpoints, train_stage2

link = checkpoints.link

def last_deed(path, name):
    link(path, name)
    if path.stem == "stage2_step_2":
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "dying":
    checkpoints.link = last_deed
raise SystemExit(max(train_stage2.main(arguments) for arguments in json.loads(sys.argv[2])))
"""


def _train_in_two(script: Path, manner: str, *runs: list[str]) -> subprocess.CompletedProcess[str]:
    script.write_text(RUNS)
    command = [sys.executable, *LAUNCH, str(script), manner, json.dumps(runs)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def _changes(preset: str, processes: int) -> dict[str, object]:
    return {"train__preset": preset, "train__batch_size": 1, "train__steps": 4, "train__save_every": 2, "train__texture_every": 0,
            "train__preview_every": 4, "train__ema": 0.9, "train__ema_every": 1, "train__lr": 1e-4, "train__accumulate": 2 // processes}  # fmt: skip


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_launched_runs_that_were_killed_end_where_undisturbed_ones_do(schooled_world: World, tmp_path: Path) -> None:
    """The whole of Stage 2 as it is launched: caches, validation, previews, average, checkpoint, kill, resume. ``lora`` is compared with one
    process; a preset with spread weights with an undisturbed run of two. Each launch costs three starts of Python: what need not die shares one."""
    names = [(preset, kind) for preset in ("full-exact", "lora") for kind in ("undisturbed", "killed")]
    worlds = {name: schooled_world.untrained(tmp_path / "-".join(name)) for name in names}
    in_two = {name: worlds[name].arguments(**_changes(name[0], 2)) for name in names}
    for preset in ("full-exact", "lora"):
        died = _train_in_two(tmp_path / "dying.py", "dying", in_two[preset, "killed"])
        assert died.returncode != 0
        saved = checkpoints.steps(worlds[preset, "killed"].root / "checkpoints", "stage2")
        assert [step for step, _ in saved][:1] == [2], died.stderr[-4000:]
    train_stage2.train(worlds["lora", "undisturbed"].config(**_changes("lora", 1)))
    done = _train_in_two(
        tmp_path / "going-on.py",
        "whole",
        *(in_two[n] for n in (("full-exact", "undisturbed"), ("full-exact", "killed"), ("lora", "killed"))),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("going on from stage2_step_2") == 4  # two runs, in both processes
    for preset in ("full-exact", "lora"):
        undisturbed, two = (worlds[preset, kind] for kind in ("undisturbed", "killed"))
        for name in ("stage2_step_4.safetensors", "stage2_step_4.state/optimizer.safetensors"):
            one, other = (artifacts.load_tensors(world.root / "checkpoints" / name) for world in (undisturbed, two))
            assert one.keys() == other.keys()
            apart = max(float((one[n].double() - other[n].double()).abs().max()) for n in one)
            print(f"{preset}, {name}: largest difference {apart:.2e}")
            assert apart <= 1e-5
        losses = [train_stage2.results.read(world.config(), "train")["loss_last"] for world in (undisturbed, two)]
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
    config = finished_world.config(train__preset="full-12gb")
    with pytest.raises(UsageError, match="cannot average over 2 processes"):
        Stage2Run(config, "", Processes(torch.device("cpu"), 0, 2))


def test_several_processes_are_not_compiled(finished_world: World) -> None:
    config = finished_world.config(train__preset="lora", train__compile="true")
    with pytest.raises(UsageError, match=r"train\.compile is for one process, there are 2"):
        Stage2Run(config, "", Processes(torch.device("cpu"), 0, 2))
