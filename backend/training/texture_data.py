"""Stage 1's data: which patches there are, which ones a step sees, and the two views it sees of each (DESIGN 4.1, 4.2).

Everything a step draws is keyed by (seed, step), so a resumed run sees exactly what an undisturbed one would have seen.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from backend import artifacts
from backend.errors import InvalidArtifactError, MissingInputError
from backend.imaging.decode import read_png
from backend.training import keyed
from backend.training.evenly import evenly
from backend.training.models.supcon import UNKNOWN
from backend.training.prefetch import ahead

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
MEMORY_BUDGET = 2 << 30  # bytes of decoded patches that are kept; beyond it each step decodes its own
LOWEST_SCALE = 0.75  # of a view's crop: a narrower one would make waves look like another class's
LARGEST_TURN = 20.0  # degrees
WINDOWS = 4  # windows taken from each style picture
COARSE_SIDE = 80  # px; training also sees the windows of style pictures brought down to this side: hair in a small photo
WINDOW_WEIGHT = 2 / 3  # how often a head's windows are drawn, over how often its patches are

Ints = NDArray[np.int64]
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class PatchTable:
    """The patches of one split, sorted as in metadata.jsonl. All arrays are int64 (N,); labels are UNKNOWN where there is none.

    photo and group number the photo and the head of each patch; ``photo_ids`` and ``group_names`` are what the numbers stand for.
    ``window`` is -1 for Stage 0's patches and 0..3 for windows of a photo's style picture (``hair_windows``): waves are often longer than a
    patch. 4..7, in training only, are the same windows of a picture that was COARSE_SIDE small. They say nothing of volume: the width of
    strands cannot be seen at their scale. Windows of ``texture_painted``'s pictures are numbered like those of style pictures.
    """

    paths: tuple[Path, ...]
    photo: Ints
    group: Ints
    curl: Ints
    volume: Ints
    window: Ints
    photo_ids: tuple[str, ...]
    group_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def spread(self, count: int) -> Ints:
        """At most ``count`` patch numbers, evenly spaced, so that every head keeps its share."""
        return evenly(len(self), count)

    def whole_photos(self, count: int) -> Ints:
        """All patches of evenly spaced photos, about ``count`` at most: what is judged by photo needs every patch of it."""
        if len(self) <= count:
            return np.arange(len(self), dtype=np.int64)
        photos = max(1, count * len(self.photo_ids) // len(self))
        return np.flatnonzero(np.isin(self.photo, evenly(len(self.photo_ids), photos)))


_Row = tuple[Path, str, str, int, int, int]


def read_patch_tables(processed: Path, painted: Mapping[str, Path] | None = None) -> dict[str, PatchTable]:
    """The patches of train, val and test below a Stage 0 output folder; ``painted``: further style pictures of training photos, by id.

    Raises MissingInputError when Stage 0 has not run, InvalidArtifactError for a label out of range or a head on two sides of the split.
    """
    metadata = processed / "metadata.jsonl"
    if not metadata.is_file():
        raise MissingInputError(f"there is no {metadata}", hint="run 'deephair prepare' first")
    rows: dict[str, list[_Row]] = {split: [] for split in SPLITS}
    side_of: dict[str, str] = {}
    for row in artifacts.iter_jsonl(metadata):
        split, group = row["split"], row["group"]
        if split not in rows or side_of.setdefault(group, split) != split:
            raise InvalidArtifactError(
                f"{metadata}: head {group} of photo {row['id']} is in split '{split}' and in '{side_of.get(group)}'",
                hint="a head must lie in one of train, val and test; run 'deephair prepare' again",
            )
        curl, volume = _label(row, "curl", 4), _label(row, "volume", 3)
        rows[split] += [(processed / name, row["id"], group, curl, volume, -1) for name in row["patches"]]
        if style := row.get("files", {}).get("style"):
            count = 2 * WINDOWS if split == "train" else WINDOWS
            rows[split] += [(processed / style, row["id"], group, curl, UNKNOWN, window) for window in range(count)]
        if split == "train" and painted and (again := painted.get(row["id"])):
            rows[split] += [(again, row["id"], group, curl, UNKNOWN, window) for window in range(WINDOWS)]
    return {split: _table(found) for split, found in rows.items()}


def _label(row: dict[str, object], name: str, classes: int) -> int:
    value = row[name]
    if value is None:
        return UNKNOWN
    if not isinstance(value, int) or not 0 <= value < classes:
        raise InvalidArtifactError(f"photo {row['id']} has {name} {value!r}, wanted 0 to {classes - 1} or null")
    return value


def _table(rows: list[_Row]) -> PatchTable:
    photos = {name: number for number, name in enumerate(dict.fromkeys(row[1] for row in rows))}
    groups = {name: number for number, name in enumerate(dict.fromkeys(row[2] for row in rows))}
    numbers = np.array([(photos[row[1]], groups[row[2]], *row[3:]) for row in rows], np.int64).reshape(-1, 5)
    photo, group, curl, volume, window = numbers.T
    return PatchTable(tuple(row[0] for row in rows), photo, group, curl, volume, window, tuple(photos), tuple(groups))


def raked_shares(counts: NDArray[np.float64], rounds: int = 100) -> NDArray[np.float64]:
    """Shares of the cells of a table of counts (R, C) whose known rows and columns weigh the same (Deming and Stephan 1940).

    The last row and the last column stand for an unknown label and keep their natural share. Empty cells stay empty; where they make
    equal margins impossible, the last round's compromise stands. Sums to 1.
    """
    shares = counts / counts.sum()
    targets = []
    for axis in (1, 0):
        margin = shares.sum(axis=axis)
        known = np.flatnonzero(margin[:-1])
        target = margin.copy()
        target[known] = margin[:-1].sum() / max(len(known), 1)
        targets.append(target)
    for _ in range(rounds):
        shares = shares * _ratio(targets[0], shares.sum(axis=1))[:, None]
        shares = shares * _ratio(targets[1], shares.sum(axis=0))[None, :]
    return np.asarray(shares / shares.sum())


def _ratio(wanted: NDArray[np.float64], have: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(wanted, have, out=np.ones_like(wanted), where=have > 0)


class BalancedSampler:
    """Draws batches in which classes weigh the same, and within a class every head does, however many photos it has.

    A cell is one pair of curl and volume. Raking its number of heads makes both labels uniform at once where the data allow it.
    Heads come without repetition until a cell has no more. Patches without any label are never drawn: they teach nothing here.
    """

    def __init__(self, table: PatchTable, *, batch_size: int, seed: int) -> None:
        labelled = np.flatnonzero((table.curl != UNKNOWN) | (table.volume != UNKNOWN))
        if not len(labelled):
            raise InvalidArtifactError("no patch of the training split has a curl or volume label", hint="look at report.html of Stage 0")
        self.batch_size, self.seed = batch_size, seed
        cell = (table.curl[labelled] % 5) * 4 + table.volume[labelled] % 4  # UNKNOWN (-1) becomes the last row or column
        order = np.lexsort((table.group[labelled], cell))
        self._patches = labelled[order]
        keys = np.stack([cell[order], table.group[self._patches]])
        starts = np.flatnonzero(np.r_[True, (keys[:, 1:] != keys[:, :-1]).any(axis=0)])
        self._bounds = np.r_[starts, len(self._patches)]  # one bucket for each head in each cell
        self._buckets = {int(c): np.flatnonzero(keys[0, starts] == c) for c in np.unique(keys[0])}
        weight = np.where(table.window[self._patches[starts]] >= 0, WINDOW_WEIGHT, 1.0)
        counts = np.zeros(20)
        for c, buckets in self._buckets.items():
            counts[c] = weight[buckets].sum()
        self.shares = raked_shares(counts.reshape(5, 4))  # (5, 4): curl 0..3 and unknown, volume 0..2 and unknown

    def patches(self, step: int) -> Ints:
        """The patch numbers of one step, (batch_size,) int64, in random order."""
        rng = keyed.numpy_generator(self.seed, "texture patches", step)
        # Evenly spaced points instead of independent ones: every batch has the shares, not only their average.
        points = (rng.random() + np.arange(self.batch_size)) / self.batch_size
        cells = np.searchsorted(np.cumsum(self.shares.ravel()), points, side="right").clip(max=max(self._buckets))
        drawn = []
        for cell, count in zip(*np.unique(cells, return_counts=True), strict=True):
            buckets = self._buckets[int(cell)]
            heads = np.concatenate([rng.permutation(buckets) for _ in range(-(-int(count) // len(buckets)))])[:count]
            drawn.append(self._patches[rng.integers(self._bounds[heads], self._bounds[heads + 1])])
        return rng.permutation(np.concatenate(drawn))


class PatchImages:
    """Pixels of a table's patches at one side: decoded once when they fit ``budget`` bytes, else on demand."""

    def __init__(self, table: PatchTable, side: int, *, workers: int, budget: int = MEMORY_BUDGET) -> None:
        self.paths, self.side = table.paths, side
        self._windows = table.window
        self._kept: Pictures | None = None
        if len(table) * side * side * 3 <= budget:
            files = [list(numbers) for _, numbers in itertools.groupby(range(len(table)), key=self.paths.__getitem__)]
            with ThreadPoolExecutor(max(workers, 1)) as pool:
                pieces = [np.zeros((0, side, side, 3), np.uint8), *pool.map(self._read, files)]
            self._kept = np.concatenate(pieces)

    @property
    def in_memory(self) -> bool:
        """Whether reading costs no decoding."""
        return self._kept is not None

    def get(self, numbers: Ints) -> Pictures:
        """Patches by number, (len(numbers), side, side, 3) uint8 RGB. Raises ImageError naming a file that cannot be read."""
        if self._kept is not None:
            return self._kept[numbers]
        return np.concatenate([self._read([int(number)]) for number in numbers])

    def _read(self, numbers: list[int]) -> Pictures:
        """Patches of one file, (len(numbers), side, side, 3) uint8."""
        path = self.paths[numbers[0]]
        image = read_png(path)
        if image.ndim != 3 or image.shape[2] != 3:
            raise InvalidArtifactError(f"{path} is not an RGB picture: its shape is {image.shape}", hint="run 'deephair prepare' again")
        windows = functools.cache(lambda coarse: hair_windows(image, self.side, coarse=coarse))
        asked = [int(self._windows[number]) for number in numbers]
        return np.stack([windows(w >= WINDOWS)[w % WINDOWS] if w >= 0 else fit_patch(image, self.side) for w in asked])


