"""Networks that are on the card only while they compute, what is remembered between jobs, and a compiled UNet.

There is no card here. A network at rest is given another precision instead of another device: computing with one then fails as computing
on two devices does ("expected scalar type Double but found Float"), and back and forth between float32 and float64 is exact.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from backend.config import Config
from backend.demo.architectures import controlnet
from backend.errors import DeepHairError
from backend.training.models.bundle import load_bundle
from backend.tryon import conditioning
from backend.tryon.painter import Painter, PaintRequest
from backend.tryon.pipeline import TryOn
from backend.tryon.placement import Placement
from backend.tryon.remembered import Remembered
from backend.tryon.values import Cancelled, TryOnRequest
from tests.conftest import World
from tests.test_tryon import _portrait

CARD, REST = torch.float32, torch.float64


@pytest.fixture(scope="module")
def config(finished_world: World) -> Config:
    return finished_world.config()


def _painter(config: Config, placement: Any) -> Painter:
    bundle = load_bundle(config.paths.bundle, config.paths.weights)
    return Painter(bundle.model, bundle.texture_encoder, config, placement=placement)


def _networks(painter: Painter) -> dict[str, nn.Module]:
    text, text_2 = painter._texts.encoders
    model = painter.sampler.model
    return {"unet": model, "vae": painter.sampler.vae, "text": text, "text_2": text_2, "texture": painter.texture_encoder}


def _precision(network: nn.Module) -> torch.dtype:
    (dtype,) = {value.dtype for value in network.parameters()}
    return dtype


def _request(config: Config, seed: int, prompt: str = "short curly hair") -> PaintRequest:
    side, random = config.data.resolution, np.random.default_rng(0)
    region = np.zeros((side, side), np.uint8)
    region[: side // 2] = 255
    photo = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
    head = conditioning.HeadInput(region, photo, np.zeros_like(photo))
    return PaintRequest(head, random.integers(0, 256, (224, 224, 3), dtype=np.uint8), None, prompt, seed, photo)


@contextmanager
def _watched(networks: dict[str, nn.Module], order: list[str]) -> Iterator[None]:
    """Writes down each network that computes, and holds it against the others: none of them is on the card beside it."""
    inner = {"unet": "unet", "vae": "encoder decoder", "text": "", "text_2": "", "texture": "backbone.conv1"}

    def seen(name: str) -> Any:
        def hook(*_: Any) -> None:
            present = {other for other, network in networks.items() if _precision(network) == CARD}
            assert present == {name}, f"{present} on the card while {name} computes"
            if order[-1:] != [name]:
                order.append(name)

        return hook

    hooks = []
    for name, network in networks.items():
        hooks += [network.get_submodule(part).register_forward_pre_hook(seen(name)) for part in inner[name].split() or [""]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_one_network_is_on_the_card_at_a_time_and_the_picture_is_the_same(config: Config) -> None:
    painter, always = _painter(config, Placement(CARD, REST)), _painter(config, None)  # type: ignore[arg-type]
    networks, order = _networks(painter), []
    before = {name: {key: id(value) for key, value in network.named_parameters()} for name, network in networks.items()}
    for strength in (1.0, 0.5):
        with _watched(networks, order):
            picture = painter.paint([_request(config, 1)], steps=3, guidance=2.0, strength=strength)
        assert {name: _precision(network) for name, network in networks.items()} == dict.fromkeys(networks, REST)
        assert torch.equal(picture, always.paint([_request(config, 1)], steps=3, guidance=2.0, strength=strength))
    assert order[:6] == ["text", "text_2", "texture", "vae", "unet", "vae"]
    after = {name: {key: id(value) for key, value in network.named_parameters()} for name, network in networks.items()}
    assert after == before  # moved, not copied


def test_a_network_that_computes_at_rest_fails_here_as_it_would_on_a_card(config: Config) -> None:
    """What the test above stands on: forgetting to fetch a network is an error, not another precision in silence."""
    painter = _painter(config, Placement(CARD, REST))  # type: ignore[arg-type]
    vae = painter.sampler.vae
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(RuntimeError):
        vae.encode(images)
    with painter.sampler.placement.used(vae):
        vae.encode(images)


def test_a_job_that_stops_leaves_every_network_at_rest(config: Config) -> None:
    painter = _painter(config, Placement(CARD, REST))  # type: ignore[arg-type]
    with pytest.raises(Cancelled):
        painter.paint([_request(config, 1)], steps=3, guidance=2.0, cancelled=lambda: True)
    assert {_precision(network) for network in _networks(painter).values()} == {REST}


def test_the_setting_rests_on_the_cpu(config: Config) -> None:
    with_it = _painter(config.model_copy(update={"sample": config.sample.model_copy(update={"offload": True})}), None)
    assert with_it.sampler.placement == Placement(torch.device("cpu"), torch.device("cpu"))
    assert _painter(config, None).sampler.placement.rest is None


def test_a_painter_holds_each_weight_once(config: Config) -> None:
    """Of all live parameters of one shape and value there is one: pipelines, samplers and placements share the modules."""
    gc.collect()
    present = {id(value) for value in gc.get_objects() if isinstance(value, nn.Parameter)}
    painter = _painter(config, Placement(CARD, REST))  # type: ignore[arg-type]
    painter.paint([_request(config, 1)], steps=2, guidance=2.0)
    gc.collect()
    own = {id(value) for network in _networks(painter).values() for value in network.parameters()}
    made = {id(value) for value in gc.get_objects() if isinstance(value, nn.Parameter)} - present
    assert made == own


# ---- what is remembered ----


def test_the_last_values_are_remembered_and_no_more() -> None:
    made: list[str] = []

    def value(key: str) -> str:
        return memory.get(key, lambda: made.append(key) or key.upper())  # type: ignore[func-returns-value]

    memory: Remembered[str, str] = Remembered(2)
    assert [value(key) for key in "aabacab"] == list("AABACAB")
    assert made == ["a", "b", "c", "b"]  # b was the one asked for longest ago when c came
    with pytest.raises(ZeroDivisionError):
        memory.get("d", lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    assert value("b") == "B" and made == ["a", "b", "c", "b"]


def test_an_offered_reference_is_looked_at_once_and_its_picture_is_the_same(config: Config) -> None:
    tryon, target = TryOn.load(config), _portrait(7)
    looked: list[tuple[int, ...]] = []
    look = tryon.style_picture
    tryon.style_picture = lambda photo: looked.append(photo.shape) or look(photo)  # type: ignore[method-assign,func-returns-value]
    offered, own = (TryOnRequest(target, _portrait(11), seed=3, remember=remember) for remember in (True, False))
    first = tryon.run(offered).image
    assert np.array_equal(first, tryon.run(offered).image) and len(looked) == 1
    assert np.array_equal(first, tryon.run(own).image) and len(looked) == 2  # a person's own is forgotten with its job
    other = tryon.run(TryOnRequest(target, _portrait(12), seed=3, remember=True)).image
    assert not np.array_equal(first, other)
    assert np.array_equal(other, TryOn.load(config).run(TryOnRequest(target, _portrait(12), seed=3)).image)


@pytest.mark.long
def test_a_compiled_unet_paints_the_same(config: Config) -> None:
    """Compiling takes half a minute; it must need no second copy and change no more than the order of additions does."""
    compiled = config.model_copy(update={"sample": config.sample.model_copy(update={"compile": True})})
    try:
        tryon = TryOn.load(compiled)
    except (DeepHairError, RuntimeError) as error:
        if "compiler" not in str(error).lower():
            raise
        pytest.skip("needs a C++ compiler")
    plain, request = TryOn.load(config), _request(config, 1)
    assert tryon._painter.sampler.model.unet._compiled_call_impl is not None
    assert tryon._painter.sampler.model.state_dict().keys() == plain._painter.sampler.model.state_dict().keys()
    pictures = [t._painter.paint([request], steps=3, guidance=2.0) for t in (tryon, plain)]
    torch.testing.assert_close(*pictures, rtol=0, atol=2e-3)


def test_offload_reaches_a_controlnet(config: Config) -> None:
    """It computes between the UNet's own calls, so it must be on the card with it."""
    import dataclasses

    torch.manual_seed(0)
    painter = _painter(config, Placement(CARD, REST))  # type: ignore[arg-type]
    steering = controlnet().eval().to(REST)  # type: ignore[assignment]
    sampler = dataclasses.replace(painter.sampler, controlnet=steering)
    painter.sampler = sampler
    painter.paint([_request(config, 1)], steps=2, guidance=2.0)
    assert _precision(steering) == REST
