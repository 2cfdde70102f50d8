"""The K-Hairstyle set as it lies on disk: every file is found once, told by its content, and paired or rejected
(DESIGN 4.1).

Extensions lie in the released set (16,173 labels carry a photo's name) and photos end in .jpg, .JPG and .jpeg, so
files are told apart by their first bytes. A label belongs to the photo that its ``filename`` gives; its own name
counts only where it gives none (facts/khairstyle.md 1.2, 1.3, 1.6). One pass over the tree, each label read once,
about 0.7 KB of memory per file (measured on 205,000).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backend.errors import MissingInputError
from backend.training.data_processing.labels import (
    REASONS,
    LabelError,
    Pair,
    PhotoLabel,
    label_entries,
    label_filename,
    parse_label_bytes,
    parse_polygon,
    read_label,
    read_label_bytes,
)
from backend.training.data_processing.names import bad_name, nfc, photo_id, printable, source_of, stem_key

__all__ = [
    "REASONS",
    "Index",
    "LabelError",
    "Pair",
    "PhotoLabel",
    "Rejected",
    "index_dataset",
    "parse_polygon",
    "read_label",
    "sniff",
]

logger = logging.getLogger(__name__)

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".heic", ".heif"})
_SNIFFED_BYTES = 64
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "photo"),
    (b"\x89PNG\r\n\x1a\n", "photo"),
    (b"PK\x03\x04", "archive"),
    (b"PK\x05\x06", "archive"),
    (b"Rar!", "archive"),
    (b"7z\xbc\xaf\x27\x1c", "archive"),
    (b"\x1f\x8b", "archive"),
)
_EDITION = re.compile(r"/\d{1,5}\.(hqset|mqset|rawset)(?=/)", re.IGNORECASE)
_PROGRESS_EVERY = 1000
_MAX_COMPARISONS = 4096  # per name; real names repeat two or three times


@dataclass(frozen=True)
class Rejected:
    """An input that cannot be used: ``reason`` is a key of REASONS, ``detail`` says what was found."""

    path: Path
    reason: str
    detail: str


@dataclass(frozen=True)
class Index:
    """Every input of a dataset exactly once: photos with their label, and what was rejected; both sorted by path."""

    pairs: tuple[Pair, ...]
    rejected: tuple[Rejected, ...]

    @property
    def inputs(self) -> int:
        """Number of inputs; a photo and its label are one."""
        return len(self.pairs) + len(self.rejected)


@dataclass(slots=True)
class _Photo:
    path: str
    error: LabelError | None = None  # set for a file under a photo's name that is none


@dataclass(slots=True)
class _Label:
    path: str
    entry: int | None
    filename: str | None  # as the label gives it, NFC, without folders
    digest: bytes
    error: LabelError | None = None  # set where the label cannot be parsed; it still takes its place beside its photo


@dataclass(slots=True)
class _Found:
    photos: dict[str, list[_Photo]] = field(default_factory=lambda: defaultdict(list))
    named: dict[str, list[_Label]] = field(default_factory=lambda: defaultdict(list))  # by the stem of the filename that they give
    unnamed: dict[str, list[_Label]] = field(default_factory=lambda: defaultdict(list))  # by their own stem
    rejected: list[Rejected] = field(default_factory=list)


def sniff(head: bytes) -> str:
    """What a file's first bytes say: 'photo' (JPEG, PNG), 'label' (JSON), 'archive', 'empty' or 'other'."""
    if not head:
        return "empty"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    return "label" if head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")[:1] in (b"{", b"[") else "other"


def index_dataset(images: Path, labels: Path, *, progress: Callable[[int], object] | None = None) -> Index:
    """Pairs photos with labels below two folders, which may be one and the same.

    ``progress`` is called now and then with the number of files seen so far. Raises MissingInputError where a folder
    is missing.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise MissingInputError(f"{folder} is not a folder", hint="set data.images and data.labels to the K-Hairstyle folders")
    found = _Found()
    seen = 0
    for seen, path in enumerate(_walk([str(images), str(labels)], found.rejected), 1):
        _take_in(path, found)
        if progress is not None and seen % _PROGRESS_EVERY == 0:
            progress(seen)
    index = _paired(found)
    logger.info("%d files: %d photos with a label, %d inputs rejected", seen, len(index.pairs), len(index.rejected))
    return index


def _walk(roots: Iterable[str], rejected: list[Rejected]) -> Iterator[str]:
    """Every regular file below ``roots`` once, in sorted order; what cannot be entered or opened goes to
    ``rejected``."""
    visited: set[str] = set()  # real paths: one root may lie below the other, and a link may lead back up
    for root in roots:
        pending = [root]
        while pending:
            folder = pending.pop()
            real = os.path.realpath(folder)
            if real in visited:
                continue
            visited.add(real)
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                rejected.append(_rejected(folder, "unreadable", f"folder: {error.strerror or error}"))
                continue
            subfolders = []
            for entry in entries:
                kind = _kind(entry)
                if kind == "folder":
                    subfolders.append(entry.path)
                elif kind == "file":
                    yield entry.path
                else:
                    rejected.append(_rejected(entry.path, "unreadable", kind))
            pending += reversed(subfolders)


def _kind(entry: os.DirEntry[str]) -> str:
    """'folder', 'file', or what else it is; links are followed."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError as error:  # a link that leads to itself
        return error.strerror or str(error)
    return "broken link" if entry.is_symlink() else "not a regular file"


def _take_in(path: str, found: _Found) -> None:
    """Files one file under what its content and name say."""
    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1].lower()
    try:
        with open(path, "rb") as handle:
            kind = sniff(handle.read(_SNIFFED_BYTES))
    except OSError as error:
        found.rejected.append(_rejected(path, "unreadable", error.strerror or str(error)))
        return
    if kind == "photo":
        problem = bad_name(os.path.splitext(name)[0])
        if problem is None:
            found.photos[stem_key(name)].append(_Photo(path))
        else:
            found.rejected.append(_rejected(path, "bad_name", problem))
    elif kind == "label" or suffix == ".json":
        _take_in_label(path, found)
    elif suffix in PHOTO_SUFFIXES and not name.startswith("._"):
        detail = "empty file" if kind == "empty" else "content is neither JPEG, PNG nor JSON"
        found.photos[stem_key(name)].append(_Photo(path, LabelError("not_an_image", detail)))
    else:
        found.rejected.append(_rejected(path, "archive" if kind == "archive" else "foreign", f"'{printable(name)}'"))


def _take_in_label(path: str, found: _Found) -> None:
    digest = b""
    try:
        content = read_label_bytes(path)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        value = parse_label_bytes(content)
        entries = label_entries(value)
        filename = label_filename(value) if entries is None else None
    except LabelError as error:
        found.unnamed[stem_key(os.path.basename(path))].append(_Label(path, None, None, digest, error))
        return
    if entries is None:
        _file_label(_Label(path, None, filename, digest), found)
        return
    if not entries:
        found.rejected.append(_rejected(path, "bad_label", "a list without an entry"))
    for number, entry in enumerate(entries):
        try:
            filename = label_filename(entry)
        except LabelError as error:
            found.rejected.append(_rejected(path, error.reason, f"entry {number}: {error.detail}"))
            continue
        if filename is None:
            found.rejected.append(_rejected(path, "bad_label", f"entry {number} names no photo"))
        else:
            _file_label(_Label(path, number, filename, digest), found)


def _file_label(label: _Label, found: _Found) -> None:
    if label.filename is None:
        found.unnamed[stem_key(os.path.basename(label.path))].append(label)
    else:
        found.named[stem_key(label.filename)].append(label)


# ---- pairing ------------------------------------------------------------


def _paired(found: _Found) -> Index:
    _fall_back_to_own_names(found)
    pairs: list[tuple[str, Pair]] = []
    rejected = found.rejected
    while found.photos:  # taken out one by one, so that the records make room for the pairs
        key, photos = found.photos.popitem()
        labels = found.named.pop(key, []) + found.unnamed.pop(key, [])
        chosen, left = _match(photos, labels)
        _accept(photos, chosen, pairs, rejected)
        winners = {_edition(photo.path): label for photo, label in zip(photos, chosen, strict=True) if label}
        rejected += [_left_over(label, winners) for label in left]
    for group in (*found.named.values(), *found.unnamed.values()):
        rejected += map(_orphan, group)
    pairs.sort(key=lambda item: item[0])
    rejected.sort(key=lambda item: (str(item.path), item.reason, item.detail))
    return Index(tuple(pair for _, pair in pairs), tuple(rejected))


def _fall_back_to_own_names(found: _Found) -> None:
    """A label whose ``filename`` is that of no photo and of no K-Hairstyle view (a camera's own 'IMG_0001.JPG') goes
    by its own name."""
    for key in [key for key in found.named if key not in found.photos]:
        if source_of(photo_id(key)) is not None:
            continue
        for label in found.named.pop(key):
            own = stem_key(os.path.basename(label.path))
            target = found.unnamed if label.entry is None and own in found.photos else found.named
            target[own if target is found.unnamed else key].append(label)


def _match(photos: list[_Photo], labels: list[_Label]) -> tuple[list[_Label | None], list[_Label]]:
    """The best label for each photo of one name, and the labels left over."""
    chosen: list[_Label | None] = [None] * len(photos)
    taken: set[int] = set()
    for _, photo_number, label_number in _ranked(photos, labels):
        if chosen[photo_number] is None and label_number not in taken:
            chosen[photo_number] = labels[label_number]
            taken.add(label_number)
    return chosen, [label for number, label in enumerate(labels) if number not in taken]


def _ranked(photos: list[_Photo], labels: list[_Label]) -> list[tuple[tuple[int | str, ...], int, int]]:
    """Possible couples, best first: whole photos, parsed labels, named by the label, '.json' names, near folders, exact names, path."""
    limit = max(1, _MAX_COMPARISONS // max(1, len(labels)))
    couples = []
    for photo_number, photo in enumerate(photos[:limit]):
        for label_number, label in enumerate(labels[:_MAX_COMPARISONS]):
            editions = _edition(photo.path), _edition(label.path)
            if None not in editions and editions[0] != editions[1]:
                continue
            rank = (
                photo.error is not None,
                label.error is not None,
                _name_distance(photo.path, label) == 3,
                not label.path.lower().endswith(".json"),
                -_nearness(photo.path, label.path) if len(photos) > 1 or len(labels) > 1 else 0,
                _name_distance(photo.path, label),
                photo.path,
                label.path,
                -1 if label.entry is None else label.entry,
            )
            couples.append((rank, photo_number, label_number))
    return sorted(couples)


def _edition(path: str) -> str | None:
    """'mqset', 'hqset' or 'rawset' where a folder of the path says so; polygons are pixels of one edition."""
    editions = _EDITION.findall(path)
    return editions[-1].lower() if editions else None


def _name_distance(photo: str, label: _Label) -> int:
    """0 for the very name that the label gives, 1 without regard to case, 2 by stem, 3 by the label's own name."""
    if label.filename is None or stem_key(label.filename) != stem_key(photo):
        return 3
    name = nfc(os.path.basename(photo))
    return 0 if label.filename == name else 1 if label.filename.casefold() == name.casefold() else 2


def _nearness(one: str, other: str) -> int:
    """How many folders two paths share at the front and at the end."""
    ours, theirs = one.split(os.sep)[:-1], other.split(os.sep)[:-1]
    front = next((count for count, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    end = next(
        (count for count, (a, b) in enumerate(zip(ours[::-1], theirs[::-1], strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    return front + end


def _accept(photos: list[_Photo], chosen: list[_Label | None], pairs: list[tuple[str, Pair]], rejected: list[Rejected]) -> None:
    """Of the photos of one name the first whole one with a label is taken, the others are rejected."""
    order = sorted(range(len(photos)), key=lambda number: (chosen[number] is None, photos[number].path))
    kept: str | None = None
    for number in order:
        photo, label = photos[number], chosen[number]
        if photo.error is not None:
            rejected.append(_rejected(photo.path, photo.error.reason, photo.error.detail))
        elif kept is not None:
            rejected.append(_rejected(photo.path, "duplicate_id", f"also {_shown(kept)}"))
        elif label is None:
            kept = photo.path
            rejected.append(_rejected(photo.path, "no_label", f"no label gives '{printable(os.path.basename(photo.path))}'"))
        else:
            kept = photo.path
            pairs.append((photo.path, Pair(Path(photo.path), Path(label.path), label.entry)))


def _left_over(label: _Label, winners: dict[str | None, _Label]) -> Rejected:
    """A label of a photo that already has one (of the same edition), or of an edition without photos."""
    edition = _edition(label.path)
    winner = winners.get(edition) or next(iter(winners.values()), None)
    if winner is None or (edition is not None and None not in winners and edition not in winners):
        return _orphan(label)
    same = label.digest == winner.digest and label.digest != b"" and label.entry == winner.entry
    return _rejected(
        label.path,
        "duplicate_label",
        f"{'same content as' if same else 'differs from'} {_shown(winner.path)}{_entry(label)}",
    )


def _shown(path: str) -> str:
    """A path without what lies above the dataset's own folders, so that moving the dataset changes no output."""
    return printable("/".join(path.split(os.sep)[-3:]))


def _orphan(label: _Label) -> Rejected:
    if label.error is not None:
        return _rejected(label.path, label.error.reason, label.error.detail)
    wanted = f"'{printable(label.filename)}'" if label.filename else "no photo by name"
    return _rejected(label.path, "orphan_label", f"gives {wanted}{_entry(label)}")


def _entry(label: _Label) -> str:
    return "" if label.entry is None else f" (entry {label.entry})"


def _rejected(path: str, reason: str, detail: str) -> Rejected:
    return Rejected(Path(path), reason, detail.encode("utf-8", "replace").decode("utf-8"))
