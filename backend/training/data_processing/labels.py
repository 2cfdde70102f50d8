"""One K-Hairstyle label: its bytes, its polygons, its attributes (DESIGN 4.1; facts/khairstyle.md 1.3 to 1.7).

Two layouts are read: one flat JSON object per photo, and the AI-Hub sample pack's single list. Whatever a file holds,
reading it ends in a :class:`PhotoLabel` or in a :class:`LabelError` with one of :data:`REASONS`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backend.errors import DeepHairError
from backend.training.data_processing.names import Folders, folders_of, last_part, nfc, photo_id, source_of

MAX_LABEL_BYTES = 4 * 1024 * 1024
MAX_POINTS = 20_000
MAX_COORDINATE = 1e6  # pixels; the largest edition is 4032 wide, and what lies further out would overflow a rasteriser's integers
MAX_NESTING = 6
MAX_VALUE_CHARS = 200

REASONS: dict[str, str] = {
    "orphan_label": "The label names a photo that is not there.",
    "duplicate_label": "The photo already has a label; this one was set aside.",
    "duplicate_id": "Another photo has the same id; this one was set aside.",
    "no_label": "The photo has no label.",
    "not_an_image": "The file has a photo's name and is neither JPEG nor PNG nor a label.",
    "unreadable": "The file or folder cannot be read: a broken link, no permission, or not a regular file.",
    "archive": "An archive lies among the photos and labels; if it holds any, unpack it with normalize_khairstyle.py.",
    "foreign": "The file is neither a photo nor a label.",
    "bad_name": "The file's name cannot serve as an id: not valid UTF-8, control characters, or too long.",
    "empty_label": "The label file is empty.",
    "bad_json": "The label is not valid JSON.",
    "bad_encoding": "The label is neither UTF-8 nor CP949 text.",
    "bad_label": "The label is valid JSON of another shape than a K-Hairstyle label.",
    "too_large": f"The label file is larger than {MAX_LABEL_BYTES // 2**20} MiB.",
    "bad_polygon": "A polygon cannot be read as rings of points.",
    "too_many_points": f"A polygon has more than {MAX_POINTS:,} points.",
}

ATTRIBUTE_FIELDS = (
    "basestyle", "basestyle-type", "length", "curl", "bang", "loss", "side", "partition", "color", "exceptional", "sex",
    "age", "hair-width", "natural-curl", "damage", "melanin-color", "black-colorize", "water-repellency", "patch-test",
    "decolorize-history", "user-satisfied", "designer-satisfied", "rgb",
)  # fmt: skip
_ALIASES = {"gender": "sex", "user-stisfied": "user-satisfied", "file-name": "filename"}
_BLANK = frozenset({"", "nan", "none", "null", "na", "n/a"})
_VERTICAL = {"상": "high", "중": "mid", "하": "low", "high": "high", "mid": "mid", "low": "low"}
_PYTHON_WORDS = {"None": "null", "True": "true", "False": "false", "nan": "NaN", "inf": "Infinity"}

Ring = np.ndarray[tuple[int, int], np.dtype[np.float64]]


class LabelError(DeepHairError):
    """A label that cannot be used. ``reason`` is a key of :data:`REASONS`; ``detail`` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{REASONS[reason]} ({detail})", code=reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[LabelError], tuple[str, str]]:
        return LabelError, (
            self.reason,
            self.detail,
        )  # the error crosses process borders; Exception's own way would lose the detail


@dataclass(frozen=True)
class Pair:
    """A photo and its label. ``entry`` is the index within the sample pack's one list, None for a label of its own."""

    photo: Path
    label: Path
    entry: int | None = None


@dataclass(frozen=True)
class PhotoLabel:
    """What a label says of one photo. Coordinates are x, y pixels of the stored frame (no EXIF rotation)."""

    id: str
    filename: str
    source: str
    prefix: str
    folder_index: int | None
    basestyle_folder: str | None
    hair_rings: tuple[Ring, ...]  # each (N >= 3, 2) float64
    face_rings: tuple[Ring, ...]  # the blurred area (polygon2), empty on back views
    horizontal: float | None  # degrees in [0, 360), 0 = front, 180 = back
    vertical: str | None  # 'high' | 'mid' | 'low'
    front: bool | None
    phase: str | None  # 'before' | 'after'
    size: tuple[int, int] | None  # (width, height) as labelled
    attributes: dict[str, str | None]  # every one of ATTRIBUTE_FIELDS -> raw value, None where blank


