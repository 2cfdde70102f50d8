"""Measures a model on held-out heads with the code that serves it (DESIGN 4.5): reconstruction, transfer, preservation, baselines.

Reconstruction: target and reference are two photos of one head with one hairstyle, so the target's own photo is the truth. Transfer:
the reference is of another head and the prompt says nothing of hair, so only the reference photo speaks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backend import console
from backend.config import Config
from backend.errors import MissingInputError
from backend.imaging import composite, crop, masks
from backend.imaging.decode import read_png
from backend.training import metrics, readers
from backend.training.data_processing.prompts import NEUTRAL_PROMPT
from backend.training.keyed import key, numpy_generator
from backend.training.models.perceptual import load_perceptual
from backend.training.prepared import Prepared, Sample, reference_candidates
from backend.tryon import conditioning
from backend.tryon.painter import Painter, PaintRequest, device_and_dtype
from backend.tryon.segmentation import HairParser

logger = logging.getLogger(__name__)

PROTOCOL = "reconstruction: other view of the same hair as reference, text from the label; transfer: another head's hair, neutral text"
FRONTAL = 60.0  # degrees of yaw: what serving accepts as a target
IDENTITY_PHOTOS = 80  # photos that say how alike different people are


@dataclass(frozen=True)
class Pair:
    """Rows of metadata: whose photo is changed, and whose hair it gets."""

    target: dict[str, Any]
    reference: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One painted pair. picture: the pasted-back head crop, (S, S, 3) uint8 RGB; mask: the feathered paste mask (S, S) float32;
    hair: (S, S) uint8 0/255, where the parser sees hair in the picture."""

    pair: Pair
    target: Sample
    reference: Sample
    head: conditioning.HeadInput
    picture: NDArray[np.uint8]
    mask: NDArray[np.float32]
    hair: NDArray[np.uint8]


_Seen = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""A picture and the mask of its hair."""


@dataclass(frozen=True)
class Evaluation:
    """figures: the ``evaluation`` object of summary.json. The results are kept for the report's pictures."""

    figures: dict[str, Any]
    transfer: list[Result]
    reconstruction: list[Result]


