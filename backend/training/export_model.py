"""Stage 3: measures the newest checkpoint, decides, and deploys it as one bundle (DESIGN 4.4, 4.5).

Run: python backend/training/export_model.py [--config FILE] [--force REASON] [key=value ...]   (the same as: deephair export)
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:  # run as a file: the checkout must be importable, this folder must not shadow libraries
    import importlib
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])
    raise SystemExit(importlib.import_module("backend.training.export_model").main())

import argparse
import contextlib
import hashlib
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import artifacts, console, weights
from backend.config import Config
from backend.errors import DeepHairError, InvalidArtifactError, MissingInputError, UsageError, require_all
from backend.training import candidate, checkpoints, results
from backend.training.stage2_files import PREFIX, require_texture_encoder, texture_encoder_path

if TYPE_CHECKING:
    from backend.training.evaluate import Evaluation
    from backend.training.painting import PaintedStore

logger = logging.getLogger(__name__)


class GateClosedError(DeepHairError):
    """The model was measured and not deployed."""

    code = "gate_closed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What export takes beside the shared arguments."""
    parser.add_argument("--force", metavar="REASON", default="", help="deploy even if the gate fails; the reason is recorded in the bundle")
    parser.add_argument("--rollback", action="store_true", help="bring the previously deployed model back; a second time undoes it")
    parser.add_argument("--diffusers", metavar="FOLDER", default="", help="write the deployed UNet as a diffusers folder")
    parser.add_argument("--single-file", metavar="FILE", default="", help="write the deployed UNet as one file with the original SDXL keys")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of Stage 3."""

    def run() -> int:
        parser = console.stage_parser("export_model.py", "Stage 3: evaluates the newest checkpoint and deploys it if it passes")
        add_arguments(parser)
        return verb(console.stage_arguments(parser.parse_intermixed_args(argv)))

    return console.guarded(run)


def verb(arguments: console.StageArguments) -> int:
    """``deephair export``: exit code 0 when the model was deployed, 1 when the gate refused it.

    With ``--rollback``, ``--diffusers`` or ``--single-file`` nothing is measured: they work on what is deployed.
    """
    config = with_force(arguments.config, getattr(arguments.rest, "force", ""))
    elsewhere = _elsewhere(arguments)
    if elsewhere:
        console.print_result(elsewhere)
        return console.DONE
    if arguments.dry_run:
        console.print_result(
            {"checkpoint": newest_checkpoint(config).name, "target": str(config.paths.bundle), "gate": config.gate.profile}
        )
        return console.DONE
    summary = export(config, resume=arguments.resume)
    if arguments.json:
        console.print_result(summary)
    return console.DONE


def _elsewhere(arguments: console.StageArguments) -> dict[str, Any]:
    """What ``export`` does with the deployed model besides replacing it; empty when nothing of that was asked for."""
    config, rest = arguments.config, arguments.rest
    asked = {name: getattr(rest, name, "") for name in ("rollback", "diffusers", "single_file")}
    if not any(asked.values()):
        return {}
    if arguments.dry_run:
        return {"would": {name: value for name, value in asked.items() if value}, "deployed": str(config.paths.bundle)}
    from backend.training import deploy, unet_export  # late, like all that needs torch
    from backend.training.models.bundle import load_bundle

    done: dict[str, Any] = deploy.rollback(config) if asked["rollback"] else {}
    if asked["diffusers"] or asked["single_file"]:
        bundle = load_bundle(config.paths.bundle, config.paths.weights)
        if asked["diffusers"]:
            done["diffusers"] = str(unet_export.write_diffusers(bundle, Path(asked["diffusers"])))
        if asked["single_file"]:
            path = Path(asked["single_file"])
            done["single_file"] = {"path": str(path), "sha256": unet_export.write_single_file(bundle, path)}
    return done


def evaluate_verb(arguments: console.StageArguments) -> int:
    """``deephair evaluate``: measures the newest checkpoint, or the deployed bundle where there is no checkpoint; deploys nothing.

    Writes ``evaluation.json``, ``pairs.json`` and ``samples.json`` into ``{paths.report}/evaluate/``.
    """
    from backend.training.evaluate import Evaluator
    from backend.training.gate import decide

    config = arguments.config
    results.require_prepared(config)
    painter, name, digest = _painter_to_measure(config)
    if arguments.dry_run:
        console.print_result({"model": name, "split": config.evaluate.split, "samples": config.evaluate.samples})
        return console.DONE
    with artifacts.folder_lock(config.paths.report), _memory(config):
        evaluation = Evaluator(config, painter, _stores(config, digest)).run()
    found = {"model": name, "evaluation": evaluation.figures, "gate": decide(evaluation.figures, config.gate)}
    folder = config.paths.report / "evaluate"
    _write_pairs(folder, evaluation, config)
    artifacts.write_json(folder / "evaluation.json", found)
    _forget_painted(config)
    console.print_result(found)
    return console.DONE


def _memory(config: Config) -> contextlib.AbstractContextManager[None]:
    """The bound on a card's memory while Stage 3 paints."""
    from backend.training.device_memory import bounded
    from backend.tryon.painter import device_and_dtype

    return bounded(
        device_and_dtype(config)[0], config.train.memory_fraction, what=f"measuring {config.evaluate.batch_size} pairs at a time",
        hint="try evaluate.batch_size=1, then sample.offload=true; with other settings everything is painted anew",
    )  # fmt: skip


