"""A LoRA run's way into production: its bundle holds the adapters, works over its own base alone, and serves what was trained."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch

from backend import artifacts, cli
from backend.config import TrainConfig
from backend.errors import InvalidArtifactError, MissingInputError
from backend.training import candidate, checkpoints, deploy, train_stage2
from backend.training.export_model import export
from backend.training.models.bundle import base_model, contents_of, load_bundle, read_bundle, write_bundle
from backend.training.models.stage2_unet import HairInpaintingUNet, load_unet, unet_config
from backend.training.models.texture_encoder import new_encoder
from backend.training.stage2_files import FORMAT, PREFIX
from backend.training.stage2_step import ready_for_training
from backend.training.stage2_weights import MovingAverage, adapters, checkpoint_tensors, trained
from backend.tryon import conditioning
from tests.conftest import World

BUNDLE = "models/deep_hair_v1.safetensors"
HEADER = {"identity_model": "adaface", "resolution": 128, "gate": {"profile": "evidence"}, "metrics": {}}


def _trained(world: World, **settings: object) -> HairInpaintingUNet:
    """The miniature base with a LoRA, conv_in and injector moved away from where they began."""
    train = TrainConfig(preset="lora", lora_rank=4, gradient_checkpointing=False, **settings)
    base = conditioning.inpainting_folder(world.root / "weights")
    model = ready_for_training(HairInpaintingUNet(load_unet(base / "unet", torch.bfloat16), 1), train, torch.device("cpu"))
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


def _checkpoint(
    folder: Path, model: HairInpaintingUNet, average: MovingAverage | None = None, start: str | None = None
) -> checkpoints.Checkpoint:
    weights, resume = checkpoint_tensors(model, average)
    header = {"format": FORMAT, "step": 1, "unet_config": unet_config(model.unet), "style_tokens": 1, "injection": "appended",
              "config": {"train": {"start": start}}}  # fmt: skip
    checkpoints.save(folder, f"{PREFIX}_step_1", weights=weights, optimizer=resume, position={"step": 1}, header=header)
    return checkpoints.load(folder / f"{PREFIX}_step_1.safetensors")


def _written(world: World, folder: Path) -> Path:
    """The LoRA bundle of such a run, written as export does."""
    checkpoint, encoder = _checkpoint(folder, _trained(world)), new_encoder((1, 1, 1, 1), dropout=0.0, seed=1)
    config = world.config()
    contents = candidate.contents(config, checkpoint, candidate.rebuilt(checkpoint), encoder)
    base = base_model(config.paths.weights)
    write_bundle(folder / "lora.safetensors", contents, {**HEADER, "base": base})
    return folder / "lora.safetensors"


def _other_base(world: World, folder: Path) -> Path:
    """The same weights but for one number of the base UNet."""
    shutil.copytree(world.root / "weights", folder / "weights")
    file = next(folder.glob("weights/**/unet/*.safetensors"))
    tensors = artifacts.load_tensors(file)
    tensors["conv_out.bias"] = tensors["conv_out.bias"] + 1.0
    artifacts.save_tensors(file, tensors, {"format": "pt"})
    return folder / "weights"


@pytest.mark.parametrize("averaged", [False, True])
def test_the_bundle_of_a_lora_holds_adapters_and_reloads_bit_by_bit(raw_world: World, tmp_path: Path, averaged: bool) -> None:
    model = _trained(raw_world)
    average = MovingAverage(trained(model), decay=0.5, every=1) if averaged else None
    if average is not None:
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.mul_(1.5)
    checkpoint, encoder = _checkpoint(tmp_path, model, average), new_encoder((1, 1, 1, 1), dropout=0.0, seed=1)
    config = raw_world.config()
    contents = candidate.contents(config, checkpoint, candidate.rebuilt(checkpoint), encoder)
    write_bundle(tmp_path / "lora.safetensors", contents, {**HEADER, "base": base_model(config.paths.weights)})
    header, tensors = read_bundle(tmp_path / "lora.safetensors")
    assert header["lora"] == {"rank": 4}
    assert {name.split(".")[0] for name in tensors} == {"unet", "lora", "injector", "texture_encoder"}
    assert {name for name in tensors if name.startswith("unet.")} == {"unet.conv_in.weight", "unet.conv_in.bias"}
    live, found = checkpoint.weights, load_bundle(tmp_path / "lora.safetensors", config.paths.weights).model.state_dict()
    assert live.keys() == found.keys() and all(torch.equal(found[name], value) for name, value in live.items())
    moved = next(name for name in live if name.endswith("attn1.to_q.weight"))
    assert not torch.equal(live[moved], load_unet(conditioning.inpainting_folder(config.paths.weights) / "unet", torch.bfloat16).state_dict()[moved.removeprefix("unet.")])  # fmt: skip
    assert set(adapters(checkpoint.optimizer)) == {name.removeprefix("lora.") for name in tensors if name.startswith("lora.")}


def test_another_base_is_refused(raw_world: World, tmp_path: Path) -> None:
    path = _written(raw_world, tmp_path)
    other = _other_base(raw_world, tmp_path / "other")
    with pytest.raises(InvalidArtifactError, match=r"is a LoRA over the base 'miniature.*; the base in .* has sha256"):
        load_bundle(path, other)
    with pytest.raises(MissingInputError, match="pretrained weights are missing"):
        load_bundle(path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="takes the folder of its base"):
        load_bundle(path)
    assert cli.main(["verify", str(path)]) == 0  # the file itself is whole
    checkpoint = checkpoints.load(tmp_path / f"{PREFIX}_step_1.safetensors")
    with pytest.raises(InvalidArtifactError, match="was not trained over the base"):
        candidate.contents(raw_world.config(paths__weights=other), checkpoint, candidate.rebuilt(checkpoint), new_encoder((1, 1, 1, 1), dropout=0.0, seed=1))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: tensors.pop(next(n for n in tensors if n.endswith("lora_B.weight"))), "missing"),
        (lambda tensors, header: tensors.update({"lora.conv_out.lora_A.weight": torch.zeros(4, 9)}), "do not belong"),
        (lambda tensors, header: header.update(lora={"rank": 8}), "has shape"),
        (lambda tensors, header: header.update(base={"name": "?"}), "names no base"),
        (lambda tensors, header: tensors[next(n for n in tensors if n.endswith("lora_A.weight"))].fill_(torch.inf), "not finite"),
        (lambda tensors, header: tensors[next(n for n in tensors if n.endswith("lora_A.weight"))].mul_(2), "do not match the hash"),
    ],
)
def test_a_broken_lora_bundle_is_refused_with_its_reason(raw_world: World, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = _written(raw_world, tmp_path)
    tensors, header = artifacts.load_tensors(path), artifacts.read_header(path)
    change(tensors, header)
    artifacts.save_tensors(path, tensors, header)
    with pytest.raises(InvalidArtifactError, match=message):
        load_bundle(path, raw_world.root / "weights")


def test_a_lora_over_a_start_checkpoint_goes_in_merged(raw_world: World, tmp_path: Path) -> None:
    """No published part is its base, so the bundle must need none."""
    checkpoint, encoder = _checkpoint(tmp_path, _trained(raw_world), start="somewhere.safetensors"), new_encoder((1, 1, 1, 1), dropout=0.0, seed=1)  # fmt: skip
    contents = candidate.contents(raw_world.config(), checkpoint, candidate.rebuilt(checkpoint), encoder)
    assert "lora" not in contents.networks and contents.tensors.keys() == contents_of(candidate.rebuilt(checkpoint), encoder).tensors.keys()


def _run(finished: World, folder: Path, **changes: object) -> tuple[World, dict[str, object]]:
    """A world of its own in which a short run with these settings was trained."""
    world = finished.untrained(folder, "models", "report")
    changes = {"train__start": "null", "train__steps": 3, "train__save_every": 3, "train__preview_every": 0, **changes}
    train_stage2.train(world.config(**changes))
    return world, changes


@pytest.mark.long
@pytest.mark.parametrize("preset", ["lora", "full-12gb"])
def test_a_run_in_half_precision_is_exported_deployed_rolled_back_and_served(finished_world: World, tmp_path: Path, preset: str) -> None:
    """The whole of Stage 3 after a short run over the base model: what painted before the file was written is what is served from it."""
    from fastapi.testclient import TestClient

    from backend.app.api import create_app
    from backend.tryon.pipeline import TryOn

    world, changes = _run(finished_world, tmp_path / "run", train__preset=preset, train__lr=1e-3)
    before = artifacts.sha256_file(world.root / BUNDLE)
    config = world.config(**changes)
    summary = export(config)
    header = artifacts.read_header(world.root / BUNDLE)
    assert summary["deployed"]["sha256"] == artifacts.sha256_file(world.root / BUNDLE) != before
    assert ("lora" in header) == (preset == "lora") and header["base"]["sha256"] == base_model(config.paths.weights)["sha256"]
    if preset == "lora":
        assert "LoRA of rank 16" in (world.root / BUNDLE).with_suffix(".md").read_text()
    trained_weights = artifacts.load_tensors(world.root / "checkpoints/stage2_step_3.safetensors")
    found = load_bundle(world.root / BUNDLE, config.paths.weights).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in trained_weights.items())
    assert deploy.rollback(config)["deployed"]["sha256"] == before
    assert deploy.rollback(config)["deployed"]["sha256"] == summary["deployed"]["sha256"]

    with TestClient(create_app(config), base_url="http://localhost") as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.1)
        assert summary["deployed"]["sha256"] in client.get("/api/v1/models").text
    if preset == "lora":
        other = _other_base(finished_world, tmp_path / "other")
        elsewhere = world.config(**changes, paths__weights=other)
        with pytest.raises(InvalidArtifactError, match="is a LoRA over the base"):
            TryOn.load(elsewhere)
        deploy.rollback(elsewhere)  # the whole UNet that was deployed before needs no base
        with pytest.raises(InvalidArtifactError, match="is a LoRA over the base"):
            deploy.rollback(elsewhere)
        assert artifacts.sha256_file(world.root / BUNDLE) == before
