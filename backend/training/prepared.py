"""Reading what Stage 0 wrote: one place that knows the layout of ``processed/`` (DESIGN 4.1)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.errors import MissingInputError
from backend.imaging import crop, masks
from backend.imaging.decode import read_png
from backend.training.evenly import evenly


@dataclass(frozen=True)
class Sample:
    """One prepared photo. photo: (S, S, 3) uint8 RGB; hair, blurred: (S, S) uint8 0/255; identity: (512,) float32 or None."""

    id: str
    photo: NDArray[np.uint8]
    hair: NDArray[np.uint8]
    blurred: NDArray[np.uint8]
    face_box: crop.Box | None
    identity: NDArray[np.float32] | None
    prompt: str


class Prepared:
    """The accepted photos of a processed folder. Raises MissingInputError when Stage 0 has not run there."""

    def __init__(self, folder: Path) -> None:
        metadata = folder / "metadata.jsonl"
        if not metadata.is_file():
            raise MissingInputError(
                f"no prepared data at {folder}", hint="run 'deephair prepare' first, or point paths.processed at its output"
            )
        self.folder = folder
        self.digest = artifacts.sha256_file(metadata)
        known: dict[str, Any] = {}
        self._rows = [_slim(row, known) for row in artifacts.iter_jsonl(metadata)]

    def rows(self, split: str | None = None) -> list[dict[str, Any]]:
        """Metadata rows sorted by id, of one split or of all; without outlines and patches, which nothing after Stage 1 needs, and of the
        attributes only ATTRIBUTES: half a million whole rows take 12 GiB."""
        return [row for row in self._rows if split is None or row["split"] == split]

    def picture(self, row: dict[str, Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Reads one photo, (S, S, 3) uint8 RGB, and its hair, (S, S) uint8 0/255."""
        bald, alone = (read_png(self.folder / row["files"][name]) for name in ("bald", "hair_only"))
        return join(bald, alone), np.ascontiguousarray(alone[..., 3])

    def conditions(self, row: dict[str, Any]) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """A photo's style picture, (224, 224, 3) uint8 RGB, and its identity, (512,) float32 or None."""
        return read_png(self.folder / row["files"]["style"]), self._identity(row)

    def _identity(self, row: dict[str, Any]) -> NDArray[np.float32] | None:
        file = row["files"].get("identity")
        return np.load(self.folder / file, allow_pickle=False) if file else None

    def sample(self, row: dict[str, Any]) -> Sample:
        """Reads one photo's pictures and identity."""
        photo, hair = self.picture(row)
        side = hair.shape[0]
        blurred = np.zeros((side, side), np.uint8)
        if row["face_blur_rings"] and not row["identity_valid"]:
            blurred = masks.rasterize([np.array(ring) for ring in row["face_blur_rings"]], side, side)
            blurred[hair > 0] = 0
        return Sample(
            id=row["id"],
            photo=photo,
            hair=hair,
            blurred=blurred,
            face_box=tuple(row["face_box"]) if row["face_box"] else None,
            identity=self._identity(row),
            prompt=row["prompt"],
        )


ATTRIBUTES = ("length", "bang", "sex")  # by which figures are sliced (pairs.slices_of)
_LEFT_OUT = ("hair_rings", "patches", "attributes")


def _slim(row: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """A row as it is kept; equal attributes and prompts are kept once, in ``known``."""
    kept = {name: value for name, value in row.items() if name not in _LEFT_OUT}
    if "attributes" in row:
        attributes = {name: row["attributes"][name] for name in ATTRIBUTES if name in row["attributes"]}
        kept["attributes"] = known.setdefault(repr(attributes), attributes)
    if "prompt" in row:
        kept["prompt"] = known.setdefault(row["prompt"], row["prompt"])
    return kept


@dataclass(frozen=True)
class Pictures:
    """The photos of ``rows`` and their hair, read when they are asked for."""

    prepared: Prepared
    rows: list[dict[str, Any]]

    def get(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """``Prepared.picture`` of row ``index``."""
        return self.prepared.picture(self.rows[index])


def join(bald: NDArray[np.uint8], hair_only: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The head crop that the two stored pictures are parts of: (S, S, 3) uint8 RGB, exact."""
    return np.where(hair_only[..., 3:] > 0, hair_only[..., :3], bald)


def reference_candidates(rows: list[dict[str, Any]]) -> list[list[int]]:
    """For each row the indices of the other photos of the same source and phase: the same hair on the same head, seen otherwise."""
    together = _by_hairstyle(rows)
    return [[other for other in together[row["source"], row["phase"]] if other != index] for index, row in enumerate(rows)]


def thinned(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """About ``count`` of the rows, in their order, spread over all hairstyles (source and phase), two of each at least, so that each has a
    reference; over ``count`` / 2 evenly chosen ones where there are more. All rows where they are no more than ``count``.
    """
    if len(rows) <= count:
        return rows
    groups = list(_by_hairstyle(rows).values())
    if 2 * len(groups) > count:
        groups, share = [groups[n] for n in evenly(len(groups), max(1, count // 2))], 0.0
    else:
        share = count / len(rows)
    chosen = sorted(group[n] for group in groups for n in evenly(len(group), max(2, round(share * len(group)))))
    return [rows[n] for n in chosen]


def _by_hairstyle(rows: list[dict[str, Any]]) -> dict[tuple[str, str | None], list[int]]:
    together: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        together[row["source"], row["phase"]].append(index)
    return together
