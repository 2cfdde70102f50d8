"""Gradient checkpointing and torch.compile change what a step costs, not what it learns; also where the optimizer steps inside the backward pass."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from backend.training import presets
from tests.stage2_set import Toy, settings, start


def _gradients(reentrant: bool | None) -> dict[str, torch.Tensor]:
    """Gradients of one float32 step with a kind of recomputation, None for none."""
    toy = Toy(settings(preset="full-80gb", batch_size=2))
    toy.step._autocast = False
    if reentrant is not None:
        toy.model.enable_gradient_checkpointing(reentrant=reentrant)
    loss, _ = toy.step.loss(toy.batches.batch("train", np.arange(2), 0), 0)
    loss.backward()
    return {name: parameter.grad for name, parameter in toy.model.named_parameters() if parameter.grad is not None}


def test_both_kinds_of_recomputation_give_the_gradients_of_none() -> None:
    plain = _gradients(None)
    assert len(plain) > 200
    largest = max(float(gradient.abs().max()) for gradient in plain.values())  # some gradients are zero but for rounding
    for reentrant in (False, True):
        found = _gradients(reentrant)
        assert found.keys() == plain.keys()
        for name, gradient in plain.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * largest), (reentrant, name)


@pytest.mark.parametrize("preset", ["full-12gb", "full-8gb"])
def test_blocks_are_recomputed_before_their_weights_move(preset: str) -> None:
    """The optimizer changes weights in the middle of the backward pass; a block recomputed with changed ones would learn something else.

    At this rate such a block would be far off. What differs honestly is the order of sums, which tips a rounding of bfloat16 now and then.
    """
    ends = []
    for recompute in (False, True):
        toy = Toy(settings(preset=preset, lr=1e-2, injector_lr=1e-2, batch_size=2, gradient_checkpointing=recompute))
        losses = toy.train(1)
        ends.append((losses[0], {name: value.float() for name, value in toy.model.state_dict().items()}))
    (loss, weights), (same_loss, same_weights) = ends
    assert loss == same_loss
    moved = sum(float((value - start().state_dict()[name].float()).abs().sum()) for name, value in weights.items())
    apart = sum(float((value - same_weights[name]).abs().sum()) for name, value in weights.items())
    assert 0 < apart < 0.02 * moved or apart == 0 < moved


def test_only_presets_that_step_inside_the_backward_pass_recompute_reentrantly(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, bool] = {}
    for preset in presets.PRESETS:
        model = copy.deepcopy(start())
        monkeypatch.setattr(
            type(model), "enable_gradient_checkpointing", lambda _, *, reentrant, name=preset: kinds.update({name: reentrant})
        )
        Toy(settings(preset=preset, gradient_checkpointing=True), model)
    assert kinds == {name: preset.inside_backward for name, preset in presets.PRESETS.items()}


@pytest.mark.parametrize("preset", ["full-12gb", "lora"])
def test_compiled_blocks_learn_the_same(preset: str) -> None:
    """Traced by the compiler and run without generated code, since that needs a C++ compiler: the training is the eager one's, bit by bit."""
    ends = []
    for compiled in (False, True):
        torch.compiler.reset()
        toy = Toy(settings(preset=preset, batch_size=1, gradient_checkpointing=True, compile=compiled))
        blocks = [module for module in toy.model.unet.modules() if module._compiled_call_impl is not None]
        assert bool(blocks) == compiled
        with torch.compiler.set_stance("force_eager"):
            toy.train(2)
        ends.append(toy.tensors())
    assert not [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]
