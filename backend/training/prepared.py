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
        self._rows = artifacts.read_jsonl(metadata)

    def rows(self, split: str | None = None) -> list[dict[str, Any]]:
        """Metadata rows sorted by id, of one split or of all."""
        return [row for row in self._rows if split is None or row["split"] == split]

    def picture(self, row: dict[str, Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Reads one photo, (S, S, 3) uint8 RGB, and its hair, (S, S) uint8 0/255."""
        bald, alone = (read_png(self.folder / row["files"][name]) for name in ("bald", "hair_only"))
        return join(bald, alone), np.ascontiguousarray(alone[..., 3])

    def sample(self, row: dict[str, Any]) -> Sample:
        """Reads one photo's pictures and identity."""
        photo, hair = self.picture(row)
        side = hair.shape[0]
        blurred = np.zeros((side, side), np.uint8)
        if row["face_blur_rings"] and not row["identity_valid"]:
            blurred = masks.rasterize([np.array(ring) for ring in row["face_blur_rings"]], side, side)
            blurred[hair > 0] = 0
        file = row["files"].get("identity")
        return Sample(
            id=row["id"],
            photo=photo,
            hair=hair,
            blurred=blurred,
            face_box=tuple(row["face_box"]) if row["face_box"] else None,
            identity=np.load(self.folder / file, allow_pickle=False) if file else None,
            prompt=row["prompt"],
        )


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
    together: dict[tuple[str, str | None], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        together[row["source"], row["phase"]].append(index)
    return [[other for other in together[row["source"], row["phase"]] if other != index] for index, row in enumerate(rows)]