def read_label(pair: Pair) -> PhotoLabel:
    """Reads the label of one photo; raises LabelError (and nothing else) where it cannot be used."""
    fields = canonical_fields(_record(pair))
    size = _size(fields)
    photo_folders, label_folders = folders_of(pair.photo), folders_of(pair.label)
    identifier = photo_id(pair.photo.stem)
    source = source_of(identifier) or clean_value(fields.get("source")) or photo_folders.source or label_folders.source or identifier
    prefix = re.match(r"[A-Za-z]*", source)
    return PhotoLabel(
        id=identifier,
        filename=nfc(pair.photo.name),
        source=source,
        prefix=prefix.group().upper() if prefix else "",
        folder_index=_first(photo_folders, label_folders, "index"),
        basestyle_folder=_first(photo_folders, label_folders, "basestyle"),
        hair_rings=tuple(_polygon(fields, "polygon1", size)),
        face_rings=tuple(_polygon(fields, "polygon2", size)),
        horizontal=_azimuth(fields.get("horizontal")),
        vertical=_VERTICAL.get((clean_value(fields.get("vertical")) or "").casefold()),
        front=_flag(fields.get("front")),
        phase=_phase(fields.get("before-after")),
        size=size,
        attributes={name: clean_value(fields.get(name)) for name in ATTRIBUTE_FIELDS},
    )


def _first(photo: Folders, label: Folders, name: str) -> Any:
    value = getattr(photo, name)
    return getattr(label, name) if value is None else value


# ---- files ------------------------------------------------------------


def read_label_bytes(path: str | Path) -> bytes:
    """A label file's bytes; raises LabelError 'too_large' or 'unreadable'."""
    try:
        with open(path, "rb") as handle:
            content = handle.read(MAX_LABEL_BYTES + 1)
    except OSError as error:
        raise LabelError("unreadable", error.strerror or str(error)) from error
    if len(content) > MAX_LABEL_BYTES:
        raise LabelError("too_large", f"more than {MAX_LABEL_BYTES:,} bytes")
    return content


def parse_label_bytes(content: bytes) -> Any:
    """JSON value of a label file: UTF-8 with or without a byte-order mark, else CP949. Raises LabelError."""
    if not content.strip(b" \t\r\n\0\xef\xbb\xbf"):
        raise LabelError("empty_label", f"{len(content)} bytes, all blank")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = content.decode("cp949")
        except UnicodeDecodeError as error:
            raise LabelError("bad_encoding", f"byte {content[error.start]:#04x} at {error.start}") from error
    try:
        return json.loads(text)
    except RecursionError as error:
        raise LabelError("bad_json", "nested too deeply") from error
    except ValueError as error:  # also numbers of more than 4300 digits, which are no JSONDecodeError
        raise LabelError("bad_json", str(error)[:MAX_VALUE_CHARS]) from error


def label_entries(value: Any) -> list[Any] | None:
    """The sample pack's list of labels, or None where ``value`` is one photo's own label. Raises LabelError on other
    shapes."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise LabelError("bad_label", f"expected an object, found {type(value).__name__}")
    entries = value.get("annotation")
    return entries if isinstance(entries, list) else None


def canonical_fields(record: Any) -> dict[str, Any]:
    """A label's keys in one spelling ('-' for '_', sex, filename, user-satisfied); of two spellings the first with a
    value counts."""
    if not isinstance(record, Mapping):
        raise LabelError("bad_label", f"expected an object, found {type(record).__name__}")
    fields: dict[str, Any] = {}
    for key, value in record.items():
        name = _field_name(key)
        if name not in fields or fields[name] in (None, "", []):
            fields[name] = value
    return fields


@functools.lru_cache(maxsize=4096)  # the same 120 keys stand in every label
def _field_name(key: str) -> str:
    name = key.strip().casefold().replace("_", "-")
    return _ALIASES.get(name, name)


def label_filename(record: Any) -> str | None:
    """The photo's file name that a label gives, without folders; None where it gives none."""
    value = record.get("filename") if isinstance(record, dict) else None
    if not isinstance(value, str) or not clean_value(value):  # the usual key is looked at first: this runs for 467,791 labels
        value = canonical_fields(record).get("filename")
    return last_part(value) or None if isinstance(value, str) and clean_value(value) else None


def _record(pair: Pair) -> Any:
    if pair.entry is None:
        value = parse_label_bytes(read_label_bytes(pair.label))
        if label_entries(value) is not None:
            raise LabelError("bad_label", "a list of labels where one photo's label was expected")
        return value
    try:
        stamp = os.stat(pair.label)
    except OSError as error:
        raise LabelError("unreadable", error.strerror or str(error)) from error
    entries = _entries(str(pair.label), stamp.st_mtime_ns, stamp.st_size)
    if not 0 <= pair.entry < len(entries):
        raise LabelError("bad_label", f"entry {pair.entry} of a list of {len(entries)}")
    return entries[pair.entry]


@functools.lru_cache(maxsize=2)  # one list serves every photo of a sample pack; parsing it once per photo would be quadratic
def _entries(path: str, mtime_ns: int, size: int) -> Sequence[Any]:
    return label_entries(parse_label_bytes(read_label_bytes(path))) or []


# ---- values ------------------------------------------------------------


