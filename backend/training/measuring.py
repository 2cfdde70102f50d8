"""The figures of each pair: every method's picture through the same instruments, one record per pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from backend.config import Config
from backend.imaging import crop, patches
from backend.training import metrics, readers
from backend.training.evenly import evenly
from backend.training.image_networks import FrechetSets, MeasuringNetworks
from backend.training.models.perceptual import load_perceptual
from backend.training.models.texture_encoder import TextureEncoder
from backend.training.painting import Picture, Scene, ThreadedMap, View
from backend.training.pairs import PROTOCOLS
from backend.training.prepared import Prepared
from backend.tryon.painter import device_and_dtype

IDENTITY_PHOTOS = 80  # photos that say how alike different people are
MODELS = ("ours", "deployed")  # what can fail; a baseline has no network to fail
FROM_REFERENCE = ("reference", "vae")  # views of the reference photo itself: what a result can hardly beat
Figures = dict[str, float]
Views = Mapping[str, Sequence[View]]


class Instruments:
    """All that measures, loaded once. ``absent`` names the figures that are left out, with the reason."""

    def __init__(self, config: Config, prepared: Prepared, texture_encoder: TextureEncoder, each: ThreadedMap) -> None:
        self._config, self._encoder, self._each = config, texture_encoder, each
        device = device_and_dtype(config)[0]
        network, self.backbone = load_perceptual(config.paths.weights)
        self._perceptual = network.to(device)
        self._networks = MeasuringNetworks(config.paths.weights, config.evaluate, device)
        self._faces = readers.FaceReader(config)
        self._side = PROTOCOLS[config.evaluate.protocol].side
        self.different_people = self._different_people(prepared)
        self.absent = dict(self._networks.absent)
        if self.different_people is None:
            self.absent["identity_kept"] = "too few intact faces of different people"
        self._frechet = {
            name: FrechetSets(network)
            for name, network in (("fid", self._networks.inception), ("fid_clip", self._networks.clip))
            if network is not None
        }

    # ---- reconstruction: the target's photo is the truth ----

    def reconstruction(self, scenes: Sequence[Scene], views: Views) -> list[dict[str, Figures]]:
        """Whole-picture LPIPS, PSNR and SSIM, and PSNR in the hair, of every method: one {method: figures} per scene."""
        records: list[dict[str, Figures]] = [{} for _ in scenes]
        truth = [self._sized(scene.target.photo) for scene in scenes]
        hair = [self._sized(scene.target.hair) for scene in scenes]
        for method, seen in views.items():
            pictures = [self._sized(view.picture) for view in seen]
            lpips = metrics.lpips(self._perceptual, pictures, truth)
            alex = metrics.lpips(self._networks.alex, pictures, truth) if self._networks.alex is not None else None
            pixels = self._each(lambda item: _pixel_figures(*item), zip(pictures, truth, hair, strict=True))
            for number, record in enumerate(records):
                record[method] = {"lpips": lpips[number], **pixels[number]}
                if alex is not None:
                    record[method]["lpips_alex"] = alex[number]
        return records

    # ---- transfer and preservation ----

    def transfer(self, scenes: Sequence[Scene], views: Views) -> list[dict[str, Figures]]:
        """Colour, curl, volume, length and likeness against the reference, identity and preservation against the target."""
        records: list[dict[str, Figures]] = [{method: {} for method in views} for _ in scenes]
        wanted = [metrics.hair_colour(scene.reference.photo, scene.reference.hair) for scene in scenes]
        embedded = self._likeness(scenes, views)
        for method, seen in views.items():
            beside = method in FROM_REFERENCE
            pixels = self._each(lambda item: _hair_figures(*item, beside=item[3] in FROM_REFERENCE),
                                [(*item, method) for item in zip(scenes, seen, wanted, strict=True)])  # fmt: skip
            for record, found in zip(records, pixels, strict=True):
                record[method] |= found
            self._texture(records, method, scenes, seen)
            for name, values in embedded[method].items():
                for record, value in zip(records, values, strict=True):
                    if value is not None:
                        record[method][name] = value
            if not beside:
                self._identity(records, method, scenes, seen)
        return records

    def _texture(self, records: list[dict[str, Figures]], method: str, scenes: Sequence[Scene], seen: Sequence[View]) -> None:
        """Whether Stage 1 reads the reference's label from the result; pairs without a label are left out."""
        labels: tuple[readers.Label, ...] = ("curl", "volume")
        for label in labels:
            known = [number for number, scene in enumerate(scenes) if scene.pair.reference[label] is not None]
            read = readers.read_texture(
                self._encoder, [seen[n].picture for n in known], [seen[n].hair for n in known],
                self._config.texture.image_size, label, patch=self._config.data.patch_size,
            )  # fmt: skip
            for number, found in zip(known, read, strict=True):
                records[number][method][f"{label}_agreement"] = float(found == scenes[number].pair.reference[label])

    def _likeness(self, scenes: Sequence[Scene], views: Views) -> dict[str, dict[str, list[float | None]]]:
        """CLIP-I and DINOv2 similarity of the hair, cut out as style pictures: cosine with the reference's; no hair counts as 0."""
        found: dict[str, dict[str, list[float | None]]] = {method: {} for method in views}
        for name, network in (("clip_i", self._networks.clip), ("dino_hair", self._networks.dino)):
            if network is None:
                continue
            theirs = network.embed([patches.style_picture(scene.reference.photo, scene.reference.hair) for scene in scenes])
            for method, seen in views.items():
                shown = [number for number, view in enumerate(seen) if view.hair.any()]
                values: list[float | None] = [0.0] * len(seen)
                if shown:
                    ours = network.embed([patches.style_picture(seen[n].picture, seen[n].hair) for n in shown])
                    for number, value in zip(shown, metrics.cosine(ours, theirs[shown]), strict=True):
                        values[number] = value
                found[method][name] = values
        return found

    def _identity(self, records: list[dict[str, Figures]], method: str, scenes: Sequence[Scene], seen: Sequence[View]) -> None:
        """Likeness of target and result over intact faces; for models also whether the result failed. What failed is nobody."""
        for record, scene, view in zip(records, scenes, seen, strict=True):
            failed = bool(view.failed)
            if method in MODELS:
                # a photo in which the detector sees no face before says nothing about the result, unless that is no picture at all
                judged = failed or self._faces.sees_face(scene.target.photo)
                if judged:
                    failed = failed or not self._faces.sees_face(view.picture)
                    record[method]["failure_rate"] = float(failed)
            points = scene.pair.target["landmarks"]
            if scene.pair.target["identity_valid"] and points:
                alike = float(self._faces.embed(scene.target.photo, points) @ self._faces.embed(view.picture, points))
                record[method]["identity_similarity"] = alike
                if self.different_people is not None:
                    record[method]["identity_kept"] = float(alike > self.different_people and not failed)

    def _different_people(self, prepared: Prepared) -> float | None:
        """The 95th percentile of the similarity of intact photos of different people, head crops as the results are."""
        rows = [row for row in prepared.rows() if row["identity_valid"] and row["landmarks"]]
        if len(rows) < 2:
            return None
        rows = [rows[int(n)] for n in evenly(len(rows), IDENTITY_PHOTOS)]
        known = np.stack(self._each(lambda row: self._faces.embed(prepared.sample(row).photo, row["landmarks"]), rows))
        return readers.different_people_p95(known, [row["group"] for row in rows])

    # ---- sets ----

    def add_to_sets(self, scenes: Sequence[Scene], views: Views) -> None:
        """Takes the transfer results and the photos they were made from into the distances between sets."""
        for sets in self._frechet.values():
            sets.add([self._sized(s.target.photo) for s in scenes],
                     {method: [self._sized(v.picture) for v in seen] for method, seen in views.items() if method not in FROM_REFERENCE})  # fmt: skip

    def set_figures(self) -> dict[str, Figures]:
        """FID and FID_CLIP of every method, where their networks are there."""
        found: dict[str, Figures] = {}
        for name, sets in self._frechet.items():
            for method, value in sets.distances().items():
                found.setdefault(method, {})[name] = value
        return found

    def _sized(self, picture: Picture) -> Picture:
        return picture if self._side is None else crop.resize(picture, self._side)


