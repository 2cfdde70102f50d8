"""Measures a model on held-out heads with the code that serves it (DESIGN 4.5): protocols, baselines, ceilings, slices.

Reconstruction: another view of the same hair is the reference and the label gives the text, so the target's own photo is the truth.
Transfer: the reference is of another head and the prompt says nothing of hair, so only the reference photo speaks. Preservation: what
the transfer results leave as it was. Pairs are read, painted, measured and dropped batch by batch, so memory does not grow with them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backend import artifacts, console
from backend.config import Config
from backend.training import baselines, figures, metrics, pairs
from backend.training.data_processing.prompts import NEUTRAL_PROMPT
from backend.training.figures import Record
from backend.training.measuring import Instruments
from backend.training.painting import PaintedStore, Scene, ScenePainter, SceneReader, ThreadedMap, View
from backend.training.prepared import Prepared
from backend.tryon.painter import Painter, device_and_dtype
from backend.tryon.segmentation import HairParser

logger = logging.getLogger(__name__)

PROTOCOL = "reconstruction: other view of the same hair as reference, text from the label; transfer: another head's hair, neutral text"
BASELINES = ("no_op", "bald", "crop_paste", "colour_transfer", "shuffled_reference", "no_conditioning")
HOLD_THE_TRUTH = ("no_op", "colour_transfer")  # in reconstruction they start from the very photo that is to be made
WORST = 4  # pairs shown as worst cases, and as failed ones, per protocol


@dataclass(frozen=True)
class Result:
    """One painted pair, kept for the report's pictures, with its record."""

    scene: Scene
    view: View
    record: Record


@dataclass
class Kept:
    """The first results of a protocol, its worst ones and some that failed; the other pictures are dropped once they are measured."""

    figure: str
    count: int
    first: list[Result] = field(default_factory=list)
    worst: list[Result] = field(default_factory=list)
    failed: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Takes a result in, if it is one of the first or worst, or failed."""
        if result.record.values["ours"].get("failure_rate") == 1.0 and len(self.failed) < WORST:
            self.failed.append(result)
        if len(self.first) < self.count:
            self.first.append(result)
        if self.figure in result.record.values["ours"]:
            sign = figures.BY_NAME[self.figure].better
            self.worst = sorted([*self.worst, result], key=lambda r: sign * r.record.values["ours"][self.figure])[:WORST]


@dataclass(frozen=True)
class Evaluation:
    """figures: the ``evaluation`` object of summary.json. records: every pair's figures by protocol. pairs: as they are stored."""

    figures: dict[str, Any]
    records: dict[str, list[Record]]
    pairs: dict[str, Any]
    transfer: Kept
    reconstruction: Kept


