"""Paints the evaluation's pairs with the code that serves (DESIGN section 2: what is evaluated is what is served)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from backend import artifacts
from backend.config import Config
from backend.errors import InvalidArtifactError
from backend.imaging import composite, crop, masks
from backend.imaging.decode import read_png, write_png
from backend.imaging.uncover import uncovered
from backend.machine import cores
from backend.training.pairs import Pair, Row, picture_seed
from backend.training.prepared import Prepared, Sample
from backend.tryon import conditioning
from backend.tryon.painter import Painter, PaintRequest
from backend.tryon.pipeline import checked_output
from backend.tryon.remembered import Remembered
from backend.tryon.segmentation import HairParser
from backend.tryon.values import TryOnError

Picture = NDArray[np.uint8]
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Scene:
    """One pair, read: whose head is painted (head: the edit region and bald image of the target) and whose hair it is to get."""

    pair: Pair
    target: Sample
    reference: Sample
    head: conditioning.HeadInput


@dataclass(frozen=True)
class View:
    """A picture to be judged. picture: (S, S, 3) uint8 RGB; hair: (S, S) uint8 0/255, where its hair is.

    region: (S, S) uint8 0/255, what was pasted; mask: the same with its soft edge, float32; None where nothing was painted.
    failed: why it is no picture, or empty.
    """

    picture: Picture
    hair: Picture
    region: Picture | None = None
    mask: NDArray[np.float32] | None = None
    failed: str = ""


class ThreadedMap:
    """``map`` over threads in the order of the input, so that their number changes no figure; 0: one per core, 8 at most."""

    def __init__(self, workers: int) -> None:
        self._workers = workers or cores(8)

    def __call__(self, function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
        """The results in order; the first error is raised."""
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(function, items))


class SceneReader:
    """Reads pairs from Stage 0's output as scenes."""

    def __init__(self, config: Config, prepared: Prepared, each: ThreadedMap) -> None:
        self._config, self.prepared, self._each = config, prepared, each

    def __call__(self, pairs: Sequence[Pair]) -> list[Scene]:
        """The scenes of the pairs. Raises InvalidArtifactError when an edit region leaves hair out: it would stay in the bald image."""
        return self._each(self._scene, pairs)

    def _scene(self, pair: Pair) -> Scene:
        target, reference = self.prepared.sample(pair.target), self.prepared.sample(pair.reference)
        head = conditioning.head_input(
            target.photo, target.hair, target.face_box, method=self._config.data.bald, landmarks=pair.target["landmarks"]
        )
        left_out = int(((target.hair > 0) & (head.region == 0)).sum())
        if left_out or not target.hair.any():
            what = f"leaves out {left_out} of its hair's pixels" if left_out else "has no hair to be replaced"
            raise InvalidArtifactError(f"the edit region of {target.id} {what}", hint="prepare the data again")
        return Scene(pair, target, reference, head)

    def style(self, row: Row) -> Picture:
        """The style picture of a row, (224, 224, 3) uint8 RGB."""
        return read_png(self.prepared.folder / row["files"]["style"])


class PaintedStore:
    """Painted head crops on disk, so that a measurement of hours that was stopped, or failed after it, goes on where it was.

    One PNG per request and, where the model made no picture, a file with the error's code. ``folder`` must be one per model and settings.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, requests: Sequence[str]) -> list[tuple[Picture, str]] | None:
        """Pictures (S, S, 3) with their errors' codes; None where one is missing, since a smaller batch would be painted with other bits."""
        found = [self._folder / f"{name}.png" for name in requests]
        if not all(path.is_file() for path in found):
            return None
        return [(read_png(path), artifacts.read_json(path.with_suffix(".json"))["failed"]) for path in found]

    def put(self, request: str, picture: Picture, failed: str) -> None:
        """Keeps a picture; the PNG comes last and says that both files are there."""
        artifacts.write_json(self._folder / f"{request}.json", {"failed": failed})
        write_png(self._folder / f"{request}.png", picture, compression=1)

    def clear(self) -> None:
        """Removes everything; the report has what counts."""
        shutil.rmtree(self._folder, ignore_errors=True)