def usable_targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose head serving would accept: a face box and not seen from the side or behind."""
    return [row for row in rows if row["face_box"] and (row["yaw"] is None or abs(row["yaw"]) <= FRONTAL)]


def reconstruction_pairs(rows: list[dict[str, Any]], count: int, seed: int) -> list[Pair]:
    """Up to ``count`` (target, other photo of the same source and phase), drawn by seed, spread over heads."""
    others = reference_candidates(rows)
    index = {row["id"]: number for number, row in enumerate(rows)}
    pairs = []
    for row in _spread(usable_targets(rows), count, seed, "reconstruction"):
        candidates = others[index[row["id"]]]
        if candidates:
            pick = numpy_generator(seed, "reconstruction/" + row["id"]).integers(len(candidates))
            pairs.append(Pair(row, rows[candidates[int(pick)]]))
    return pairs[:count]


def transfer_pairs(rows: list[dict[str, Any]], count: int, seed: int) -> list[Pair]:
    """Up to ``count`` (target, photo of another head); a target comes again with another reference when photos are few."""
    targets = _spread(usable_targets(rows), count, seed, "transfer")
    pairs: list[Pair] = []
    for lap in range(count):
        for row in targets:
            others = [other for other in rows if other["group"] != row["group"]]
            if len(pairs) == count or not others:
                return pairs
            pick = numpy_generator(seed, "transfer/" + row["id"], lap).integers(len(others))
            pairs.append(Pair(row, others[int(pick)]))
    return pairs


def _spread(rows: list[dict[str, Any]], count: int, seed: int, purpose: str) -> list[dict[str, Any]]:
    """Rows in an order that takes one photo of every head before a second of any."""
    order = numpy_generator(seed, "spread/" + purpose).permutation(len(rows))
    seen: dict[str, int] = {}
    ranked: list[tuple[int, int, dict[str, Any]]] = []
    for number in order:
        row = rows[int(number)]
        seen[row["group"]] = seen.get(row["group"], 0) + 1
        ranked.append((seen[row["group"]], len(ranked), row))
    return [row for _, _, row in sorted(ranked, key=lambda item: item[:2])][: max(count, 1) * 4]


class Evaluator:
    """Paints pairs with one painter and measures them."""

    def __init__(self, config: Config, painter: Painter) -> None:
        self.config, self._painter = config, painter
        self._prepared = Prepared(config.paths.processed)
        self._rows = self._prepared.rows(config.evaluate.split)
        self._network, self.backbone = load_perceptual(config.paths.weights)
        self._parser = HairParser(config.paths.weights, device=device_and_dtype(config)[0])
        self._identity = readers.IdentityReader(config)

    def run(self) -> Evaluation:
        """Both protocols with all baselines. Raises MissingInputError when the split has too few heads to form a pair."""
        settings = self.config.evaluate
        pairs = transfer_pairs(self._rows, settings.samples, settings.seed)
        same = reconstruction_pairs(self._rows, settings.samples_reconstruction, settings.seed)
        if not pairs or not same:
            raise MissingInputError(
                f"the {settings.split} split has {len(self._rows)} photos of {len({row['group'] for row in self._rows})} heads: too few for pairs",
                hint="prepare more photos, or choose evaluate.split=val",
            )
        progress = console.Progress("evaluation", 2 * len(pairs) + 2 * len(same), unit="picture")
        transfer = self.paint(pairs, NEUTRAL_PROMPT, progress)
        shuffled = self.paint(_shuffled(pairs, settings.seed), NEUTRAL_PROMPT, progress)
        reconstruction = self.paint(same, None, progress)
        unconditioned = self.paint(same, "", progress, conditioned=False)
        figures = self._measure(transfer, shuffled, reconstruction, unconditioned)
        return Evaluation(figures, transfer, reconstruction)

    def paint(self, pairs: Sequence[Pair], prompt: str | None, progress: console.Progress, *, conditioned: bool = True) -> list[Result]:
        """Paints and pastes back every pair; prompt None takes the target's own. ``conditioned`` False: no style, no identity."""
        settings = self.config.evaluate
        results: list[Result] = []
        for start in range(0, len(pairs), settings.batch_size):
            part = pairs[start : start + settings.batch_size]
            loaded = [(self._prepared.sample(pair.target), self._prepared.sample(pair.reference)) for pair in part]
            heads = [
                conditioning.head_input(
                    target.photo, target.hair, target.face_box, method=self.config.data.bald, landmarks=pair.target["landmarks"]
                )
                for pair, (target, _) in zip(part, loaded, strict=True)
            ]
            requests = [
                PaintRequest(
                    head=head,
                    style=read_png(self._prepared.folder / pair.reference["files"]["style"]) if conditioned else None,
                    identity=target.identity if conditioned else None,
                    prompt=target.prompt if prompt is None else prompt,
                    seed=key(settings.seed, "picture/" + pair.target["id"]),
                )
                for pair, head, (target, _) in zip(part, heads, loaded, strict=True)
            ]
            painted = conditioning.to_pictures(self._painter.paint(requests, steps=settings.steps, guidance=settings.guidance))
            for pair, head, (target, reference), picture in zip(part, heads, loaded, painted, strict=True):
                square = crop.Square(0, 0, picture.shape[0])
                region = masks.changed_region(head.region, target.hair, self._parser.hair(picture), target.face_box)
                pasted = composite.paste_back(target.photo, picture, region, square, self.config.sample.feather)
                hair = self._parser.hair(pasted.image)
                results.append(Result(pair, target, reference, head, pasted.image, pasted.mask, hair))
            progress.update(len(part))
        return results

    def _measure(
        self, transfer: list[Result], shuffled: list[Result], reconstruction: list[Result], unconditioned: list[Result]
    ) -> dict[str, Any]:
        pair_heads = [r.pair.target["group"] for r in transfer]
        wanted = [_reference_colour(r) for r in transfer]
        ours = [metrics.ciede2000(_result_colour(r, r.picture), lab) for r, lab in zip(transfer, wanted, strict=True)]
        unchanged = [metrics.ciede2000(_result_colour(r, r.target.photo), lab) for r, lab in zip(transfer, wanted, strict=True)]
        # the result made for another pair's reference, held against this pair's own
        other = [metrics.ciede2000(_result_colour(r, r.picture), lab) for r, lab in zip(shuffled, wanted, strict=True)]
        changed = [float(np.abs(a.picture.astype(int) - b.picture).mean()) for a, b in zip(transfer, shuffled, strict=True)]
        through = [
            (picture, r.reference.hair)
            for r, picture in zip(transfer, self._through_vae([r.reference.photo for r in transfer]), strict=True)
        ]
        curl = self._curl(transfer, shuffled, through)
        same = self._reconstruction(reconstruction, unconditioned)
        return {
            "protocol": PROTOCOL,
            "split": self.config.evaluate.split,
            "samples": len(transfer),
            "samples_reconstruction": len(reconstruction),
            "heads": len(set(pair_heads)),
            "lpips_backbone": self.backbone,
            **same["ours"],
            **self._means("hair_color_delta_e", ours, pair_heads),
            **curl["ours"],
            **self._identities(transfer),
            "outside_max_abs_diff": max(
                metrics.outside_max_abs_diff(r.picture, r.target.photo, r.mask) for r in (*transfer, *shuffled, *reconstruction)
            ),
            "baselines": {
                "no_op": {**self._means("hair_color_delta_e", unchanged, pair_heads), **curl["no_op"]},
                "shuffled_reference": {
                    **self._means("hair_color_delta_e", other, pair_heads),
                    **self._means("mean_abs_change", changed, pair_heads),
                    **curl["shuffled_reference"],
                },
                "bald": same["bald"],
                "no_conditioning": same["no_conditioning"],
            },
            "ceiling_vae": {
                **same["vae"],
                **self._means("hair_color_delta_e", self._colour_through_vae(through, wanted), pair_heads),
                **curl["vae"],
            },
            "ceiling_reference": curl["reference"],
        }

    def _reconstruction(self, results: list[Result], unconditioned: list[Result]) -> dict[str, dict[str, Any]]:
        """LPIPS and masked PSNR of results, baselines and ceiling; each baseline with our mean gain over it, pair by pair."""
        truth, heads = [r.target.photo for r in results], [r.pair.target["group"] for r in results]
        pictures = {
            "ours": [r.picture for r in results],
            "bald": [r.head.bald for r in results],
            "no_conditioning": [r.picture for r in unconditioned],
            "vae": self._ceiling(results),
        }
        lpips = {name: metrics.lpips(self._network, made, truth) for name, made in pictures.items()}
        psnr = {name: self._psnr(results, made) for name, made in pictures.items()}
        figures = {name: {**self._means("lpips", lpips[name], heads), **self._means("masked_psnr", psnr[name], heads)} for name in pictures}
        for name in ("bald", "no_conditioning"):
            figures[name] |= self._means("lpips_gain", list(np.subtract(lpips[name], lpips["ours"])), heads)
            figures[name] |= self._means("masked_psnr_gain", list(np.subtract(psnr["ours"], psnr[name])), heads)
        return figures

    def _colour_through_vae(self, through: list[_Seen], wanted: list[NDArray[np.float64]]) -> list[float]:
        """How far the VAE alone moves the colour of each reference's hair, CIEDE2000."""
        return [metrics.ciede2000(metrics.hair_colour(picture, hair), lab) for (picture, hair), lab in zip(through, wanted, strict=True)]

    def _curl(self, transfer: list[Result], shuffled: list[Result], through: list[_Seen]) -> dict[str, dict[str, Any]]:
        """How often Stage 1 reads the reference's curl class (its label) from the result, and from what it is held against.

        ``reference``: from the reference photo itself at the same size; ``vae``: from that photo through the VAE (``through``). A result
        can hardly beat either. Pairs without a label are left out.
        """
        known = [n for n, r in enumerate(transfer) if r.pair.reference["curl"] is not None]
        names = ("ours", "no_op", "shuffled_reference", "reference", "vae")
        if not known:
            return {name: {} for name in names}
        labels = np.array([transfer[n].pair.reference["curl"] for n in known])
        heads = [transfer[n].pair.target["group"] for n in known]
        seen = {
            "ours": [(transfer[n].picture, transfer[n].hair) for n in known],
            "no_op": [(transfer[n].target.photo, transfer[n].target.hair) for n in known],
            "shuffled_reference": [(shuffled[n].picture, shuffled[n].hair) for n in known],
            "reference": [(transfer[n].reference.photo, transfer[n].reference.hair) for n in known],
            "vae": [through[n] for n in known],
        }
        figures = {}
        for name in names:
            pictures, hair = zip(*seen[name], strict=True)
            read = readers.read_curl(self._painter.texture_encoder, pictures, hair, self.config.texture.image_size)
            figures[name] = self._means("curl_agreement", list((read == labels).astype(float)), heads)
        return figures

    def _identities(self, transfer: list[Result]) -> dict[str, Any]:
        """Similarity of target and result by the identity network, and the share above the 95th percentile of different people.

        Over targets whose face is intact; the percentile is that of all intact photos of the data, head crops at the same size.
        """
        faces = [r for r in transfer if r.pair.target["identity_valid"] and r.pair.target["landmarks"]]
        rows = [row for row in self._prepared.rows() if row["identity_valid"] and row["landmarks"]]
        if not faces or len(rows) < 2:
            return {"identity_samples": 0}
        rows = [rows[int(n)] for n in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), IDENTITY_PHOTOS)).round())]
        known = np.stack([self._identity.embed(self._prepared.sample(row).photo, row["landmarks"]) for row in rows])
        threshold = readers.different_people_p95(known, [row["group"] for row in rows])
        pairs = [(r.target.photo, r.picture, r.pair.target["landmarks"]) for r in faces]
        similar = [float(self._identity.embed(a, points) @ self._identity.embed(b, points)) for a, b, points in pairs]
        heads = [r.pair.target["group"] for r in faces]
        figures = {"identity_samples": len(faces), **self._means("identity_similarity", similar, heads)}
        if threshold is not None:
            above = [float(value > threshold) for value in similar]
            figures |= {"identity_different_people_p95": threshold, **self._means("identity_kept", above, heads)}
        return figures

    def _psnr(self, results: list[Result], pictures: Sequence[NDArray[np.uint8]]) -> list[float]:
        return [metrics.masked_psnr(picture, r.target.photo, r.target.hair) for r, picture in zip(results, pictures, strict=True)]

    def _ceiling(self, results: list[Result]) -> list[NDArray[np.uint8]]:
        """The photos through the VAE and back, pasted back like a result: nothing that the UNet does can be better."""
        pictures = []
        for r, decoded in zip(results, self._through_vae([r.target.photo for r in results]), strict=True):
            square = crop.Square(0, 0, decoded.shape[0])
            pictures.append(composite.paste_back(r.target.photo, decoded, r.head.region, square, self.config.sample.feather).image)
        return pictures

    def _through_vae(self, photos: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        vae = self._painter.sampler.vae
        decoded: list[NDArray[np.uint8]] = []
        with torch.inference_mode():
            for photo in photos:
                mean, _ = conditioning.encode_latents(vae, conditioning.to_tensor([photo]))
                decoded += conditioning.to_pictures(conditioning.decode_latents(vae, mean))
        return decoded

    def _means(self, name: str, values: list[float], heads: list[str]) -> dict[str, Any]:
        mean, interval = metrics.mean_with_interval(values, heads, draws=self.config.evaluate.bootstrap, seed=self.config.evaluate.seed)
        return {name: mean, f"{name}_ci": interval}


def _shuffled(pairs: list[Pair], seed: int) -> list[Pair]:
    """Every target with the reference of another pair whose reference is of another head than its own, where there is one."""
    order = numpy_generator(seed, "shuffle").permutation(len(pairs))
    place = {int(number): rank for rank, number in enumerate(order)}
    shuffled = []
    for number, pair in enumerate(pairs):
        later = (pairs[int(order[(place[number] + shift) % len(pairs)])].reference for shift in range(1, len(pairs)))
        fitting = (row for row in later if row["group"] not in (pair.reference["group"], pair.target["group"]))
        shuffled.append(Pair(pair.target, next(fitting, pair.reference)))
    return shuffled


def _reference_colour(result: Result) -> NDArray[np.float64]:
    return metrics.hair_colour(result.reference.photo, result.reference.hair)


def _result_colour(result: Result, picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    return metrics.hair_colour(picture, metrics.crown(result.target.hair, result.target.face_box))
