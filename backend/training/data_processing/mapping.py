"""What a label's values mean: English per field, and the curl and volume classes (DESIGN 4.1; facts/khairstyle.md 2.1
to 2.3).

One table per field, never one for all: 기타, 해당없음 and 보통 mean different things in different fields. Everything is
read from ``mapping_dict.json`` beside this module.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAPPING_PATH = Path(__file__).with_name("mapping_dict.json")
NUMERIC_FIELDS = frozenset({"age", "decolorize-history", "user-satisfied", "designer-satisfied", "rgb"})
"""Fields whose values need no translation: their English is the value itself."""


@dataclass(frozen=True)
class Tables:
    """The file's content, ready for look-up: keys went through :func:`value_key`."""

    version: int
    fields: Mapping[str, Mapping[str, str]]
    classes: Mapping[str, Mapping[str, int]]


def value_key(value: str) -> str:
    """The form under which a raw value is looked up: NFC, no blanks, no case (살짝 넘긴 = 살짝넘긴, ss = SS)."""
    return "".join(unicodedata.normalize("NFC", value).split()).casefold()


def read_tables(path: Path = MAPPING_PATH) -> Tables:
    """Reads a mapping file; raises KeyError or ValueError where the file is not of this format."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return Tables(
        version=int(content["version"]),
        fields={field: {value_key(raw): str(en) for raw, en in table.items()} for field, table in content["fields"].items()},
        classes={field: {value_key(raw): int(index) for raw, index in table.items()} for field, table in content["classes"].items()},
    )


@functools.cache
def tables() -> Tables:
    """The committed tables, read once."""
    return read_tables()


def english_value(field: str, raw: str | None) -> str | None:
    """English of one value; the value itself for numeric fields; None for a blank or a value that the table lacks."""
    if raw is None or field in NUMERIC_FIELDS:
        return raw
    return tables().fields.get(field, {}).get(value_key(raw))


def english(attributes: Mapping[str, str | None]) -> dict[str, dict[str, str | None]]:
    """``{field: {"raw": value, "en": English}}`` for metadata.jsonl; ``en`` is None where the table lacks the value."""
    return {field: {"raw": raw, "en": english_value(field, raw)} for field, raw in attributes.items()}


def texture_labels(attributes: Mapping[str, str | None], phase: str | None) -> tuple[int | None, int | None]:
    """(curl, volume) classes from the structured fields, never from the prompt.

    curl: 0 straight .. 3 tightly curly, None for phase 'before' (the label tells of the style that was cut
    afterwards, and ``natural-curl`` tells of the hair as it grows, not as it lies); volume: 0 low .. 2 high, from
    ``hair-width`` (it belongs to the person, so it holds in both phases). None also for blank or unknown values.
    """
    curl = None if phase == "before" else _class_of("curl", attributes.get("curl"))
    return curl, _class_of("hair-width", attributes.get("hair-width"))


def _class_of(field: str, raw: str | None) -> int | None:
    return None if raw is None else tables().classes[field].get(value_key(raw))
