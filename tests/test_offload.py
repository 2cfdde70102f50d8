"""Preset full-exact's host offload: it changes where weights lie and no bit of what they become."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from backend import artifacts
from backend.config import load_config
from backend.training import checkpoints, offload, presets, train_stage2
from backend.training.memory_plan import _lent_bytes, memory_plan, plan_text
from backend.training.offload import stream
from tests.conftest import World
from tests.stage2_set import CPU, Toy, settings

FULL = ("paths.weights=/nonexistent", "train.batch_size=1")


@pytest.mark.parametrize("recompute", [True, False])
def test_a_run_with_offload_has_the_bits_of_one_without(monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    """Accumulated over two micro-batches and clipped, since both now happen in host memory."""
    ends = []
    for offloaded in (False, True):
        monkeypatch.setattr(presets, "offloaded", lambda *_, chosen=offloaded: chosen)
        toy = Toy(
            settings(
                preset="full-exact", lr=1e-3, injector_lr=1e-3, batch_size=1, accumulate=2, gradient_checkpointing=recompute, clip_norm=0.1
            )
        )
        losses = toy.train(3)
        assert isinstance(toy.optimizer, torch.optim.Optimizer)
        states = checkpoints.optimizer_tensors(toy.optimizer, {p: name for name, p in toy.model.named_parameters()})
        ends.append({**toy.tensors(), **states, "losses": torch.tensor(losses), "validation": torch.tensor(toy.validation_loss())})
    plain, streamed = ends
    assert plain.keys() == streamed.keys()
    assert not [name for name in plain if not torch.equal(plain[name], streamed[name])]


def test_a_layer_borrows_its_weights_for_one_call_and_gives_them_back_even_when_it_fails() -> None:
    """Seen from inside the layer: a copy, not the weight; from outside, before and after: the weight."""
    seen = []

    class Layer(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            seen.append(self.weight)
            return super().forward(input)

    network = nn.Sequential(Layer(3, 2), nn.ReLU())
    twin = copy.deepcopy(network)
    stream(network, CPU)
    weight = network[0].weight
    inputs = torch.randn(4, 3)
    network(inputs).sum().backward()
    twin(inputs).sum().backward()
    assert isinstance(weight, nn.Parameter) and seen[0].data_ptr() != weight.data_ptr() and torch.equal(seen[0], weight)
    assert weight.grad is not None and torch.equal(weight.grad, twin[0].weight.grad)
    with pytest.raises(RuntimeError):
        network(torch.randn(4, 5))
    assert network[0].weight is weight and list(network.state_dict()) == list(twin.state_dict())


def test_offload_is_for_one_process_with_a_card() -> None:
    exact, card = settings(preset="full-exact").train, torch.device("cuda")
    assert presets.offloaded(exact, card, 1)
    assert not presets.offloaded(exact, CPU, 1) and not presets.offloaded(exact, card, 2)
    assert not any(presets.offloaded(settings(preset=name).train, card, 1) for name in presets.PRESETS if name != "full-exact")


def test_the_plan_says_what_lies_in_host_memory() -> None:
    plan = memory_plan(load_config(overrides=["train.preset=full-exact", *FULL]))
    kept = memory_plan(load_config(overrides=["train.preset=full-exact", "train.gradient_checkpointing=false", *FULL]))
    assert plan["host_gib"] == pytest.approx(16 * 2_567_478_084 / 2**30, abs=0.01)
    assert "38.258 GiB  of host memory" in plan_text(plan)
    weights, gradients, optimizer = (line["gib"] for line in plan["lines"][:3])
    # on the card: the injector's 9.5 million float32 numbers and what is borrowed at one moment
    assert 0.04 < weights < 1.0 and gradients == pytest.approx(0.035, abs=0.01) and optimizer == pytest.approx(0.07, abs=0.02)
    assert kept["lines"][0]["gib"] > 9.5, "without recomputation every copy waits for the backward pass"
    assert memory_plan(load_config(overrides=["train.preset=full-80gb", *FULL]))["host_gib"] == 0.0


def test_with_recomputation_no_block_s_weights_wait_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward pass only what lies outside the recomputed blocks is still borrowed, as the plan says."""
    alive: list[weakref.ref[torch.Tensor]] = []
    copied = offload._copy

    def watched(parameter: nn.Parameter | None, device: torch.device) -> torch.Tensor | None:
        copy = copied(parameter, device)
        alive.extend([] if copy is None else [weakref.ref(copy)])
        return copy

    monkeypatch.setattr(offload, "_copy", watched)
    monkeypatch.setattr(presets, "offloaded", lambda *_: True)
    waiting = {}
    for recompute in (True, False):
        toy = Toy(settings(preset="full-exact", batch_size=1, gradient_checkpointing=recompute))
        alive.clear()
        loss, _ = toy.step.loss(toy.batches.batch("train", np.arange(1), 0), 0)
        waiting[recompute] = sum(copy.nbytes for ref in alive if (copy := ref()) is not None)
        loss.backward()
        del loss
        assert not [ref for ref in alive if ref() is not None], "after the backward pass nothing is borrowed"
    lent = _lent_bytes(toy.model.unet, settings(preset="full-exact", gradient_checkpointing=True).train)
    assert 0 < waiting[True] < lent < 0.5 * waiting[False]


@pytest.mark.long
def test_all_of_stage_2_is_the_same_with_offload(monkeypatch: pytest.MonkeyPatch, schooled_world: World, tmp_path: Path) -> None:
    """Caches, texture loss, average, validation, previews, checkpoint, and a resume in the middle: weights, states and pictures. It takes
    two runs of Stage 2, since what lies where matters to all of these."""
    changes = {"train__preset": "full-exact", "train__steps": 4, "train__save_every": 2, "train__validate_every": 4, "train__preview_every": 4,
               "train__ema": 0.9, "train__ema_every": 1}  # fmt: skip
    ends: list[dict[str, bytes]] = []
    for offloaded in (False, True):
        monkeypatch.setattr(presets, "offloaded", lambda *_, chosen=offloaded: chosen)
        world = schooled_world.untrained(tmp_path / str(offloaded))
        train_stage2.train(world.config(**changes))
        folder = world.root / "checkpoints"
        if offloaded:
            for name in ("stage2_step_4", "deep_hair_v1_latest"):
                checkpoints.remove(folder / f"{name}.safetensors")
            train_stage2.train(world.config(**changes))
        files = [*(folder / "previews").glob("*.png"), folder / "stage2_step_4.state/optimizer.safetensors"]
        ends.append({path.name: path.read_bytes() for path in files})
        ends[-1] |= {name: value.numpy().tobytes() for name, value in artifacts.load_tensors(folder / "stage2_step_4.safetensors").items()}
    plain, streamed = ends
    assert plain.keys() == streamed.keys() and len([name for name in plain if name.endswith(".png")]) == 2
    assert not [name for name in plain if plain[name] != streamed[name]]
