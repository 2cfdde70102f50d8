"""One resumable training loop for all miniature parts: a checkpoint every so many steps, every draw keyed by its step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backend.training import checkpoints, keyed

logger = logging.getLogger(__name__)


class OutOfTime(Exception):
    """The budget is spent; the checkpoint is written and the next run goes on from it."""


@dataclass(frozen=True)
class Schedule:
    """How one part is trained."""

    steps: int
    batch_size: int
    lr: float
    warmup: int = 50
    weight_decay: float = 1e-2
    save_every: int = 200
    average: float = 0.0  # decay of an exponential moving average of the weights, used in place of the last ones; 0: none


@dataclass(frozen=True)
class Workplace:
    """Where a part is trained: its ``checkpoints``, the photo ``cache``, the ``weights`` folder that receives it, the seed, the end of
    the budget (by ``time.monotonic``) and the number of rendering processes."""

    checkpoints: Path
    cache: Path
    weights: Path
    seed: int
    deadline: float
    workers: int


def fit(name: str, net: nn.Module, loss_of: Callable[[int], Tensor], schedule: Schedule, place: Workplace) -> float:
    """Trains ``net`` in place by AdamW over ``loss_of(step)``; goes on from the newest checkpoint. Returns the last smoothed loss.

    ``loss_of`` draws its batch from generators keyed by the step, so a resumed run sees what an undisturbed one sees. Raises
    OutOfTime after a checkpoint when the budget ends before the steps do.
    """
    names = {parameter: key for key, parameter in net.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(names, lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.99))
    average = {key: value.clone() for key, value in net.state_dict().items()} if schedule.average else {}
    first, smooth = _resume(name, net, optimizer, names, average, place.checkpoints)
    began = time.monotonic()
    net.train()
    for step in range(first, schedule.steps + 1):
        late = time.monotonic() > place.deadline
        if step > first and (step == schedule.steps or step % schedule.save_every == 0 or late):
            _save(name, step, net, optimizer, names, average, smooth, place.checkpoints)
            logger.info(
                "%s step %d/%d loss %.4f, %.2f s/step", name, step, schedule.steps, smooth, (time.monotonic() - began) / (step - first)
            )
        if step == schedule.steps:
            break
        if late:
            raise OutOfTime(f"{name} stopped at step {step} of {schedule.steps}; run again to go on")
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * keyed.warmup_cosine(step, warmup=schedule.warmup, total=schedule.steps, floor=0.02)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed.key(place.seed, f"{name}-layers", step))  # drop-out inside library models draws globally
            loss = loss_of(step)
            loss.backward()
        nn.utils.clip_grad_norm_(names, 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = float(loss.detach()) if step == 0 else 0.98 * smooth + 0.02 * float(loss.detach())
        _follow(average, net, min(schedule.average, (step + 1) / (step + 10)))
    if average:
        net.load_state_dict(average)
    net.eval()
    return smooth


@torch.no_grad()
def _follow(average: dict[str, Tensor], net: nn.Module, decay: float) -> None:
    state = net.state_dict()
    for key, value in average.items():
        if value.is_floating_point():
            value.lerp_(state[key], 1 - decay)
        else:
            value.copy_(state[key])


def _save(
    name: str, step: int, net: nn.Module, optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], average: dict[str, Tensor],
    smooth: float, folder: Path,
) -> None:  # fmt: skip
    weights = {f"net|{key}": value for key, value in net.state_dict().items()} | {f"average|{key}": value for key, value in average.items()}
    checkpoints.save(
        folder,
        f"{name}_step_{step}",
        weights=weights,
        optimizer=checkpoints.optimizer_tensors(optimizer, names),
        position={"step": step, "loss": smooth},
        header={"format": "deephair-miniature-1", "part": name},
    )
    checkpoints.prune(folder, name, keep=1)


def _resume(
    name: str, net: nn.Module, optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], average: dict[str, Tensor], folder: Path
) -> tuple[int, float]:
    found = checkpoints.newest(folder, name)
    if found is None:
        return 0, 0.0
    net.load_state_dict({key.removeprefix("net|"): value for key, value in found.weights.items() if key.startswith("net|")})
    for key, value in average.items():
        value.copy_(found.weights[f"average|{key}"])
    checkpoints.restore_optimizer(optimizer, names, found.optimizer)
    logger.info("%s goes on from step %d", name, found.position["step"])
    return int(found.position["step"]), float(found.position["loss"])
