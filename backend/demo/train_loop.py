"""One resumable training loop for all miniature parts: a checkpoint every so many steps, every draw keyed by its step."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import cv2
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from backend.training import checkpoints, keyed
from backend.training.averaging import follow

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Length = Literal["short", "long"]
"""short: three hours on two CPU cores for all parts. long: what the shipped weights had; minutes on a graphics card, days without."""


class OutOfTime(Exception):
    """The budget is spent; the checkpoint is written and the next run goes on from it."""


@dataclass(frozen=True)
class Schedule:
    """How one part is trained, on how many photos."""

    steps: int
    batch_size: int
    lr: float
    photos: int
    warmup: int = 50
    weight_decay: float = 1e-2
    save_every: int = 200
    average: float = 0.0  # decay of an exponential moving average of the weights, used in place of the last ones; 0: none


@dataclass(frozen=True)
class Workplace:
    """Where and how a part is trained.

    Its ``checkpoints``, the photo ``cache``, the ``weights`` folder that receives it, the seed, the end of the budget (by
    ``time.monotonic``), the number of rendering processes, the device, the number of processes that draw batches ahead (0: the loop
    draws its own), the length of training, the most steps that a part takes (None: all; a few try the script), a weights folder whose
    parts are gone on from (None: from nothing), and whether networks compute in bfloat16 (their weights stay float32).
    """

    checkpoints: Path
    cache: Path
    weights: Path
    seed: int
    deadline: float
    workers: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    loaders: int = 0
    length: Length = "short"
    limit: int | None = None
    start: Path | None = None
    bf16: bool = False

    def pick(self, short: Schedule, long: Schedule) -> Schedule:
        """The schedule of this length; with a ``limit`` cut to as many steps, and to 64 photos where it starts from nothing.

        What goes on from trained weights learns at half the rate.
        """
        chosen = short if self.length == "short" else long
        if self.start is not None:
            return replace(chosen, lr=chosen.lr / 2, steps=self.limit or chosen.steps)
        return chosen if self.limit is None else replace(chosen, steps=self.limit, photos=min(chosen.photos, 64))


class _Steps(Dataset[Batch]):
    """The batches of all steps, each computed from its number."""

    def __init__(self, batch_of: Callable[[int], Batch]) -> None:
        self._batch_of = batch_of

    def __getitem__(self, step: int) -> Batch:
        return self._batch_of(step)


def drawn_ahead(batch_of: Callable[[int], Batch], steps: range, place: Workplace) -> Iterator[Batch]:
    """``batch_of(step)`` for each step in order, on the workplace's device; ``place.loaders`` processes compute ahead.

    ``batch_of`` is pickled where there are such: a partial of a module's function.
    """
    context = None
    if place.loaders:
        # Not a fork of this process: torch and OpenCV have threads here, and a fork of those can hang.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([getattr(batch_of, "func", batch_of).__module__])
    loader = DataLoader(
        _Steps(batch_of),
        sampler=steps,
        batch_size=None,
        num_workers=place.loaders,
        multiprocessing_context=context,
        worker_init_fn=_one_thread if place.loaders else None,
        prefetch_factor=4 if place.loaders else None,
        pin_memory=place.device.type == "cuda",
    )
    for batch in loader:
        yield {name: value.to(place.device, non_blocking=True) for name, value in batch.items()}


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def fit(
    name: str,
    net: nn.Module,
    batch_of: Callable[[int], Batch],
    loss_of: Callable[[int, Batch], Tensor],
    schedule: Schedule,
    place: Workplace,
) -> float:
    """Trains ``net`` in place by AdamW over ``loss_of(step, batch_of(step))``; goes on from the newest checkpoint.

    ``batch_of`` draws from generators keyed by the step, on the CPU and perhaps in another process, so a resumed run sees what an
    undisturbed one sees. ``loss_of`` computes on the workplace's device, and returns a scalar. The network is back on the CPU afterwards.
    Returns the last smoothed loss. Raises OutOfTime after a checkpoint when the budget ends before the steps do.
    """
    net.to(place.device)
    names = {parameter: key for key, parameter in net.named_parameters() if parameter.requires_grad}
    fused = place.device.type == "cuda"
    optimizer = torch.optim.AdamW(names, lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.99), fused=fused)
    average = {key: value.clone() for key, value in net.state_dict().items()} if schedule.average else {}
    first, done = _resume(name, net, optimizer, names, average, place.checkpoints)
    smooth = torch.tensor(done, device=place.device)
    began = time.monotonic()
    net.train()
    batches = drawn_ahead(batch_of, range(first, schedule.steps), place)
    for step in range(first, schedule.steps + 1):
        late = time.monotonic() > place.deadline
        if step > first and (step == schedule.steps or step % schedule.save_every == 0 or late):
            _save(name, step, net, optimizer, names, average, float(smooth), place.checkpoints)
            pace = (time.monotonic() - began) / (step - first)
            logger.info("%s step %d/%d loss %.4f, %.3f s/step", name, step, schedule.steps, float(smooth), pace)
        if step == schedule.steps:
            break
        if late:
            raise OutOfTime(f"{name} stopped at step {step} of {schedule.steps}; run again to go on")
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * keyed.warmup_cosine(step, warmup=schedule.warmup, total=schedule.steps, floor=0.02)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed.key(place.seed, f"{name}-layers", step))  # drop-out inside library models draws globally
            with torch.autocast(place.device.type, torch.bfloat16, enabled=place.bf16):
                loss = loss_of(step, batch)
            loss.backward()
        nn.utils.clip_grad_norm_(names, 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.detach().float() if step == 0 else 0.98 * smooth + 0.02 * loss.detach().float()
        follow(average, net.state_dict(), schedule.average, step)
    if average:
        net.load_state_dict(average)
    net.eval().to("cpu")
    return float(smooth)


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