def _pixel_figures(picture: Picture, truth: Picture, hair: Picture) -> Figures:
    return {
        "psnr": metrics.psnr(picture, truth),
        "ssim": metrics.ssim(picture, truth),
        "masked_psnr": metrics.masked_psnr(picture, truth, hair),
    }


def _hair_figures(scene: Scene, view: View, wanted: NDArray[np.float64], _: str, *, beside: bool) -> Figures:
    if beside:
        return {"hair_color_delta_e": metrics.ciede2000(metrics.hair_colour(view.picture, scene.reference.hair), wanted)}
    target = scene.target
    colour = metrics.hair_colour(view.picture, metrics.crown(target.hair, target.face_box))
    found = {"hair_color_delta_e": metrics.ciede2000(colour, wanted)}
    theirs = metrics.hair_length(scene.reference.hair, scene.reference.face_box)
    ours = metrics.hair_length(view.hair, target.face_box)
    if theirs is not None and target.face_box is not None:
        found["hair_length_error"] = abs((ours or 0.0) - theirs)
    rest = np.where((target.hair > 0) | (view.hair > 0), 0, 255).astype(np.uint8)
    if rest.any():
        found["psnr_non_hair"] = metrics.masked_psnr(view.picture, target.photo, rest)
        found["ssim_non_hair"] = metrics.ssim(view.picture, target.photo, rest)
    return found
