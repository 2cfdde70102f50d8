"""Checkpoints that a run resumes from exactly, for Stage 1 and Stage 2 (DESIGN 4.2, 4.3).

A checkpoint is two things side by side: ``NAME.safetensors`` (the weights, usable by themselves) and ``NAME.state/`` (what only a
resume needs: optimizer tensors in safetensors, position and hashes in JSON). The folder is renamed into place last and carries the
weights' sha256, so a checkpoint is either whole or ignored: a kill at any moment leaves the previous one in charge.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend import artifacts
from backend.errors import InvalidArtifactError
from backend.training.sharding import part_of

logger = logging.getLogger(__name__)

_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint read back. ``position`` is what the run stored of itself (step, losses, ...)."""

    weights_path: Path
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    position: dict[str, Any]
    header: dict[str, Any]


def save(
    folder: Path,
    name: str,
    *,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    position: Mapping[str, Any],
    header: Mapping[str, Any],
) -> Path:
    """Writes ``name.safetensors`` and then ``name.state/``; only the second makes it a checkpoint. Returns the weights' path."""
    path = folder / f"{name}.safetensors"
    digest = artifacts.save_tensors(path, weights, header)
    state = folder / f"{name}.state"
    temporary = folder / f".{name}.state{artifacts.TMP_SUFFIX}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    optimizer_digest = artifacts.save_tensors(temporary / _OPTIMIZER, optimizer, {"format": "deephair-state-1"})
    artifacts.write_json(
        temporary / _STATE, {"format": 1, "weights_sha256": digest, "optimizer_sha256": optimizer_digest, "position": dict(position)}
    )
    if state.exists():
        _discard(state)
    temporary.rename(state)
    artifacts.sync_folder(folder)
    return path


def load(weights_path: Path) -> Checkpoint:
    """Reads one checkpoint and checks both hashes. Raises InvalidArtifactError when any part of it is missing or damaged."""
    state = weights_path.with_suffix(".state")
    meta = artifacts.read_json(state / _STATE)
    if not isinstance(meta, dict) or meta.get("format") != 1:
        raise InvalidArtifactError(f"{state / _STATE} is of an unknown format")
    for path, key in ((weights_path, "weights_sha256"), (state / _OPTIMIZER, "optimizer_sha256")):
        if not path.is_file() or artifacts.sha256_file(path) != meta.get(key):
            raise InvalidArtifactError(f"{path} is missing or does not match the hash that its checkpoint recorded")
    return Checkpoint(
        weights_path=weights_path,
        weights=artifacts.load_tensors(weights_path),
        optimizer=artifacts.load_tensors(state / _OPTIMIZER),
        position=dict(meta["position"]),
        header=artifacts.read_header(weights_path),
    )


def steps(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """All checkpoints ``{prefix}_step_{N}`` and ``{prefix}_epoch_{E}`` that have a state folder, as (step, path), newest first."""
    found = []
    for path in _kind(folder, prefix, "step") + _kind(folder, prefix, "epoch"):
        try:
            found.append((int(artifacts.read_json(path.with_suffix(".state") / _STATE)["position"]["step"]), path))
        except (InvalidArtifactError, KeyError, TypeError, ValueError) as error:
            logger.warning("DAMAGED CHECKPOINT %s is passed over: %s", path.name, error)
    return sorted(found, key=lambda item: (item[0], item[1].name), reverse=True)


def _kind(folder: Path, prefix: str, kind: str) -> list[Path]:
    """The checkpoints of one kind, highest number first."""
    pattern = re.compile(rf"{re.escape(prefix)}_{kind}_(\d+)\.safetensors")
    found = [(int(match[1]), path) for path in folder.glob(f"{prefix}_{kind}_*.safetensors") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.with_suffix(".state").is_dir()]


def weights_sha256(path: Path) -> str:
    """The hash of a checkpoint's weights as it was recorded, without reading them."""
    return str(artifacts.read_json(path.with_suffix(".state") / _STATE)["weights_sha256"])


def newest(folder: Path, prefix: str) -> Checkpoint | None:
    """The newest whole checkpoint, or None. A damaged newer one is passed over with a loud warning."""
    for _, path in steps(folder, prefix):
        try:
            return load(path)
        except InvalidArtifactError as error:
            logger.warning("DAMAGED CHECKPOINT %s is passed over, the one before it is used: %s", path.name, error)
    return None


def prune(folder: Path, prefix: str, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints of each kind. Call after a save has been committed; the newest always stays."""
    for kind in ("step", "epoch"):
        for path in _kind(folder, prefix, kind)[max(keep, 1) :]:
            remove(path)


def remove(weights_path: Path) -> None:
    """Removes one checkpoint: first its state, so that a kill in between leaves plain weights and never half a checkpoint."""
    _discard(weights_path.with_suffix(".state"))
    weights_path.unlink(missing_ok=True)


def link(path: Path, name: str) -> Path:
    """Gives a committed checkpoint a second name, without copying it where the file system has hard links. What that name held before is
    replaced. Returns the new path."""
    target = path.with_name(f"{name}.safetensors")
    state, temporary = target.with_suffix(".state"), path.with_name(f".{name}.state{artifacts.TMP_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for file in (_OPTIMIZER, _STATE):
        artifacts.second_name(path.with_suffix(".state") / file, temporary / file)
    if state.exists():
        _discard(state)
    with artifacts.replacing(target) as fresh:
        artifacts.second_name(path, fresh)
    temporary.rename(state)
    artifacts.sync_folder(path.parent)
    return target


def _discard(state: Path) -> None:
    """Takes a state folder out of sight in one step before deleting it, so that a kill leaves no half folder under its name."""
    trash = state.with_name(f".{state.name}.trash{artifacts.TMP_SUFFIX}")
    shutil.rmtree(trash, ignore_errors=True)
    state.rename(trash)
    shutil.rmtree(trash)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """An optimizer's state as flat tensors ``{parameter name}|{key}``; ``names`` maps every parameter to its name."""
    flat: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            flat[f"{names[parameter]}|{key}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what ``optimizer_tensors`` took, on each parameter's device. Raises InvalidArtifactError for an unknown parameter."""
    parameters = {name: parameter for parameter, name in names.items()}
    counters_beside = {p for group in optimizer.param_groups if group.get("fused") or group.get("capturable") for p in group["params"]}
    for key, value in tensors.items():
        name, _, field = key.rpartition("|")
        if name not in parameters:
            raise InvalidArtifactError(f"the checkpoint holds optimizer state of '{name}', which this model does not train")
        parameter = parameters[name]
        # torch keeps step counters on the CPU unless the optimizer is fused or capturable; everything else lies beside its parameter.
        beside = value.ndim > 0 or parameter in counters_beside
        restored = value.to(parameter.device if beside else "cpu", copy=True)
        if restored.shape == parameter.shape:  # laid out in memory as its parameter, which fused kernels take for granted
            restored = torch.empty_like(parameter, dtype=value.dtype).copy_(part_of(restored, parameter))
        optimizer.state[parameter][field] = restored