def clean_value(value: Any) -> str | None:
    """A scalar as NFC text without outer blanks; None for the blank forms ("", nan, none, null, na), lists and
    objects."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = nfc(str(value) if not isinstance(value, int) or value.bit_length() < 4096 else "").strip()
    text = text.encode("utf-8", "replace").decode("utf-8")[:MAX_VALUE_CHARS]  # lone surrogates cannot be written as UTF-8
    return None if text.casefold() in _BLANK else text


def _number(value: Any) -> float:
    """A finite float, or NaN for whatever is not a number."""
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _azimuth(value: Any) -> float | None:
    number = _number(value)
    return number % 360.0 if 0.0 <= number <= 360.0 else None


def _flag(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "1": True, "false": False, "0": False}.get((clean_value(value) or "").casefold())


def _phase(value: Any) -> str | None:
    text = (clean_value(value) or "").casefold()
    return text if text in ("before", "after") else None


def _size(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = _number(fields.get("width")), _number(fields.get("height"))
    if not (1 <= width <= MAX_COORDINATE and 1 <= height <= MAX_COORDINATE):
        return None
    return int(width), int(height)


# ---- polygons ------------------------------------------------------------


def parse_polygon(value: object, frame: tuple[int, int] | None = None) -> list[Ring]:
    """Rings of a polygon field, each (N >= 3, 2) float64 x, y pixels.

    Reads a list of rings, one flat ring, points as ``{"x", "y"}`` or ``[x, y]``, numbers as strings, JSON or Python
    quoting, strings encoded twice; blank values give no ring. Points that are not finite, and rings with fewer than 3
    distinct points, are left out; with ``frame`` (width, height) also rings that lie wholly outside it. Self-crossing
    rings are kept, nothing is clipped. Raises LabelError ('bad_polygon', 'too_many_points') and nothing else.
    """
    value = _decoded(value)
    rings: list[Ring] = []
    if value is not None:
        _collect(value, rings, MAX_NESTING)
    if sum(map(len, rings)) > MAX_POINTS:
        raise LabelError("too_many_points", f"{sum(map(len, rings)):,} points")
    usable = [ring[(np.abs(ring) <= MAX_COORDINATE).all(axis=1)] for ring in rings]  # false for NaN, too
    usable = [ring for ring in usable if len(ring) >= 3 and len(set(map(tuple, ring.tolist()))) >= 3]
    return [ring for ring in usable if frame is None or _touches(ring, frame)]


def _polygon(fields: Mapping[str, Any], name: str, frame: tuple[int, int] | None) -> list[Ring]:
    try:
        return parse_polygon(fields.get(name), frame)
    except LabelError as error:
        raise LabelError(error.reason, f"{name}: {error.detail}") from error


def _touches(ring: Ring, frame: tuple[int, int]) -> bool:
    low, high = ring.min(axis=0), ring.max(axis=0)
    return bool((high >= 0).all() and (low < np.asarray(frame)).all())


def _decoded(value: object) -> object:
    """Undoes string encoding, once or several times; None for blank values."""
    for _ in range(MAX_NESTING):
        if not isinstance(value, str):
            break
        text = value.strip().lstrip("\ufeff")
        if text.casefold() in _BLANK:
            return None
        if len(text) > MAX_LABEL_BYTES:
            raise LabelError("too_large", f"a polygon of {len(text):,} characters")
        value = _from_text(text)
    return None if isinstance(value, float) and math.isnan(value) else value


def _from_text(text: str) -> object:
    """Value of JSON text or of a Python literal made of lists, tuples, dicts, strings and numbers."""
    for rewrite in (str, _unquoted, _python_to_json):
        try:
            value: object = json.loads(rewrite(text))
            return value
        except (ValueError, RecursionError):
            continue
    raise LabelError("bad_polygon", f"not JSON: {text[:60]!r}")


def _unquoted(text: str) -> str:
    return text[1:-1] if text[0] == text[-1] == "'" else ""


def _python_to_json(text: str) -> str:
    """Rewrites a Python literal as JSON without evaluating it: single quotes, tuples, None, nan and inf."""
    rewritten = text.translate(str.maketrans("'()", '"[]'))
    rewritten = re.sub(r"\b(None|True|False|nan|inf)\b", lambda word: _PYTHON_WORDS[word.group()], rewritten)
    return re.sub(r",\s*([\]}])", r"\1", rewritten)


def _collect(value: object, rings: list[Ring], depth: int) -> None:
    """Appends every ring found in a nested list."""
    if isinstance(value, str):
        value = _decoded(value)
        if value is None:
            return
    if not isinstance(value, list):
        raise LabelError("bad_polygon", f"expected a list of points or rings, found {type(value).__name__}")
    if not value:
        return
    if len(value) > MAX_POINTS:
        raise LabelError("too_many_points", f"{len(value):,} points")
    if all(map(_is_point, value)):
        rings.append(np.array([_point(point) for point in value], np.float64).reshape(-1, 2))
        return
    if depth == 0:
        raise LabelError("bad_polygon", f"nested more than {MAX_NESTING} levels deep")
    for item in value:
        if item is not None:
            _collect(item, rings, depth - 1)


def _is_point(value: object) -> bool:
    if isinstance(value, dict):
        return ("x" in value and "y" in value) or ("X" in value and "Y" in value)
    return isinstance(value, list) and len(value) == 2 and not any(isinstance(item, (list, dict)) for item in value)


def _point(value: Any) -> tuple[float, float]:
    if isinstance(value, dict):
        value = (value["x"], value["y"]) if "x" in value else (value["X"], value["Y"])
    return _number(value[0]), _number(value[1])