def _stores(config: Config, model: str) -> dict[str, PaintedStore]:
    """Where the pictures of this model, with these settings and this code, are kept until the report is written; others' are removed.

    model: the digest of what paints.
    """
    from backend.training.painting import PaintedStore
    from backend.tryon.painter import device_and_dtype

    folder = _painted_folder(config)
    shared = [
        config.digest("evaluate", "sample", "data"), artifacts.sha256_file(config.paths.processed / "metadata.jsonl"),
        sorted(weights.describe(config.paths.weights).items()), results.environment(config)["git_commit"], str(device_and_dtype(config)),
    ]  # fmt: skip
    deployed = artifacts.sha256_file(config.paths.bundle) if config.paths.bundle.is_file() else ""
    names = {who: artifacts.sha256_json([*shared, digest])[:32] for who, digest in (("ours", model), ("deployed", deployed))}
    for other in folder.glob("*"):
        if other.name not in names.values():
            PaintedStore(other).clear()
    return {who: PaintedStore(folder / name) for who, name in names.items()}


def _painted_folder(config: Config) -> Path:
    return config.paths.report / "painted"


def _forget_painted(config: Config) -> None:
    """Once the figures are written the pictures have served."""
    shutil.rmtree(_painted_folder(config), ignore_errors=True)


def _write_pairs(folder: Path, evaluation: Evaluation, config: Config) -> None:
    from backend.training.figures import as_json

    artifacts.write_json(folder / "pairs.json", evaluation.pairs)
    artifacts.write_json(folder / "samples.json", {kind: as_json(records, config.evaluate) for kind, records in evaluation.records.items()})


def _painter_to_measure(config: Config) -> tuple[Any, str, str]:
    """The painter of what ``evaluate`` measures, its file's name and the digest of its weights."""
    from backend.training.models.bundle import load_bundle
    from backend.training.models.texture_encoder import load_texture_encoder
    from backend.tryon.painter import Painter

    checkpoint = checkpoints.newest(config.paths.checkpoints, PREFIX)
    if checkpoint is not None:
        _check_inputs(config)
        if wrong := candidate.other_set(config, checkpoint):
            logger.warning("%s", wrong)
        painter = Painter(candidate.rebuilt(checkpoint), load_texture_encoder(texture_encoder_path(config)), config)
        return painter, checkpoint.weights_path.name, _model_digest(config)
    if config.paths.bundle.is_file():
        bundle = load_bundle(config.paths.bundle, config.paths.weights)
        return Painter.of_bundle(bundle, config), config.paths.bundle.name, bundle.sha256
    raise MissingInputError(
        f"neither a checkpoint in {config.paths.checkpoints} nor a deployed model at {config.paths.bundle}",
        hint="run 'deephair train' first",
    )