class ScenePainter:
    """Paints and pastes back scenes with one model; what ``store`` holds is not painted again."""

    def __init__(
        self, config: Config, painter: Painter, parser: HairParser, reader: SceneReader, store: PaintedStore | None = None
    ) -> None:
        self._config, self.painter, self._parser, self._reader, self._store = config, painter, parser, reader, store
        self._skin: Remembered[str, Picture] = Remembered(64)  # of the photos, by id

    def __call__(self, scenes: Sequence[Scene], references: Sequence[Row] | None, prompt: str | None) -> list[View]:
        """One view per scene. references: whose hair each gets, None: no style and no identity. prompt None: the target's own."""
        settings = self._config.evaluate
        others = ["" if references is None else str(references[number]["id"]) for number in range(len(scenes))]
        names = [request_name(scene, other, prompt) for scene, other in zip(scenes, others, strict=True)]
        if self._store is not None and (known := self._store.get(names)) is not None:
            return [self.as_result(scene, *found) for scene, found in zip(scenes, known, strict=True)]
        requests = [
            PaintRequest(
                head=scene.head,
                style=self._reader.style(references[number]) if references is not None else None,
                identity=scene.target.identity if references is not None else None,
                prompt=scene.target.prompt if prompt is None else prompt,
                seed=picture_seed(scene.pair, settings.seed),
            )
            for number, scene in enumerate(scenes)
        ]
        painted = self.painter.paint(requests, steps=settings.steps, guidance=settings.guidance)
        found = [_checked(scene, image) for scene, image in zip(scenes, painted, strict=True)]
        if self._store is not None:
            for name, (picture, failed) in zip(names, found, strict=True):
                self._store.put(name, picture, failed)
        return [self.as_result(scene, picture, failed) for scene, (picture, failed) in zip(scenes, found, strict=True)]

    def as_result(self, scene: Scene, picture: Picture, failed: str = "") -> View:
        """A head crop (S, S, 3) as if the model had painted it: pasted back where hair was or has come, and its hair found."""
        target = scene.target
        hair, skin = self._parser.hair_and_skin(picture)
        region = masks.changed_region(scene.head.region, target.hair, hair, target.face_box)
        own_skin = self._skin.get(target.id, lambda: self._parser.hair_and_skin(target.photo)[1])
        pasted = self.paste(scene, uncovered(target.photo, picture, target.hair, hair, own_skin, skin), region)
        return View(pasted.image, self._parser.hair(pasted.image), region, pasted.mask, failed)

    def paste(self, scene: Scene, picture: Picture, region: Picture) -> composite.Pasted:
        """A painted head crop laid over the target's photo inside ``region``."""
        return composite.paste_back(scene.target.photo, picture, region, crop.Square(0, 0, picture.shape[0]), self._config.sample.feather)

    def through_vae(self, photos: Sequence[Picture]) -> list[Picture]:
        """Photos through the VAE and back: what no UNet can improve on."""
        vae: Any = self.painter.sampler.vae
        decoded: list[Picture] = []
        with self.painter.sampler.placement.used(vae), torch.inference_mode():
            for photo in photos:
                mean, _ = conditioning.encode_latents(vae, conditioning.to_tensor([photo]))
                decoded += conditioning.to_pictures(conditioning.decode_latents(vae, mean))
        return decoded


def request_name(scene: Scene, reference: str, prompt: str | None) -> str:
    """What tells one painting of a scene from the others by the same model and settings: whose hair it gets and the words."""
    return artifacts.sha256_json([scene.target.id, reference, prompt])[:32]


def _checked(scene: Scene, image: torch.Tensor) -> tuple[Picture, str]:
    """A painted crop (3, S, S) as a picture, and why it is none. It counts as a failure then; what there is of it is measured like any other."""
    try:
        return checked_output(image[None], scene.head.region), ""
    except TryOnError as error:
        return conditioning.to_pictures(image[None])[0], error.code
