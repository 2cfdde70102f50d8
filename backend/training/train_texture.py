"""Stage 1: trains the hair texture encoder on patches and measures it on heads it has never seen (DESIGN 4.2)."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from backend import artifacts, console, weights
from backend.config import Config
from backend.errors import DeepHairError, InvalidArtifactError, UsageError, require_all
from backend.training import checkpoints, keyed, results
from backend.training.device_memory import bounded
from backend.training.models.texture_encoder import FORMAT, new_encoder
from backend.training.processes import Processes, join_processes
from backend.training.texture_data import SPLITS, BalancedSampler, Batch, PatchImages, PatchTable, feed, name_patches, read_patch_tables
from backend.training.texture_metrics import evaluate_encoder, headline, predict_probabilities, score_split
from backend.training.texture_painted import autoencoder_file, painted_styles
from backend.training.texture_report import write_report
from backend.training.texture_trainer import Trainer, labels_of

logger = logging.getLogger(__name__)

PREFIX = "stage1"
RESULT, BEST, METRICS, REPORT = "texture_encoder.safetensors", "stage1_best.safetensors", "stage1_metrics.json", "stage1_report.html"
VALIDATION_PATCHES = 4096  # looked at on the way; the end looks at more
LOG_EVERY = 10
RECIPE = 4  # raise when Stage 1 learns from other pictures or in another way: older results are then not taken for its own

OnProgress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Identity:
    """What a result depends on. Work is recognised as finished, or as one's own to resume, when all of it agrees."""

    config_digest: str
    data_digest: str
    start_sha256: str
    autoencoder_sha256: str  # empty where texture.painted is 0

    def header(self) -> dict[str, Any]:
        """For the header of every file that Stage 1 writes."""
        return {
            "config_digest": self.config_digest, "data_digest": self.data_digest, "start_sha256": self.start_sha256,
            "autoencoder_sha256": self.autoencoder_sha256, "recipe": RECIPE,
        }  # fmt: skip

    def made(self, header: dict[str, Any]) -> bool:
        """Whether a file with this header came from the same settings, data and start."""
        return all(header.get(key) == value for key, value in self.header().items())

    def made_file(self, path: Path) -> bool:
        """The same of a safetensors file; False where there is none or it is damaged."""
        try:
            return self.made(artifacts.read_header(path))
        except InvalidArtifactError:
            return False


def start_file(config: Config) -> Path:
    """The pretrained ResNet."""
    return weights.folder(config.paths.weights, "resnet") / "model.safetensors"


def identify(config: Config) -> Identity:
    """Raises MissingInputError where the start weights or Stage 0's output are missing."""
    painted = config.texture.painted > 0
    needed = ("resnet", "inpainting") if painted else ("resnet",)
    require_all(lambda: results.require_prepared(config), lambda: weights.require(config.paths.weights, *needed))
    metadata = config.paths.processed / "metadata.jsonl"
    data_digest = artifacts.sha256_file(metadata) if metadata.is_file() else ""
    autoencoder = artifacts.sha256_file(autoencoder_file(config)) if painted else ""
    return Identity(config.digest("texture"), data_digest, artifacts.sha256_file(start_file(config)), autoencoder)


