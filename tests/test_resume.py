"""Stage 2 stopped at its worst moments: a resumed run ends with the bits of one that never stopped, and no save leaves rubbish."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from backend import artifacts
from backend.config import REPO_ROOT
from backend.training.prepared import Prepared
from tests.conftest import World

STEPS = 6

# Trains as `deephair train` does and kills itself at the named point; "never" and "drawing-ahead" run through. One process imports the
# libraries and forks a fresh one for each run: a kill is a real one, and torch is not imported twenty-six times.
DRIVER = """
import json, os, signal, sys, threading, traceback
import peft
import torch.utils.tensorboard
from diffusers import AutoencoderKL, UNet2DConditionModel
from backend import artifacts, cli
from backend.training import checkpoints, lowmem, stage2_run, stage2_step, train_stage2

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, when):
    original = getattr(owner, name)
    calls = []
    def patched(*given, **named):
        calls.append(None)
        if when(len(calls), *given, **named):
            die()
        return original(*given, **named)
    setattr(owner, name, patched)

Step = stage2_step.Stage2Step

def prepare_to_die_at(point):
    if point == "epoch-end":  # the epoch's checkpoint stands, nothing after it has begun
        before(Step, "__call__", lambda n, self, batch, step: step > 0 and (self.config.paths.checkpoints / "stage2_epoch_1.state").is_dir())
    elif point in ("mid-epoch", "worker-count"):  # a step after the checkpoint of step 2, inside the first epoch
        before(Step, "__call__", lambda n, self, batch, step: step == 3)
    elif point == "mid-step":  # in the middle of the fourth step's backward pass
        original = lowmem.FusedFactoredAdam.begin
        def begin(self, update, factor):
            original(self, update, factor)
            if update == 3:
                before(self, "_step", lambda n, slot, gradient: n == 40)
        lowmem.FusedFactoredAdam.begin = begin
    elif point == "mid-accumulation":  # the second micro-batch of the fourth step
        before(Step, "_backward", lambda n, self, loss: n == 3 * 2 + 2)
    elif point == "during-save":  # the second checkpoint's weights are written, its state is not
        before(artifacts, "write_json", lambda n, path, *_: path.name == "state.json" and "step_4" in str(path))
    elif point == "kill-9":  # whenever it comes: from a thread, half a second after the first checkpoint
        original = checkpoints.save
        def save(*given, **named):
            threading.Timer(0.5, die).start()
            return original(*given, **named)
        checkpoints.save = save
    elif point == "drawing-ahead":  # as on a card, by more threads than the run had before
        original = stage2_run.ahead
        stage2_run.ahead = lambda function, items, workers: original(function, items, workers=4)

for line in sys.stdin:
    point, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare_to_die_at(point)
            code = cli.main(["train", *arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Trainer:
    """The driver at work: runs one training after the other, each in a process of its own."""

    def __init__(self, log: Path) -> None:
        self._log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO_ROOT)}
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, text=True
            )

    def run(self, world: World, point: str, **changes: object) -> int:
        """The exit code: 0, or -9 where the run was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([point, world.arguments(**changes)]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer.strip() in ("0", "-9"), self._log.read_text()[-2000:]
        return int(answer)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path_factory.mktemp("trainer") / "log")
    yield trainer
    assert trainer.process.stdin is not None
    trainer.process.stdin.close()
    trainer.process.wait()


def _end(world: World) -> dict[str, torch.Tensor]:
    folder = world.root / "checkpoints"
    return {**artifacts.load_tensors(folder / f"stage2_step_{STEPS}.safetensors"),
            **artifacts.load_tensors(folder / f"stage2_step_{STEPS}.state/optimizer.safetensors")}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("preset", ["full-12gb", "lora"])
def test_a_run_stopped_at_six_points_ends_with_the_same_bits(schooled_world: World, trainer: Trainer, tmp_path: Path, preset: str) -> None:
    """Texture loss and all, on the miniature's networks."""
    accumulate = 2 if preset == "lora" else 1
    photos = len(Prepared(schooled_world.root / "processed").rows("train"))
    size = -(-photos // 5)  # five steps to an epoch
    changes = {"train__preset": preset, "train__steps": STEPS, "train__save_every": 2, "train__validate_every": STEPS, "train__preview_every": 0,
               "train__accumulate": accumulate, "train__batch_size": -(-size // accumulate), "train__lr": 1e-4}  # fmt: skip
    undisturbed = schooled_world.untrained(tmp_path / "undisturbed")
    assert trainer.run(undisturbed, "never", **changes) == 0
    expected = _end(undisturbed)
    middle = "mid-accumulation" if preset == "lora" else "mid-step"
    for point in ("epoch-end", "mid-epoch", middle, "during-save", "kill-9", "worker-count"):
        world = schooled_world.untrained(tmp_path / point)
        killed = trainer.run(world, point, **changes) == -9
        assert killed or point == "kill-9", point  # a quick machine may be at its end before that one comes
        assert killed != (world.root / f"checkpoints/stage2_step_{STEPS}.state").exists() or point == "kill-9", point
        assert trainer.run(world, "drawing-ahead" if point == "worker-count" else "never", **changes) == 0
        found = _end(world)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), point
        shutil.rmtree(world.root / "checkpoints")


# One process that has torch loaded forks 50 savers, each killed at a moment of its own; after each the newest checkpoint must load.
SAVER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from backend.training import checkpoints
torch.set_num_threads(1)
folder = Path(sys.argv[1])
draw, position, unloadable, inside = random.Random(7), 0, 0, 0
for kill in range(50):
    child = os.fork()
    if child == 0:
        step = position
        while True:
            step += 1
            values = {f"w{n}": torch.full((64, 256), float(step)) for n in range(4)}
            checkpoints.save(folder, f"stage2_step_{step}", weights=values, optimizer=values, position={"step": step}, header={})
            checkpoints.prune(folder, "stage2", 2)
    time.sleep(draw.uniform(0.05, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    inside += any(path.name.startswith(".") for path in folder.iterdir())
    found = checkpoints.newest(folder, "stage2")
    if found is None:
        unloadable += position > 0
        continue
    whole = all(bool((value == found.position["step"]).all()) for part in (found.weights, found.optimizer) for value in part.values())
    unloadable += not whole or found.position["step"] < position
    position = found.position["step"]
print(position, unloadable, inside)
"""


@pytest.mark.long
def test_fifty_kills_during_saves_leave_a_whole_checkpoint_each_time(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SAVER, str(tmp_path)], cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    position, unloadable, inside = (int(word) for word in done.stdout.split())
    print(f"{position} saves, {inside} of 50 kills inside one, {unloadable} unloadable")
    assert position > 20 and inside > 20, "the kills must fall into saves"
    assert unloadable == 0