def hair_windows(style: Pictures, side: int, *, coarse: bool = False) -> Pictures:
    """The four windows of a style picture that hold most hair, (4, side, side, 3) uint8: each is half its height and width.

    style: (S, S, 3) uint8 as ``imaging.patches.style_picture`` makes it, one colour wherever there is no hair.
    """
    corners = style[[0, 0, -1, -1], [0, -1, 0, -1]]
    fill = max(corners, key=lambda colour: int((corners == colour).all(axis=1).sum()))  # hair hardly ever reaches two corners
    picture = fit_patch(fit_patch(style, COARSE_SIDE) if coarse else style, 2 * side)
    covered = cv2.resize((style != fill).any(axis=2).astype(np.float32), (2 * side, 2 * side), interpolation=cv2.INTER_AREA)
    places = [(y, x) for y in (0, side // 2, side) for x in (0, side // 2, side)]
    places.sort(key=lambda place: -float(covered[place[0] : place[0] + side, place[1] : place[1] + side].mean()))
    return np.stack([picture[y : y + side, x : x + side] for y, x in places[:WINDOWS]])


def fit_patch(image: Pictures, side: int) -> Pictures:
    """An RGB patch (H, W, 3) uint8 at side x side, averaged when it shrinks, so that strands do not alias."""
    if image.shape[:2] == (side, side):
        return image
    shrinking = image.shape[0] > side
    return np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC), np.uint8)