def with_force(config: Config, reason: str) -> Config:
    """The configuration with ``--force REASON`` taken in. Raises UsageError for a reason that says nothing."""
    if reason and not reason.strip():
        raise UsageError("--force needs a reason: it stands in the bundle, the report and the model card", hint='--force "why"')
    return config.model_copy(update={"gate": config.gate.model_copy(update={"force": reason})}) if reason else config


def newest_checkpoint(config: Config) -> Path:
    """The newest Stage 2 checkpoint by the step in its record. Raises MissingInputError when there is none."""
    found = checkpoints.steps(config.paths.checkpoints, PREFIX)
    if not found:
        raise MissingInputError(f"no Stage 2 checkpoint in {config.paths.checkpoints}", hint="run Stage 2 first: deephair train")
    return found[0][1]


def export(config: Config, *, resume: bool = True) -> dict[str, Any]:
    """Evaluates, decides, deploys and reports; returns the summary.

    Raises GateClosedError with every reason when the gate refuses and no force was given; the report is written all the same and what
    is deployed stays as it is.
    """
    _check_inputs(config)
    digest = _run_digest(config)
    summary = _finished(config, digest) if resume else None
    if summary is None:
        with artifacts.folder_lock(config.paths.models), artifacts.folder_lock(config.paths.report):
            artifacts.remove_stale_temporaries(config.paths.models)
            with _memory(config):
                summary = _export(config, digest)
    else:
        logger.info("Stage 3 is complete for this checkpoint; nothing to do")
    gate = summary["gate"]
    logger.info("report: %s", config.paths.report / "index.html")
    if not gate["passed"] and not gate["forced"]:
        raise GateClosedError(
            f"the gate '{gate['profile']}' refused the model:\n  " + "\n  ".join(gate[gate["profile"]]["reasons"]),
            hint=f"see {config.paths.report / 'index.html'}; what was deployed before stays; --force REASON deploys it all the same",
        )
    if gate["forced"]:
        logger.warning("DEPLOYED BY FORCE, the gate '%s' refused this model: %s", gate["profile"], gate["force_reason"])
    return summary


def _check_inputs(config: Config) -> None:
    require_all(
        lambda: results.require_prepared(config),
        lambda: require_texture_encoder(config),
        lambda: _require_checkpoint(config),
        lambda: weights.require(config.paths.weights, "inpainting", "perceptual"),
    )


def _require_checkpoint(config: Config) -> None:
    newest_checkpoint(config)


def _run_digest(config: Config) -> str:
    """What the summary depends on: the checkpoint, the encoder, the data, the other weights and the settings of this stage."""
    parts = (
        _model_digest(config),
        artifacts.sha256_file(config.paths.processed / "metadata.jsonl"),
        config.digest("evaluate", "gate", "sample", "data"),
        str(sorted(weights.describe(config.paths.weights).items())),
    )
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _model_digest(config: Config) -> str:
    """Of the newest checkpoint and the Stage 1 encoder beside it."""
    return f"{checkpoints.weights_sha256(newest_checkpoint(config))}/{artifacts.sha256_file(texture_encoder_path(config))}"


def _finished(config: Config, digest: str) -> dict[str, Any] | None:
    try:
        summary: dict[str, Any] = artifacts.read_json(config.paths.report / "summary.json")
    except InvalidArtifactError:
        return None
    if summary.get("run") != digest or not (config.paths.report / "index.html").is_file():
        return None
    deployed = summary.get("deployed")
    if deployed and not (config.paths.bundle.is_file() and artifacts.sha256_file(config.paths.bundle) == deployed["sha256"]):
        return None
    return summary


