"""Two ways for style and identity tokens to reach the UNet: what they change at step 0, and that they steer it once trained."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from backend.training.models.bundle import contents_of, load_bundle, write_bundle
from backend.training.models.stage2_unet import Conditions, HairInpaintingUNet, time_ids
from backend.training.models.texture_encoder import TextureEncoder
from benchmarks.stage2_parts import random_unet
from tests.stage2_set import CPU, SIZE, Toy, settings


def _model(injection: str) -> HairInpaintingUNet:
    torch.manual_seed(3)
    return HairInpaintingUNet(random_unet(SIZE, CPU, torch.float32), 1, injection).eval()


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Conditions, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    yes = torch.ones(2, dtype=torch.bool)
    conditions = Conditions(normal(2, 77, SIZE.text_width), normal(2, SIZE.pooled_width), normal(2, 1, 2048), yes, normal(2, 512), yes)
    return normal(2, 4, 8, 8), torch.ones(2, 1, 8, 8), normal(2, 4, 8, 8), torch.tensor([10, 700]), conditions, time_ids(2, 64)


@torch.no_grad()
def _base(unet) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """What diffusers' own UNet predicts from the text alone."""
    noisy, mask, bald, timesteps, conditions, ids = _inputs()
    unet.set_attn_processor(AttnProcessor2_0())
    added = {"text_embeds": conditions.pooled, "time_ids": ids}
    return unet(torch.cat([noisy, mask, bald], 1), timesteps, encoder_hidden_states=conditions.text, added_cond_kwargs=added)[0]


@torch.no_grad()
def test_at_step_0_decoupled_tokens_change_no_bit_and_appended_ones_none_when_masked_out(capsys: pytest.CaptureFixture[str]) -> None:
    decoupled, appended = _model("decoupled"), _model("appended")
    base = _base(copy.deepcopy(appended.unet))
    assert torch.equal(_base(copy.deepcopy(decoupled.unet)), base), "both were built from the same base"
    assert torch.equal(decoupled(*_inputs()), base)
    assert torch.equal(decoupled(*_inputs(), tokens=False), base)
    assert torch.equal(appended(*_inputs(), tokens=False), base)
    change = (appended(*_inputs()) - base).square().mean().sqrt() / base.square().mean().sqrt()
    assert float(change) > 1e-4, "tokens in the text's softmax take attention from it even when they are unlearnt"
    with capsys.disabled():
        print(f"\nappended tokens change the prediction at step 0 by {100 * float(change):.2f} % of its root mean square")


@pytest.mark.parametrize("injection", ["appended", "decoupled"])
def test_style_steers_the_prediction_after_training_and_null_tokens_do_not_see_it(injection: str) -> None:
    toy = Toy(settings(preset="full-exact", lr=1e-3, injector_lr=1e-2, batch_size=2, injection=injection), _model(injection))
    toy.train(12)
    toy.model.eval()
    noisy, mask, bald, timesteps, conditions, ids = _inputs()
    shuffled = dataclasses.replace(conditions, style=conditions.style.flip(0))
    nobody = torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        first, second = (toy.model(noisy, mask, bald, timesteps, given, ids) for given in (conditions, shuffled))
        assert float((first - second).abs().max()) > 1e-4
        nulls = [
            toy.model(noisy, mask, bald, timesteps, dataclasses.replace(c, style_valid=nobody, identity_valid=nobody), ids)
            for c in (conditions, dataclasses.replace(shuffled, identity=conditions.identity.flip(0)))
        ]
        assert torch.equal(*nulls)
        valid = dataclasses.replace(conditions, identity_valid=torch.tensor([True, False]))
        other = dataclasses.replace(valid, identity=torch.stack([valid.identity[0], -valid.identity[1]]))
        assert torch.equal(toy.model(noisy, mask, bald, timesteps, valid, ids), toy.model(noisy, mask, bald, timesteps, other, ids))


def test_a_decoupled_network_is_deployed_with_its_branches(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = _model("decoupled")
    with torch.no_grad():
        for branch in model.injector.branches:
            branch.gate.fill_(0.5)
    header = dict.fromkeys(("identity_model", "resolution", "base", "gate", "metrics"), "a test")
    write_bundle(tmp_path / "bundle.safetensors", contents_of(model, TextureEncoder((1, 1, 1, 1))), header)
    loaded = load_bundle(tmp_path / "bundle.safetensors").model
    assert loaded.injection == "decoupled"
    with torch.no_grad():
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert torch.allclose(loaded(*_inputs()), model(*_inputs()), atol=1e-5)
        assert not torch.equal(loaded(*_inputs()), loaded(*_inputs(), tokens=False))