@dataclass(frozen=True)
class Batch:
    """One step's input. patches: numbers of the WHOLE batch (B,); images: this process's rows, (b, S, S, 3) uint8 on the CPU."""

    step: int
    patches: Ints
    images: Tensor


def feed(images: PatchImages, sampler: BalancedSampler, steps: range, rows: slice, *, workers: int) -> Generator[Batch, None, None]:
    """Batches of the given steps in order; decoding runs ahead in ``workers`` threads unless the pixels are in memory already."""

    def load(step: int) -> Batch:
        patches = sampler.patches(step)
        return Batch(step, patches, torch.from_numpy(images.get(patches[rows])))

    return ahead(load, steps, workers=0 if images.in_memory else workers)


def draw_views(count: int, seed: int, step: int) -> Tensor:
    """Two random views of each of ``count`` patches, as affine maps for ``augment``: float32 (2, count, 2, 3).

    A view is mirrored or not, turned, moved, and cropped to 3/4 of the side at least. Nothing touches colour, which the embedding has
    to carry, and nothing blurs. No label is about a side, so mirroring is safe.
    """
    draw = torch.rand((5, 2, count), generator=keyed.torch_generator(seed, "texture views", step))
    scale = LOWEST_SCALE + (1 - LOWEST_SCALE) * draw[0]
    angle = torch.deg2rad((2 * draw[1] - 1) * LARGEST_TURN)
    mirror = torch.where(draw[2] < 0.5, -1.0, 1.0)
    shift = (1 - scale) * (2 * draw[3:] - 1)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    first = torch.stack([cos * mirror, -sin, shift[0]], dim=-1)
    second = torch.stack([sin * mirror, cos, shift[1]], dim=-1)
    return torch.stack([first, second], dim=-2)


def augment(images: Tensor, views: Tensor) -> Tensor:
    """Draws the views. images: (b, S, S, 3) uint8; views: (2, b, 2, 3) on the same device. Returns (2b, 3, S, S) float32 in [0, 1]."""
    pixels = to_unit(images).repeat(2, 1, 1, 1)
    grid = functional.affine_grid(views.flatten(0, 1), list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def to_unit(images: Tensor) -> Tensor:
    """(b, S, S, 3) uint8 -> (b, 3, S, S) float32 in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


def name_patches(table: PatchTable, patches: Sequence[int] | Ints, limit: int = 8) -> str:
    """The file names of some patches, for an error message."""
    names = [table.paths[int(number)].name for number in patches[:limit]]
    return ", ".join(names) + (f" and {len(patches) - limit} more" if len(patches) > limit else "")
