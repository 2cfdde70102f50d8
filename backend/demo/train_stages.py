"""The parts that the product's own stages train: a ResNet start for Stage 1 and a checkpoint for Stage 2 to go on from.

Both come out of ``configs/miniature.yaml`` on a set of heads of its own (``khairstyle_set.LEARN``), by the code that users run, from the
parts that are trained before them. Neither has seen a head of the demo or the bench set.
"""

from __future__ import annotations

import logging
import shutil
from typing import Any

from backend import artifacts
from backend.config import REPO_ROOT, Config, load_config
from backend.demo import miniature, train_loop, train_textures, world
from backend.errors import MissingInputError
from backend.training import checkpoints, train_stage2
from backend.training.prepare_dataset_deephair import prepare
from backend.training.stage2_files import PREFIX, texture_encoder_path
from backend.training.train_texture import RESULT, train_texture

_BACKBONE = "backbone."
FIRST = {"steps": 900, "lr": 5e-4, "ema": 0.0}
ROUNDS: dict[str, list[dict[str, Any]]] = {"short": [FIRST, FIRST, {}], "long": [{}]}
"""Runs of Stage 1, each from the ResNet of the one before, and what each changes in the configuration: better features from few steps, and an
average of the weights at the end."""

TEXTURED: dict[str, Any] = {
    "steps": 600, "lr": 1e-4, "injector_lr": 4e-4, "warmup": 20, "texture_every": 1, "texture_weight": 1.0, "texture_max_timestep": 1000,
    "save_every": 100, "validate_every": 200, "preview_every": 0,
}  # fmt: skip
"""What a second run of Stage 2 changes, from the weights of the first: with the texture loss."""

LONG = (
    "data.split=[0.9, 0.04, 0.06]", "texture.steps=4000", "texture.batch_size=192", "texture.lr=8.0e-4", "texture.warmup=200",
    "texture.save_every=500", "train.steps=3600", "train.batch_size=192", "train.lr=5.0e-4", "train.warmup=200", "train.save_every=900",
    "train.validation_samples=64",
)  # fmt: skip
"""Settings of configs/miniature.yaml that the long training changes."""

logger = logging.getLogger(__name__)


def _set(place: train_loop.Workplace) -> str:
    return "demo" if place.limit else "learn" if place.length == "short" else "learn-long"


def train_resnet(place: train_loop.Workplace) -> dict[str, Any]:
    """Drawn strands, then Stage 0 and Stage 1 on the learning set; the encoder's ResNet is the part, its heads stay behind."""
    tensors = train_textures.school(place)
    config = _world(place)
    prepare(config)
    rounds, steps = ROUNDS[place.length], 0
    for number, changes in enumerate(rounds, start=1):
        last = number == len(rounds)
        folder = config.paths.checkpoints if last else config.paths.checkpoints.parent / f"round_{number}"
        texture = config.texture.model_copy(update={} if place.limit else changes)
        miniature.write_resnet(config.paths.weights, _half(tensors))
        paths = config.paths.model_copy(update={"checkpoints": folder})
        result = train_texture(config.model_copy(update={"texture": texture, "paths": paths}))
        steps += result["steps"]
        encoder = artifacts.load_tensors(folder / RESULT)
        tensors = {name.removeprefix(_BACKBONE): tensor for name, tensor in encoder.items() if name.startswith(_BACKBONE)}
        logger.info("Stage 1 in %s: %s", folder.name, _accuracies(result))
    miniature.write_resnet(place.weights, _half(tensors))
    return {"steps": steps, "set": _set(place), "scores": _accuracies(result)}


def _accuracies(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if "balanced_accuracy" in name}


def _half(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def train_stage2_start(place: train_loop.Workplace) -> dict[str, Any]:
    """Stage 2 on the learning set with the encoder of ``train_resnet``: from the base UNet, then for a while with the texture loss."""
    config = _world(place)
    first = train_stage2.train(config)
    textured = config.paths.checkpoints.parent / "textured"
    textured.mkdir(exist_ok=True)
    shutil.copy(texture_encoder_path(config), textured)
    train = config.train.model_copy(
        update=TEXTURED | {"start": _newest(config).weights_path} | ({"steps": place.limit} if place.limit else {})
    )
    config = config.model_copy(update={"train": train, "paths": config.paths.model_copy(update={"checkpoints": textured})})
    last = train_stage2.train(config)
    miniature.write_stage2(place.weights, _newest(config).weights)
    scores = {"loss_first": first["loss_first"], "loss_last": first["loss_last"], "loss_textured": last["loss_last"]}
    return {"steps": first["steps"] + last["steps"], "set": _set(place), "scores": scores}


def _newest(config: Config) -> checkpoints.Checkpoint:
    found = checkpoints.newest(config.paths.checkpoints, PREFIX)
    if found is None:
        raise MissingInputError(f"Stage 2 left no checkpoint in {config.paths.checkpoints}")
    return found


def _world(place: train_loop.Workplace) -> Config:
    """The configuration with its folders in the workplace, the set rendered, and the trained parts so far as pretrained weights.

    Results of these two functions are left out, so that a second run starts where the first did.
    """
    root = place.checkpoints.parent / "learn"
    folders = ("processed", "checkpoints", "models", "report", "jobs")
    overrides = [f"paths.{name}={root / name}" for name in folders] + [f"paths.weights={root / 'pretrained'}"]
    overrides += [f"data.{name}={root / 'khairstyle' / name}" for name in ("images", "labels")]
    if place.device.type == "cuda":
        overrides.append("device=cuda")
    overrides += [f"data.workers={place.workers}", f"texture.workers={place.loaders}", *(LONG if place.length == "long" else ())]
    if place.limit:
        overrides += [f"{stage}.{key}" for stage in ("texture", "train") for key in (f"steps={place.limit}", "warmup=0")]
        overrides.append("data.split=[0.5, 0.25, 0.25]")
    config = load_config(REPO_ROOT / "configs" / "miniature.yaml", overrides)
    for folder in ("pretrained", "trained"):
        shutil.rmtree(root / folder, ignore_errors=True)
    for part in miniature.PARTS:
        if part.name not in ("resnet", "stage2") and (place.weights / part.card).is_file():
            miniature.copy_part(part, place.weights, root / "trained")
    miniature.build(root / "pretrained", seed=place.seed, trained=root / "trained")
    world.build_world(config, _set(place))
    return config