def _export(config: Config, digest: str) -> dict[str, Any]:
    from backend.training.deploy import deploy  # late, like all that needs torch
    from backend.training.evaluate import Evaluator
    from backend.training.gate import decide
    from backend.training.models.bundle import check_networks, load_bundle, write_bundle
    from backend.training.models.texture_encoder import load_texture_encoder
    from backend.tryon.painter import Painter

    start = time.monotonic()
    checkpoint = checkpoints.newest(config.paths.checkpoints, PREFIX)
    if checkpoint is None:
        raise InvalidArtifactError(f"no checkpoint in {config.paths.checkpoints} is whole", hint="train again; see the warnings above")
    if wrong := candidate.other_set(config, checkpoint):
        raise InvalidArtifactError(
            wrong, hint="train on this set (in a new folder: paths.checkpoints=FOLDER), or put back the one that it was trained on"
        )
    logger.info("evaluating %s", checkpoint.weights_path.name)
    try:
        model, encoder = candidate.rebuilt(checkpoint), load_texture_encoder(texture_encoder_path(config))
        check_networks(model, encoder)
    except InvalidArtifactError as error:
        raise GateClosedError(
            f"the gate refused the model before it was measured: {error}", hint="what was deployed before stays; train again"
        ) from error
    contents = candidate.contents(config, checkpoint, model, encoder)  # as trained; the painter computes in the device's precision
    painter = Painter(model, encoder, config)
    deployed_before, why_not = candidate.deployed_model(config, contents.networks["content_sha256"])
    evaluation = Evaluator(config, painter, _stores(config, _model_digest(config))).run(deployed_before)
    if why_not:
        evaluation.figures["deployed_not_compared"] = why_not
    gate = decide(evaluation.figures, config.gate)
    stages = {"prepare": results.read(config, "prepare"), "texture": _texture_result(config), "train": results.read(config, "train")}
    environment = results.environment(config)
    header = candidate.header(config, checkpoint.header, evaluation.figures, gate, environment)
    file = config.paths.models / f".candidate.safetensors{artifacts.TMP_SUFFIX}"
    scene = evaluation.transfer.first[0].scene
    wanted = candidate.painted(painter, scene, config)
    painter.sampler.model.cpu()  # a card with 12 GB holds one such network at a time
    try:
        write_bundle(file, contents, header)
        reloaded = Painter.of_bundle(load_bundle(file, config.paths.weights), config)
        candidate.require_equal(wanted, candidate.painted(reloaded, scene, config))
        deployed = None
        if gate["passed"] or gate["forced"]:
            deploy(file, config.paths.bundle)
            deployed = {"path": results.shown_path(config.paths.bundle), "sha256": artifacts.sha256_file(config.paths.bundle)}
    finally:
        file.unlink(missing_ok=True)
    stages["export"] = {"seconds": round(time.monotonic() - start, 3)}
    summary = {
        "run": digest, "stages": stages, "evaluation": evaluation.figures, "gate": gate, "deployed": deployed, "environment": environment,
        "checkpoint": checkpoint.weights_path.name, "config": config.name,
    }  # fmt: skip
    _write_report(config, summary, evaluation)
    return summary


def _write_report(config: Config, summary: dict[str, Any], evaluation: Evaluation) -> None:
    from backend.training import export_report  # late: torch

    artifacts.write_json(config.paths.report / "config.json", config.resolved())
    _write_pairs(config.paths.report, evaluation, config)
    export_report.write(config, summary, evaluation)
    artifacts.write_json(config.paths.report / "summary.json", summary)  # last: it says that the rest is there
    _forget_painted(config)


def _texture_result(config: Config) -> dict[str, Any]:
    """What Stage 1 measured of itself; its metrics file is its own record."""
    from backend.training.train_texture import METRICS, summary

    keys = ("seconds", "curl_balanced_accuracy", "volume_balanced_accuracy")
    path = config.paths.checkpoints / METRICS
    found = summary(artifacts.read_json(path), skipped=True) if path.is_file() else {}
    return {key: found.get(key) for key in keys}