class Evaluator:
    """Paints pairs with one painter and measures them, beside the baselines and, where it is given, the deployed model.

    stores: where the pictures of "ours" and of the "deployed" model outlive a stopped run; nowhere where there is none.
    """

    def __init__(self, config: Config, painter: Painter, stores: Mapping[str, PaintedStore] | None = None) -> None:
        self.config = config
        settings = config.evaluate
        self._each = ThreadedMap(settings.workers)
        prepared = Prepared(config.paths.processed)
        rows = prepared.rows(settings.split)
        self.pairs = pairs.read(settings.pairs, rows, settings.protocol) if settings.pairs else pairs.draw(rows, settings)
        self._stored = pairs.stored(self.pairs, settings, prepared.digest)
        self._parser = HairParser(config.paths.weights, device=device_and_dtype(config)[0])
        self._reader = SceneReader(config, prepared, self._each)
        self._stores = stores or {}
        self._ours = ScenePainter(config, painter, self._parser, self._reader, self._stores.get("ours"))
        self._instruments = Instruments(config, prepared, painter.texture_encoder, self._each)
        self._changes: list[tuple[float, str]] = []
        self._outside = 0

    def run(self, deployed: Callable[[], Painter] | None = None) -> Evaluation:
        """All protocols with all baselines. deployed: loads the model that is in production now; it is measured on the same pairs."""
        settings = self.config.evaluate
        same = Kept("lpips", settings.pictures)
        transfer = Kept("hair_color_delta_e", settings.pictures)
        count = 2 * len(self.pairs.transfer) + 3 * len(self.pairs.reconstruction)
        progress = console.Progress("evaluation", count * (1 if deployed is None else 2), unit="picture")
        records = {
            "transfer": [self._kept(result, transfer) for result in self._transfer(progress)],
            "reconstruction": [self._kept(result, same) for result in self._reconstruction(progress)],
        }
        if deployed is not None:
            self._ours.painter.sampler.model.cpu()  # a card with 12 GB holds one such network at a time
            theirs = ScenePainter(self.config, deployed(), self._parser, self._reader, self._stores.get("deployed"))
            self._measure_deployed(theirs, records, progress)
            theirs.painter.sampler.model.cpu()
            self._ours.painter.sampler.model.to(device_and_dtype(self.config)[0])
        return Evaluation(self._figures(records), records, self._stored, transfer, same)

    def _batches(self, kind: str) -> Iterator[tuple[slice, list[Scene]]]:
        listed, size = getattr(self.pairs, kind), self.config.evaluate.batch_size
        for start in range(0, len(listed), size):
            where = slice(start, start + size)
            yield where, self._reader(listed[where])

    def _kept(self, result: Result, kept: Kept) -> Record:
        kept.add(result)
        return result.record

    def _transfer(self, progress: console.Progress) -> Iterator[Result]:
        for where, scenes in self._batches("transfer"):
            ours = self._ours(scenes, [scene.pair.reference for scene in scenes], NEUTRAL_PROMPT)
            progress.update(len(scenes))
            # made for another pair's reference, held against this pair's own
            other = self._ours(scenes, [pair.reference for pair in self.pairs.shuffled[where]], NEUTRAL_PROMPT)
            progress.update(len(scenes))
            views = {"ours": ours, **self._made(scenes), "shuffled_reference": other, **self._of_reference(scenes)}
            found = self._instruments.transfer(scenes, views)
            self._instruments.add_to_sets(scenes, views)
            self._check_outside(scenes, (*ours, *other))
            self._changes += [
                (float(np.abs(a.picture.astype(int) - b.picture).mean()), scene.pair.head)
                for scene, a, b in zip(scenes, ours, other, strict=True)
            ]
            for scene, view, values in zip(scenes, ours, found, strict=True):
                yield Result(scene, view, Record(scene.pair, values))

    def _reconstruction(self, progress: console.Progress) -> Iterator[Result]:
        for where, scenes in self._batches("reconstruction"):
            ours = self._ours(scenes, [scene.pair.reference for scene in scenes], None)
            progress.update(len(scenes))
            other = self._ours(scenes, [pair.reference for pair in self.pairs.reconstruction_shuffled[where]], None)
            progress.update(len(scenes))
            nothing = self._ours(scenes, None, "")
            progress.update(len(scenes))
            decoded = self._ours.through_vae([scene.target.photo for scene in scenes])
            # pasted where the result was, so that nothing that the UNet does can be better
            regions = [view.region if view.region is not None else scene.head.region for scene, view in zip(scenes, ours, strict=True)]
            ceiling = [
                View(self._ours.paste(scene, picture, region).image, scene.target.hair)
                for scene, picture, region in zip(scenes, decoded, regions, strict=True)
            ]
            views = {"ours": ours, **self._made(scenes), "shuffled_reference": other, "no_conditioning": nothing, "vae": ceiling}
            self._check_outside(scenes, (*ours, *other, *nothing))
            for scene, view, values in zip(scenes, ours, self._instruments.reconstruction(scenes, views), strict=True):
                yield Result(scene, view, Record(scene.pair, values))

    def _measure_deployed(self, theirs: ScenePainter, records: dict[str, list[Record]], progress: console.Progress) -> None:
        """The deployed model on the same pairs with the same seeds; its figures join the records."""
        for kind, prompt, measure in (
            ("transfer", NEUTRAL_PROMPT, self._instruments.transfer),
            ("reconstruction", None, self._instruments.reconstruction),
        ):
            for where, scenes in self._batches(kind):
                views = {"deployed": theirs(scenes, [scene.pair.reference for scene in scenes], prompt)}
                progress.update(len(scenes))
                if kind == "transfer":
                    self._instruments.add_to_sets(scenes, views)
                for record, found in zip(records[kind][where], measure(scenes, views), strict=True):
                    record.values.update(found)

    def _made(self, scenes: Sequence[Scene]) -> dict[str, list[View]]:
        """The baselines that need no network."""
        feather = self.config.sample.feather

        def recoloured(scene: Scene) -> View:
            return View(baselines.colour_transfer(scene.target, scene.reference, feather), scene.target.hair)

        def pasted(scene: Scene) -> View:
            return View(*baselines.crop_paste(scene.target, scene.reference, scene.head.bald, scene.head.region, feather))

        return {
            "no_op": [View(scene.target.photo, scene.target.hair) for scene in scenes],
            "bald": [self._ours.as_result(scene, scene.head.bald) for scene in scenes],  # a model that paints no hair gains nothing on it
            "crop_paste": self._each(pasted, scenes),
            "colour_transfer": self._each(recoloured, scenes),
        }

    def _of_reference(self, scenes: Sequence[Scene]) -> dict[str, list[View]]:
        """The reference photo itself, and through the VAE: what a result can hardly beat."""
        decoded = self._ours.through_vae([scene.reference.photo for scene in scenes])
        return {
            "reference": [View(scene.reference.photo, scene.reference.hair) for scene in scenes],
            "vae": [View(picture, scene.reference.hair) for scene, picture in zip(scenes, decoded, strict=True)],
        }

    def _check_outside(self, scenes: Sequence[Scene], views: Sequence[View]) -> None:
        for number, view in enumerate(views):
            if view.mask is not None:
                original = scenes[number % len(scenes)].target.photo
                self._outside = max(self._outside, metrics.outside_max_abs_diff(view.picture, original, view.mask))

    def _figures(self, records: dict[str, list[Record]]) -> dict[str, Any]:
        settings = self.config.evaluate
        transfer, same = (figures.summarise(records[kind], settings) for kind in ("transfer", "reconstruction"))
        for method, values in self._instruments.set_figures().items():
            transfer[method] |= values
        transfer["shuffled_reference"] |= figures.mean("mean_abs_change", self._changes, settings, of=len(self._changes))
        merged = {method: {**transfer.get(method, {}), **same.get(method, {})} for method in {**transfer, **same}}
        ours = merged.pop("ours")
        protocol = pairs.PROTOCOLS[settings.protocol]
        published = {"published": self._beside_published(protocol, min(map(len, records.values())))} if protocol.published else {}
        unmeasured = {name: "no pair has what it is measured on" for name in figures.BY_NAME if name not in ours}
        deployed = {"deployed": merged["deployed"]} if "deployed" in merged else {}
        return {
            "protocol": PROTOCOL,
            "protocol_name": protocol.name,
            "split": settings.split,
            "samples": len(records["transfer"]),
            "samples_wanted": protocol.samples or settings.samples,
            "samples_reconstruction": len(records["reconstruction"]),
            "samples_reconstruction_wanted": protocol.samples or settings.samples_reconstruction,
            "heads": len({record.pair.head for record in records["transfer"]}),
            "heads_reconstruction": len({record.pair.head for record in records["reconstruction"]}),
            "pairs_sha256": artifacts.sha256_json(self._stored),
            "picture_side": protocol.side or self.config.data.resolution,
            "lpips_backbone": self._instruments.backbone,
            **ours,
            "identity_samples": sum("identity_similarity" in record.values["ours"] for record in records["transfer"]),
            "identity_different_people_p95": self._instruments.different_people,
            "outside_max_abs_diff": self._outside,
            "baselines": {name: merged[name] for name in BASELINES},
            "hold_the_truth": list(HOLD_THE_TRUTH),
            "ceiling_vae": merged["vae"],
            "ceiling_reference": merged["reference"],
            **deployed,
            "slices": {
                kind: figures.sliced(found, [f.name for f in figures.FIGURES if f.protocol != _NOT_IN[kind]], settings)
                for kind, found in records.items()
            },
            "absent": {**unmeasured, **self._instruments.absent},
            **published,
        }

    def _beside_published(self, protocol: pairs.Protocol, samples: int) -> dict[str, Any]:
        """The published figures, and why ours cannot be held against them (``not_comparable``, empty where they can)."""
        why = []
        if protocol.samples is not None and samples < protocol.samples:
            why.append(f"{samples} pairs, {protocol.samples} are the protocol's")
        if protocol.side is not None and self.config.data.resolution < protocol.side:
            why.append(f"photos were prepared at {self.config.data.resolution} px and enlarged, {protocol.side} px are the protocol's")
        if self._instruments.backbone != "vgg16":
            why.append(f"the LPIPS network is '{self._instruments.backbone}'")
        return {"source": protocol.source, **protocol.published, "not_comparable": why}


_NOT_IN = {"transfer": "reconstruction", "reconstruction": "transfer"}
