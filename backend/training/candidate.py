"""The model that asks to be deployed: built from its checkpoint, described by its header, compared with its own file (DESIGN 4.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from backend import artifacts, weights
from backend.config import Config
from backend.errors import InvalidArtifactError
from backend.imaging import patches
from backend.training import checkpoints

if TYPE_CHECKING:
    import torch

    from backend.training.models.bundle import Contents
    from backend.training.painting import Scene
    from backend.tryon.painter import Painter


def rebuilt(checkpoint: checkpoints.Checkpoint) -> Any:
    """The network of a Stage 2 checkpoint, in the precision of its training, in eval mode.

    Raises InvalidArtifactError when its header describes no network, or its tensors are not, finite, those of that network.
    """
    from backend.training.models.bundle import check_tensors, filled
    from backend.training.models.stage2_unet import network_of

    try:
        network = network_of(checkpoint.header)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArtifactError(f"{checkpoint.weights_path}: its header describes no network that can be built: {error!r}") from error
    check_tensors(checkpoint.weights_path, checkpoint.weights, network.state_dict())
    return filled(network, checkpoint.weights)


def other_set(config: Config, checkpoint: checkpoints.Checkpoint) -> str:
    """What is wrong where a checkpoint was trained on another prepared set than the one that measures it; empty where nothing is, or where
    its header does not say."""
    trained_on = checkpoint.header.get("data_digest")
    if trained_on in (None, artifacts.sha256_file(config.paths.processed / "metadata.jsonl")):
        return ""
    return f"{checkpoint.weights_path.name} was trained on another prepared set: heads that it has seen may be among those that measure it"


def contents(config: Config, checkpoint: checkpoints.Checkpoint, model: Any, encoder: Any) -> Contents:
    """What the bundle of a checkpoint will hold: a LoRA where one was trained over the base model, else the whole UNet.

    A LoRA over ``train.start`` goes in merged, since its base is no part that users have. Raises InvalidArtifactError when the base below
    ``paths.weights`` with the LoRA on it is not, bit by bit, what was trained.
    """
    import torch

    from backend.training.models.bundle import contents_of, merged_over_base
    from backend.training.stage2_weights import adapters

    lora = adapters(checkpoint.optimizer)
    if not lora or checkpoint.header["config"]["train"]["start"] is not None:
        return contents_of(model, encoder)
    found = contents_of(model, encoder, lora)
    again = merged_over_base(found.tensors, config.paths.weights)
    trained = {name: value for name, value in checkpoint.weights.items() if name.startswith("unet.")}
    if again.keys() != trained.keys() or not all(torch.equal(again[name], value) for name, value in trained.items()):
        raise InvalidArtifactError(
            f"{checkpoint.weights_path.name} holds a LoRA that was not trained over the base in {config.paths.weights}",
            hint="put back the base that it was trained over",
        )
    return found


def deployed_model(config: Config, digest: str) -> tuple[Callable[[], Painter] | None, str]:
    """How the model in production is loaded for the comparison, or None and why it cannot be compared (nothing where there is none).

    digest: the ``content_sha256`` of the model that asks to be deployed.
    """
    from backend.training.models.bundle import base_model, load_bundle
    from backend.tryon.painter import Painter

    path = config.paths.bundle
    if not path.is_file():
        return None, ""
    try:
        found = load_bundle(path, config.paths.weights).header
    except InvalidArtifactError as error:
        return None, f"the deployed model cannot be loaded: {error}"
    base = base_model(config.paths.weights)["sha256"]
    own = {"resolution": config.data.resolution, "identity_model": config.identity_model, "base": base}
    theirs = {**found, "base": found["base"].get("sha256")}
    other = [f"its {name} is {theirs[name]}, here {value}" for name, value in own.items() if theirs[name] != value]
    if other:
        return None, f"the deployed model belongs to another set-up: {'; '.join(other)}"
    if found["content_sha256"] == digest:
        return None, "the deployed model has the same weights"
    return lambda: Painter.of_bundle(load_bundle(path, config.paths.weights), config), ""


def header(
    config: Config, trained: dict[str, Any], figures: dict[str, Any], gate: dict[str, Any], environment: dict[str, Any]
) -> dict[str, Any]:
    """What the bundle says of itself, beside what its networks say (``bundle.write_bundle``)."""
    from backend.training.models.bundle import base_model

    metadata = config.paths.processed / "metadata.jsonl"
    return {
        "name": "deep_hair_v1",
        "step": trained["step"],
        "resolution": config.data.resolution,
        "identity_model": config.identity_model,
        "base": base_model(config.paths.weights),
        "config": config.resolved(),
        "config_digest": config.digest(),
        "data_digest": artifacts.sha256_file(metadata),
        "metrics": {name: value for name, value in figures.items() if name != "slices"},  # those are in the report
        "gate": gate,
        "git_commit": environment["git_commit"],
        "weights": environment["weights"],
        "miniature": weights.is_miniature(config.paths.weights),
        "licences": {part.name: part.licence for part in weights.PARTS},
    }


def painted(painter: Painter, scene: Scene, config: Config) -> torch.Tensor:
    """One pair painted at a fixed seed, style and identity included: (1, 3, S, S) on the CPU."""
    from backend.tryon.painter import PaintRequest

    style = patches.style_picture(scene.reference.photo, scene.reference.hair)
    request = PaintRequest(scene.head, style, scene.target.identity, scene.target.prompt, seed=0)
    return painter.paint([request], steps=2, guidance=config.evaluate.guidance).cpu()


def require_equal(ours: torch.Tensor, reloaded: torch.Tensor) -> None:
    """What the live and the reloaded networks have ``painted`` must agree bit by bit; raises InvalidArtifactError."""
    if not bool((ours == reloaded).all()):
        difference = float((ours - reloaded).abs().max())
        raise InvalidArtifactError(f"the reloaded bundle paints another picture than the trained model (largest difference {difference:g})")