@dataclass
class Progress:
    """What a run knows of itself beyond the weights; stored in every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    history: list[list[float]] = field(default_factory=list)  # step, loss, curl, volume, supcon, colour
    validations: list[list[float]] = field(default_factory=list)  # step, mean balanced accuracy


class Run:
    """Stage 1 from a configuration to its files; every file is written by the first process alone."""

    def __init__(self, config: Config, identity: Identity, processes: Processes, on_progress: OnProgress | None) -> None:
        self.config, self.texture, self.identity = config, config.texture, identity
        self.processes, self.on_progress = processes, on_progress
        self.folder = config.paths.checkpoints
        if self.texture.batch_size % processes.count:
            raise UsageError(f"texture.batch_size {self.texture.batch_size} cannot be shared evenly by {processes.count} processes")
        painted: dict[str, Path] = {}
        if self.texture.painted:
            with processes.first_one_first():
                painted = painted_styles(config, processes.device)
        self.tables = read_patch_tables(config.paths.processed, painted)
        self.sampler = BalancedSampler(self.tables["train"], batch_size=self.texture.batch_size, seed=self.texture.seed)
        sides = {"side": self.texture.image_size, "workers": self.texture.workers}
        self.images = {split: PatchImages(self.tables[split], **sides) for split in SPLITS if processes.rank == 0 or split == "train"}
        encoder = new_encoder(self.texture.layers, dropout=self.texture.dropout, seed=keyed.key(self.texture.seed, "texture weights"))
        encoder.load_backbone(start_file(config))
        self.trainer = Trainer(self.texture, encoder, processes)
        self.progress = Progress()
        self.waited = self.trained = 0.0  # seconds of this process: for data, and in all

    def resume(self) -> None:
        """Goes on from the newest checkpoint of the same settings, data and start, where there is one."""
        for _, path in checkpoints.steps(self.folder, PREFIX):
            try:
                saved = checkpoints.load(path)
            except InvalidArtifactError as error:
                logger.warning("DAMAGED CHECKPOINT %s is passed over, the one before it is used: %s", path.name, error)
                continue
            if self.identity.made(saved.header):
                self.trainer.restore(saved)
                self.progress = Progress(**saved.position)
                logger.info("resuming Stage 1 from step %d of %d", self.progress.step, self.texture.steps)
                return

    def forget_others(self) -> None:
        """Removes checkpoints that this run does not go on from: a later step of another run would look newer than ours."""
        for step, path in checkpoints.steps(self.folder, PREFIX):
            if step > self.progress.step or not self.identity.made_file(path):
                logger.warning("removing %s: this run does not go on from it", path.name)
                checkpoints.remove(path)
        best = self.folder / BEST
        if not self.progress.step or not self.identity.made_file(best):
            best.unlink(missing_ok=True)

    def train(self, stop: console.StopRequest) -> None:
        """Takes the steps that are left; sees to validation, checkpoints, log and early stop."""
        table, total = self.tables["train"], self.texture.steps
        bar = console.Progress("texture", total, unit="step")
        bar.start_at(self.progress.step)
        since = time.monotonic()
        rows = self.processes.rows(self.texture.batch_size)
        self.trainer.model.train()
        steps = range(self.progress.step, total if not self._exhausted() else self.progress.step)
        batches = feed(self.images["train"], self.sampler, steps, rows, workers=self.texture.workers)
        with contextlib.closing(batches), self._board() as board:
            while (batch := self._wait_for(batches)) is not None:
                losses = self._guarded_step(batch, table)
                self.progress.step = step = batch.step + 1
                if step % LOG_EVERY == 0 or step in (1, total):
                    self.progress.history.append([step, *(losses[name] for name in ("loss", "curl", "volume", "supcon", "colour"))])
                    board(step, losses)
                    if self.on_progress is not None:
                        self.on_progress(step, total, losses)
                bar.update(note=f"loss {losses['loss']:.3f}")
                stopping = self.processes.any_of(stop.requested)
                due = step % self.texture.save_every == 0 or step == total
                if due:
                    self._validate()
                if due or stopping:
                    lap, since = time.monotonic() - since, time.monotonic()
                    self.progress.seconds += lap
                    self.trained += lap
                    self._save()
                if stopping:
                    raise KeyboardInterrupt
                if due and self._exhausted():
                    logger.info("stopping early at step %d: nothing better in %d validations", step, self.texture.patience)
                    break

    def _wait_for(self, batches: Iterator[Batch]) -> Batch | None:
        start = time.monotonic()
        batch = next(batches, None)
        self.waited += time.monotonic() - start
        return batch

    def _guarded_step(self, batch: Batch, table: PatchTable) -> dict[str, float]:
        try:
            return self.trainer.step(batch, labels_of(table, batch.patches))
        except FloatingPointError as error:
            raise DeepHairError(
                f"Stage 1 became non-finite before the update of step {batch.step}: {error}; its patches: {name_patches(table, batch.patches)}",
                hint="the weights are untouched and the last checkpoint is good; look at these patches, or lower texture.lr",
            ) from error

    def _validate(self) -> None:
        """Looks at the validation split, and keeps the weights where they are the best so far (of equals, the latest)."""
        value = -1.0
        table = self.tables["val"]
        if self.processes.rank == 0 and len(table):
            numbers = table.whole_photos(VALIDATION_PATCHES)
            self.trainer.judged.eval()
            scores = score_split(
                predict_probabilities(self.trainer.judged, self.images["val"], numbers), table, numbers, seed=self.texture.seed
            )
            self.trainer.encoder.train()
            found = headline(scores)
            value = -1.0 if found is None else found
        value = self._from_first(value)
        best = max((score for _, score in self.progress.validations), default=-1.0)
        self.progress.validations.append([self.progress.step, value])
        logger.info(
            "step %d: mean balanced accuracy on validation heads %s", self.progress.step, f"{value:.3f}" if value >= 0 else "unknown"
        )
        if self.texture.patience and value >= max(best, 0.0) and self.processes.rank == 0:
            header = {"step": self.progress.step, "score": value, **self.identity.header()}
            artifacts.save_tensors(self.folder / BEST, self.trainer.judged.state_dict(), header)

    def _exhausted(self) -> bool:
        """Whether the last ``patience`` validations brought nothing better."""
        scores = [score for _, score in self.progress.validations]
        if not self.texture.patience or not scores or max(scores) < 0:
            return False
        last_best = len(scores) - 1 - scores[::-1].index(max(scores))
        return len(scores) - 1 - last_best >= self.texture.patience

    def _save(self) -> None:
        if self.processes.rank == 0:
            name = f"{PREFIX}_step_{self.progress.step}"
            header = {"format": FORMAT, "layers": list(self.texture.layers), "step": self.progress.step, **self.identity.header()}
            checkpoints.save(self.folder, name, position=vars(self.progress), header=header, **self.trainer.state())
            checkpoints.prune(self.folder, PREFIX, self.texture.keep)

    def _from_first(self, value: float) -> float:
        if self.processes.count == 1:
            return value
        shared = torch.tensor([value], device=self.processes.device, dtype=torch.float32)
        torch.distributed.broadcast(shared, src=0)
        return float(shared.item())

    @contextlib.contextmanager
    def _board(self) -> Iterator[Callable[[int, dict[str, float]], None]]:
        """A TensorBoard writer of the first process; points after the resumed step are struck out."""
        if self.processes.rank != 0:
            yield lambda step, values: None
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder / "tensorboard" / PREFIX), purge_step=self.progress.step + 1) as writer:

            def write(step: int, values: dict[str, float]) -> None:
                for name, value in values.items():
                    writer.add_scalar(f"texture/{name}", value, step)

            yield write

    def finish(self, total_seconds: float) -> dict[str, Any]:
        """Measures the weights that count and writes metrics, page and encoder, in this order: the encoder says that all is there."""
        encoder, chosen = self.trainer.judged, self.progress.step
        best = self.folder / BEST
        if self.identity.made_file(best):
            encoder.load_state_dict(artifacts.load_tensors(best))
            chosen = int(artifacts.read_header(best)["step"])
        encoder.eval()
        scores, evidence = evaluate_encoder(encoder, self.tables, self.images, seed=self.texture.seed)
        header = {"format": FORMAT, "layers": list(self.texture.layers), "config": self.config.resolved()["texture"], "steps": self.progress.step,
                  "chosen_step": chosen, "metrics": scores, **self.identity.header()}  # fmt: skip
        metrics = {**header, "seconds": total_seconds, "data_wait_share": self.waited / max(self.trained, 1e-9), "history": self.progress.history,
                   "validations": self.progress.validations, "device": str(self.processes.device), "bf16": self.trainer.bf16}  # fmt: skip
        write_report(self.folder / REPORT, metrics, self.tables, self.images, evidence)
        artifacts.write_json(self.folder / METRICS, metrics)
        artifacts.save_tensors(self.folder / RESULT, encoder.state_dict(), header)
        best.unlink(missing_ok=True)
        return summary(metrics, skipped=False)


def summary(metrics: dict[str, Any], *, skipped: bool) -> dict[str, Any]:
    """What the stage returns and the final report quotes; the accuracies are those of validation heads, by photo."""
    shown: dict[str, Any] = {
        "seconds": metrics["seconds"],
        "steps": metrics["steps"],
        "chosen_step": metrics["chosen_step"],
        "skipped": skipped,
    }
    for split in ("val", "test"):
        for name in ("curl", "volume"):
            scores = metrics["metrics"].get(split, {}).get(name, {}).get("photo", {})
            prefix = f"{name}_balanced_accuracy" if split == "val" else f"test_{name}_balanced_accuracy"
            shown[prefix], shown[f"{prefix}_ci"] = scores.get("balanced_accuracy"), scores.get("balanced_accuracy_ci")
    return {**shown, "data_wait_share": metrics["data_wait_share"]}


def finished(config: Config, identity: Identity) -> dict[str, Any] | None:
    """The summary of an earlier run that gave exactly what this one would, or None. Touches nothing."""
    folder = config.paths.checkpoints
    if not identity.made_file(folder / RESULT) or not (folder / METRICS).is_file():
        return None
    metrics = artifacts.read_json(folder / METRICS)
    return summary(metrics, skipped=True) if identity.made(metrics) else None


def train_texture(config: Config, *, resume: bool = True, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Stage 1. Returns ``summary``'s dict; finished work is recognised and left alone, a killed run goes on where it was.

    on_progress: called with (step, steps, losses) every few steps. resume=False starts from the pretrained weights whatever is there.
    Raises MissingInputError, InvalidArtifactError and UsageError for what is wrong with the input, KeyboardInterrupt when told to stop.
    """
    identity = identify(config)
    if resume and (done := finished(config, identity)) is not None:
        logger.info("Stage 1 is finished already: %s", config.paths.checkpoints / RESULT)
        return done
    processes = join_processes(config.device)
    lock = artifacts.folder_lock(config.paths.checkpoints) if processes.rank == 0 else contextlib.nullcontext()
    less = max(processes.count, config.texture.batch_size // 2)
    memory = bounded(
        processes.device, config.train.memory_fraction, what=f"{config.texture.batch_size} patches", hint=f"try texture.batch_size={less}"
    )
    with lock, memory, console.timed("Stage 1, texture encoder") as clock, console.stop_requests() as stop:
        run = Run(config, identity, processes, on_progress)
        if resume:
            run.resume()
        if processes.rank == 0:
            artifacts.remove_stale_temporaries(config.paths.checkpoints)
            run.forget_others()
        earlier = run.progress.seconds
        run.train(stop)
        if processes.count > 1:
            torch.distributed.barrier()
        return run.finish(earlier + clock()) if processes.rank == 0 else {"steps": run.progress.step}


def plan(config: Config) -> dict[str, Any]:
    """What a run would do, without doing it: patches, photos and heads of each split, settings, and whether it is finished already."""
    identity = identify(config)
    tables = read_patch_tables(config.paths.processed)
    splits = {split: {"patches": len(t), "photos": len(t.photo_ids), "heads": len(t.group_names)} for split, t in tables.items()}
    return {"plan": {"splits": splits, "finished": finished(config, identity) is not None, **config.resolved()["texture"]}}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of Stage 1."""
    return console.guarded(
        lambda: verb(console.parse_stage_arguments(argv, "texture_encoder.py", "Stage 1: train the hair texture encoder"))
    )


def verb(arguments: console.StageArguments) -> int:
    """``deephair texture``."""
    if arguments.dry_run:
        console.print_result(plan(arguments.config))
        return console.DONE
    result = train_texture(arguments.config, resume=arguments.resume)
    if arguments.json:
        console.print_result(result)
    else:
        shown = {
            name: f"{value:.3f}" if value is not None else "unknown" for name, value in result.items() if name.endswith("balanced_accuracy")
        }
        logger.info("on heads never seen: %s", ", ".join(f"{name} {value}" for name, value in shown.items()))
    return console.DONE
