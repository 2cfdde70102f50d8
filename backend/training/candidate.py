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
    from backend.training.painting import Scene
    from backend.tryon.painter import Painter


def rebuilt(checkpoint: checkpoints.Checkpoint) -> Any:
    """The network of a Stage 2 checkpoint, in eval mode."""
    from backend.training.models.stage2_unet import network_of

    model = network_of(checkpoint.header)
    model.unet.to(checkpoint.weights["unet.conv_in.weight"].dtype)
    model.load_state_dict(checkpoint.weights)
    return model.eval().requires_grad_(False)


def deployed_model(config: Config, model: Any, encoder: Any) -> tuple[Callable[[], Painter] | None, str]:
    """How the model in production is loaded for the comparison, or None and why it cannot be compared (nothing where there is none)."""
    from backend.training.models.bundle import content_digest, load_bundle, tensors_of
    from backend.tryon.painter import Painter

    path = config.paths.bundle
    if not path.is_file():
        return None, ""
    try:
        found = load_bundle(path).header
    except InvalidArtifactError as error:
        return None, f"the deployed model cannot be loaded: {error}"
    own = {"resolution": config.data.resolution, "identity_model": config.identity_model, "base": base_model(config)["sha256"]}
    theirs = {**found, "base": found["base"].get("sha256")}
    other = [f"its {name} is {theirs[name]}, here {value}" for name, value in own.items() if theirs[name] != value]
    if other:
        return None, f"the deployed model belongs to another set-up: {'; '.join(other)}"
    if found["content_sha256"] == content_digest(tensors_of(model, encoder)):
        return None, "the deployed model has the same weights"
    return lambda: Painter.of_bundle(load_bundle(path), config), ""


def base_model(config: Config) -> dict[str, str]:
    """Name and hash of the base model that the bundle was trained from."""
    unet = next(p for p in weights.files(config.paths.weights, "inpainting") if p.parent.name == "unet" and p.suffix == ".safetensors")
    return {"name": weights.describe(config.paths.weights).get("inpainting", ""), "sha256": artifacts.sha256_file(unet)}


def header(
    config: Config, trained: dict[str, Any], figures: dict[str, Any], gate: dict[str, Any], environment: dict[str, Any]
) -> dict[str, Any]:
    """What the bundle says of itself, beside what its networks say (``bundle.write_bundle``)."""
    metadata = config.paths.processed / "metadata.jsonl"
    return {
        "name": "deep_hair_v1",
        "step": trained["step"],
        "resolution": config.data.resolution,
        "identity_model": config.identity_model,
        "base": base_model(config),
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


def require_equal(ours: Painter, reloaded: Painter, scene: Scene, config: Config) -> None:
    """Paints one pair, style and identity included, with the live and the reloaded networks at one seed: they must agree bit by bit."""
    import torch

    from backend.tryon.painter import PaintRequest

    ours.sampler.model.to(next(reloaded.sampler.model.parameters()).device)
    style = patches.style_picture(scene.reference.photo, scene.reference.hair)
    request = PaintRequest(scene.head, style, scene.target.identity, scene.target.prompt, seed=0)
    first, second = (painter.paint([request], steps=2, guidance=config.evaluate.guidance) for painter in (ours, reloaded))
    if not torch.equal(first, second):
        difference = float((first - second).abs().max())
        raise InvalidArtifactError(f"the reloaded bundle paints another picture than the trained model (largest difference {difference:g})")
