"""Whether the pretrained parts on disk are whole: a quick look at their form, or their bytes against a known digest.

``downloads.json`` beside the parts records what ``deephair models download`` put there: digest, size, repository, commit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backend import artifacts, weights
from backend.errors import InvalidArtifactError
from backend.weights import Part

State = Literal["found", "missing", "wrong"]
RECORD = "downloads.json"


@dataclass(frozen=True)
class Seen:
    """What a look at one part gave. ``faults`` says for each file what is wrong with it; ``hashed`` and ``unknown`` are files whose bytes were
    held against a digest, and files for which none is known (only where hashing was asked for)."""

    part: Part
    missing: tuple[str, ...]
    faults: dict[str, str]
    hashed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def state(self) -> State:
        """wrong before missing: a broken file is worse than none, since something may load it."""
        return "wrong" if self.faults else "missing" if self.missing else "found"

    @property
    def detail(self) -> str:
        """The state in words, empty where everything is there."""
        texts = [f"{name}: {fault}" for name, fault in self.faults.items()]
        if self.missing:
            shown = ", ".join(self.missing[:3]) + (", ..." if len(self.missing) > 3 else "")
            texts.append(f"{len(self.missing)} of {len(self.part.files)} files missing: {shown}")
        return "; ".join(texts)


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Entries of ``downloads.json`` by path below ``paths.weights``; empty where there is no record. Raises InvalidArtifactError."""
    path = folder / RECORD
    record: Any = artifacts.read_json(path) if path.is_file() else {}
    if not isinstance(record, dict) or not all(isinstance(entry, dict) for entry in record.values()):
        raise InvalidArtifactError(f"{path} is no record of downloads", hint="remove it; 'deephair models download' writes a new one")
    return record


def look(folder: Path, part: Part, record: dict[str, dict[str, Any]] | None = None, *, each: Callable[[], object] | None = None) -> Seen:
    """Looks at one part below ``folder`` (``paths.weights``): files there, sizes as recorded, safetensors and JSON whole in their form.

    With ``each`` every byte is read too, and held against the recorded digest, or against the published one where the file was not
    fetched by us and no card says that it is a miniature; ``each`` is called after each file.
    """
    record = read_record(folder) if record is None else record
    missing, faults, hashed, unknown = [], {}, [], []
    own = bool(weights.cards_of(folder, part))
    for name in (*part.files, *part.extras):
        path = folder / part.folder / name
        if not path.is_file():
            if name in part.files:
                missing.append(name)
            continue
        entry = record.get(f"{part.folder}/{name}", {})
        fault = _form_fault(path, entry.get("size"))
        if each is not None and not fault:
            published = part.hub.sha256.get(name, "") if part.hub is not None and not own else ""
            expected = str(entry.get("sha256") or published)
            if expected:
                found = artifacts.sha256_file(path)
                hashed.append(name)
                fault = "" if found == expected else f"its sha256 is {found}, expected {expected}"
            else:
                unknown.append(name)
        if each is not None:
            each()
        if fault:
            faults[name] = fault
    return Seen(part, tuple(missing), faults, tuple(hashed), tuple(unknown))


def files_of(folder: Path, part: Part) -> int:
    """How many files of this part are there, those included that nothing asks for."""
    return sum((folder / part.folder / name).is_file() for name in (*part.files, *part.extras))


def rows(folder: Path, needed: list[str]) -> list[dict[str, Any]]:
    """One row per part for ``deephair models list``: name, state (found, missing, wrong), needed, detail, where, source, licence, verbs."""
    record = read_record(folder)
    listed = []
    for part in weights.PARTS:
        seen = look(folder, part, record)
        listed.append(
            {
                "name": part.name,
                "state": seen.state,
                "needed": part.name in needed,
                "detail": seen.detail,
                "folder": str(folder / part.folder),
                "source": part.source,
                "licence": part.licence,
                "verbs": list(part.verbs),
                "download_gb": part.gb,
                "revision": part.hub.revision if part.hub is not None else None,
                "by_hand": part.by_hand,
            }
        )
    return listed


def _form_fault(path: Path, recorded: int | None) -> str:
    """What can be said against a file without reading its tensors; empty where nothing can."""
    size = path.stat().st_size
    if size == 0:
        return "the file is empty"
    if recorded is not None and size != recorded:
        return f"it has {size:,} bytes, {recorded:,} were fetched"
    if path.suffix == ".safetensors":
        try:
            artifacts.read_header(path)  # which also holds the length that the header promises against the file's
        except InvalidArtifactError:
            return "it is not a whole safetensors file (truncated, or of another format)"
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return "it is not JSON"
    return ""
