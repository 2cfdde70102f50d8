"""Putting a checked bundle into production, and back (DESIGN 4.4): at every moment the deployed file is whole, the old one or the new."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backend import artifacts
from backend.config import Config
from backend.errors import MissingInputError
from backend.training import html, results
from backend.training.model_card import model_card


def previous_path(target: Path) -> Path:
    """Where the bundle lies that was deployed before."""
    return target.with_name(f"{target.stem}.previous.safetensors")


def deploy(candidate: Path, target: Path) -> None:
    """Puts a checked bundle in place of the deployed one, which is kept as ``*.previous.safetensors``. The candidate is gone afterwards."""
    with _card_of(candidate, target):
        if target.is_file():
            with artifacts.replacing(previous_path(target)) as spare:
                artifacts.second_name(target, spare)
        candidate.replace(target)
        artifacts.sync_folder(target.parent)


@contextlib.contextmanager
def _card_of(bundle: Path, target: Path) -> Iterator[None]:
    """Puts the model card of ``bundle`` beside ``target`` once the block has put the bundle there.

    The card is written before the block runs, so that a disk too full for it leaves the old bundle with the old card.
    """
    card = model_card(artifacts.read_header(bundle))
    with artifacts.replacing(target.with_suffix(".md")) as fresh:
        fresh.write_text(card, encoding="utf-8")
        yield


def rollback(config: Config) -> dict[str, Any]:
    """Brings the previous bundle back into production and keeps the one that was there, so that a second rollback undoes the first.

    The previous bundle is checked before anything is touched. Raises MissingInputError when there is none, InvalidArtifactError when it
    is broken or over another base.
    """
    from backend.training.models.bundle import load_bundle  # late: torch

    target = config.paths.bundle
    previous = previous_path(target)
    if not previous.is_file():
        raise MissingInputError(f"there is no previous model at {previous}", hint="one is kept from the second deployment on")
    with artifacts.folder_lock(config.paths.models):
        artifacts.remove_stale_temporaries(config.paths.models)
        digest = load_bundle(previous, config.paths.weights).sha256
        with _card_of(previous, target), artifacts.replacing(previous) as withdrawn:
            if target.is_file():
                artifacts.second_name(target, withdrawn)
                previous.replace(target)
            else:
                artifacts.second_name(previous, withdrawn)
                with artifacts.replacing(target) as restored:
                    artifacts.second_name(previous, restored)
    deployed = {"path": results.shown_path(target), "sha256": digest, "rolled_back": True}
    summary = config.paths.report / "summary.json"
    if summary.is_file():  # so that a later run does not take the withdrawn model for the deployed one
        artifacts.write_json(summary, {**artifacts.read_json(summary), "deployed": deployed})
    report = config.paths.report / "index.html"
    if report.is_file():
        notice = f"The deployed model was changed by --rollback after this report was written. In production: sha256 {digest}."
        artifacts.write_text(report, html.with_notice(report.read_text(encoding="utf-8"), notice))
    return {"deployed": deployed}
