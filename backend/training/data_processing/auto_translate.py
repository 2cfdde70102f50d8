"""Finds label values that mapping_dict.json lacks and proposes English for them, as a diff for a person to review.

    python -m backend.training.data_processing.auto_translate LABELS --out proposal/

writes ``proposal/missing.json`` (field, value, count, proposal) and ``proposal/mapping_dict.diff``. Nothing is
changed by itself: what is right is taken over with ``patch -p1 < proposal/mapping_dict.diff``. Proposals come from
Argos Translate where it and its Korean package are installed (the optional extra ``translate``); else they are left
to be filled in. The network is never used: connections are refused while the translator runs, since it would fetch a
sentence splitter by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import importlib
import json
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backend import artifacts, console
from backend.errors import MissingInputError
from backend.training.data_processing.khairstyle import sniff
from backend.training.data_processing.labels import (
    ATTRIBUTE_FIELDS,
    LabelError,
    canonical_fields,
    clean_value,
    label_entries,
    parse_label_bytes,
    read_label_bytes,
)
from backend.training.data_processing.mapping import MAPPING_PATH, NUMERIC_FIELDS, read_tables, value_key

logger = logging.getLogger(__name__)

TODO = "TODO"
Translate = Callable[[str], str]


def label_records(folder: Path) -> Iterator[Any]:
    """Every readable label below ``folder``, of either layout; photos and broken labels are passed over."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(root, name)
            try:
                with open(path, "rb") as handle:
                    if sniff(handle.read(64)) != "label":
                        continue
                value = parse_label_bytes(read_label_bytes(path))
                entries = label_entries(value)
            except (OSError, LabelError) as error:
                logger.warning("%s passed over: %s", path, error)
                continue
            yield from [value] if entries is None else entries


def find_missing(records: Iterable[Any], mapping_path: Path = MAPPING_PATH) -> dict[str, Counter[str]]:
    """``{field: {raw value: count}}`` of values without an entry in the mapping file; numeric fields need none."""
    known = read_tables(mapping_path).fields
    missing: dict[str, Counter[str]] = {}
    for record in records:
        try:
            fields = canonical_fields(record)
        except LabelError:
            continue
        for name in ATTRIBUTE_FIELDS:
            value = clean_value(fields.get(name))
            if value is not None and name not in NUMERIC_FIELDS and value_key(value) not in known.get(name, {}):
                missing.setdefault(name, Counter())[value] += 1
    return missing


def propose(missing: Mapping[str, Counter[str]], translate: Translate | None) -> dict[str, dict[str, dict[str, Any]]]:
    """``{field: {raw: {"count", "en"}}}``, most frequent first; ``en`` is None where there is no translator or it
    failed."""
    return {
        field: {raw: {"count": count, "en": _translated(raw, translate)} for raw, count in missing[field].most_common()}
        for field in sorted(missing)
    }


def mapping_diff(proposal: Mapping[str, Mapping[str, Mapping[str, Any]]], mapping_path: Path = MAPPING_PATH) -> str:
    """Unified diff that adds the proposed entries to the mapping file and raises its version; '' where nothing is
    missing.

    An entry without a proposal reads TODO. Class tables are left alone: which class a new curl code is, a person
    decides.
    """
    before = mapping_path.read_text(encoding="utf-8")
    content = json.loads(before)
    changed = copy.deepcopy(content)
    for field, values in proposal.items():
        changed["fields"].setdefault(field, {}).update({raw: entry["en"] or TODO for raw, entry in values.items()})
    if changed == content:
        return ""
    changed["version"] += 1
    after = json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
    name = "backend/training/data_processing/mapping_dict.json"
    return "".join(difflib.unified_diff(before.splitlines(keepends=True), after.splitlines(keepends=True), f"a/{name}", f"b/{name}"))


def argos_translator() -> Translate | None:
    """Korean to English by an installed Argos Translate; None, with the reason logged, where there is none."""
    with no_network():
        try:
            argos = importlib.import_module("argostranslate.translate")
        except ImportError:
            logger.warning("Argos Translate is not installed (pip install 'deephair[translate]'): nothing is translated")
            return None
        languages = {language.code: language for language in argos.get_installed_languages()}
        translation = languages["ko"].get_translation(languages["en"]) if {"ko", "en"} <= languages.keys() else None
    if translation is None:
        logger.warning("Argos Translate has no Korean-English package (argospm install translate-ko_en)")
        return None
    return lambda text: str(translation.translate(text))


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    """Refuses every new connection and name look-up of this process meanwhile."""

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("auto_translate works without the network")

    names = ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"))
    kept = [(owner, name, getattr(owner, name)) for owner, name in names]
    try:
        for owner, name in names:
            setattr(owner, name, refuse)
        yield
    finally:
        for owner, name, original in kept:
            setattr(owner, name, original)


def _translated(raw: str, translate: Translate | None) -> str | None:
    if translate is None:
        return None
    with no_network():
        try:
            return translate(raw).strip().lower() or None
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # a package without its sentence splitter, or a broken model
            logger.warning("'%s' could not be translated: %s", raw, error)
            return None


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: LABELS --out FOLDER [--json]. Exit code 0 nothing missing, 3 proposals written."""
    parser = argparse.ArgumentParser(prog="auto_translate", description="propose entries that mapping_dict.json lacks")
    parser.add_argument("labels", type=Path, help="folder with labels of either layout")
    parser.add_argument("--out", type=Path, default=Path("mapping_proposal"), help="where missing.json and the diff go")
    parser.add_argument("--mapping", type=Path, default=MAPPING_PATH, help="mapping file to compare with")
    parser.add_argument("--json", action="store_true", help="print the proposal as JSON")
    arguments = parser.parse_args(argv)
    console.set_up_logging()
    return console.guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.labels.is_dir():
        raise MissingInputError(f"{arguments.labels} is not a folder", hint="give the folder that holds the labels")
    missing = find_missing(label_records(arguments.labels), arguments.mapping)
    proposal = propose(missing, argos_translator() if missing else None)
    if proposal:
        artifacts.write_json(arguments.out / "missing.json", proposal)
        artifacts.write_text(arguments.out / "mapping_dict.diff", mapping_diff(proposal, arguments.mapping))
        logger.info("%d values lack English; review %s", sum(map(len, proposal.values())), arguments.out)
    else:
        logger.info("every value has English")
    if arguments.json:
        sys.stdout.write(json.dumps(proposal, ensure_ascii=False, sort_keys=True) + "\n")
    return console.REJECTED_ITEMS if proposal else console.DONE


if __name__ == "__main__":
    sys.exit(main())
