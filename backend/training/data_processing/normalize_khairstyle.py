"""From what was downloaded (zips or unpacked trees of the mq, hq or raw edition) to the documented folders.

    python -m backend.training.data_processing.normalize_khairstyle DOWNLOADS... --out DATA [--dry-run]

    DATA/{training,validation}/{images,labels}/[0002.mqset/]<NNNN.basestyle>/<NNNN.SOURCE>/<file>

Files are told by content, not by name: a label under a photo's name becomes a .json, or is dropped where it repeats
its sibling. Korean names read as cp437 are repaired; per-source bundles inside an archive are ignored
(facts/khairstyle.md 1.2). Names that lead out of the folder, links, encrypted entries and archive bombs are refused.
A rerun compares and writes only what is missing or differs from what it wrote before.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import stat
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from backend import artifacts, console
from backend.errors import MissingInputError
from backend.training.data_processing.khairstyle import sniff
from backend.training.data_processing.names import nfc, printable, repaired

logger = logging.getLogger(__name__)

MAX_ENTRY_BYTES = 128 * 2**20  # a 4032 x 3024 JPEG has 3 to 12 MB
MAX_RATIO = 200  # photos do not shrink and labels shrink tenfold; bombs shrink a thousandfold
MAX_ENTRIES = 2_000_000
_NUMBERED = re.compile(r"\d{4}\..+", re.DOTALL)
_BUNDLE = re.compile(r"[A-Z]{2,4}\d{3,}[\w.]*\.zip")
_DRIVE = re.compile(r"[A-Za-z]:")
_NOISE = re.compile(r"^(\._.*|\.DS_Store|Thumbs\.db|desktop\.ini)$", re.IGNORECASE)
_PARTITION = re.compile(r"(?<![a-z])(?:(?P<training>train)|(?P<validation>val(?:id|(?![a-z]))))", re.IGNORECASE)


@dataclass(frozen=True)
class Member:
    """One file of the download: where it stands, its cleaned path, and how to read it (raises OSError or zipfile
    errors)."""

    origin: str
    parts: tuple[str, ...]
    size: int
    read: Callable[[int], bytes]  # up to so many bytes; -1 for all


@dataclass
class Report:
    """What was done with every file; ``inputs`` is the sum of the other counts."""

    written: int = 0
    unchanged: int = 0
    bytes_written: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # 'training/images' -> files written or unchanged
    duplicates: list[dict[str, str]] = field(default_factory=list)
    conflicts: list[dict[str, str]] = field(default_factory=list)
    ignored: list[dict[str, str]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    renamed: int = 0  # labels that carried a photo's name

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the lists are sorted by path."""
        lists = {
            name: sorted(getattr(self, name), key=lambda row: row["path"]) for name in ("duplicates", "conflicts", "ignored", "refused")
        }
        inputs = self.written + self.unchanged + sum(map(len, lists.values()))
        counts = {
            "inputs": inputs,
            "written": self.written,
            "unchanged": self.unchanged,
            "bytes_written": self.bytes_written,
        }
        return {**counts, "renamed": self.renamed, "kinds": dict(sorted(self.kinds.items())), **lists}


def normalize(sources: Sequence[Path], out: Path, *, partition: str = "training", dry_run: bool = False) -> dict[str, Any]:
    """Sorts every photo and label of ``sources`` into ``out`` and returns the report.

    ``partition`` is where files go whose path names neither training nor validation. Of two files for one place the
    first stays (labels under their own name before others): the same content counts as a duplicate, other content as
    a conflict. With ``dry_run`` nothing is written. Raises MissingInputError where a source is neither a folder nor
    an archive.
    """
    report = Report()
    placed: dict[str, tuple[int, int]] = {}
    for source in sources:
        for named_json in (True, False):  # twice through, so that a label under a photo's name is the duplicate
            with ExitStack() as open_files:
                for member in _members(source, open_files, report if named_json else Report()):
                    if member.parts[-1].lower().endswith(".json") == named_json:
                        _place(member, out, partition, placed, report, dry_run=dry_run)
    return report.as_dict()


# ---- what was downloaded ------------------------------------------------------------------------


def _members(source: Path, open_files: ExitStack, report: Report) -> Iterator[Member]:
    if source.is_dir():
        yield from _tree_members(source, open_files, report)
    elif source.is_file() and zipfile.is_zipfile(source):
        yield from _zip_members(source, (_partition_hint(source),), open_files, report)
    else:
        raise MissingInputError(f"{printable(source)} is neither a folder nor a zip archive", hint="give the downloaded files")


def _tree_members(root: Path, open_files: ExitStack, report: Report) -> Iterator[Member]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            above = (_partition_hint(root), *map(repaired, path.relative_to(root).parts[:-1]))
            if not path.is_file():
                _note(report.refused, path, "unreadable")
            elif _BUNDLE.fullmatch(name):
                _note(report.ignored, path, "per_source_bundle")
            elif name.lower().endswith(".zip") and zipfile.is_zipfile(path):
                yield from _zip_members(path, (*above, _partition_hint(path)), open_files, report)
            else:
                yield Member(printable(path), (*map(nfc, above), nfc(name)), path.stat().st_size, _file_reader(path))


def _zip_members(path: Path, above: tuple[str, ...], open_files: ExitStack, report: Report) -> Iterator[Member]:
    try:
        archive = open_files.enter_context(zipfile.ZipFile(path))
    except (OSError, zipfile.BadZipFile) as error:
        _note(report.refused, path, "bad_archive", str(error))
        return
    entries = archive.infolist()
    total = sum(info.file_size for info in entries if _problem(_entry_name(info), info) is None)
    if len(entries) > MAX_ENTRIES or total > MAX_RATIO * path.stat().st_size:  # the sum catches entries that overlap
        _note(report.refused, path, "archive_bomb", f"{len(entries)} entries unpack to {total} bytes")
        return
    for info in entries:
        if info.is_dir():
            continue
        name = _entry_name(info)
        origin = f"{printable(path)}!{printable(name)}"
        problem = _problem(name, info)
        if problem is not None:
            _note(report.refused, origin, *problem)
        elif name.lower().endswith(".zip"):
            _note(report.ignored, origin, "per_source_bundle")
        else:
            parts = tuple(nfc(part) for part in PurePosixPath(name).parts)
            yield Member(origin, (*above, *parts), info.file_size, _entry_reader(archive, info))


def _entry_name(info: zipfile.ZipInfo) -> str:
    """Its path with '/' between the parts; without the UTF-8 flag the name was read as cp437."""
    name = info.filename if info.flag_bits & 0x800 else repaired(info.filename, ("utf-8", "cp949"))
    return name.replace("\\", "/")


def _problem(name: str, info: zipfile.ZipInfo) -> tuple[str, str] | None:
    """Why an archive's entry is refused, as (reason, detail)."""
    if name.startswith("/") or _DRIVE.match(name) or ".." in name.split("/"):
        return "unsafe_name", "absolute, with '..', or with a drive"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "link", "a symbolic link"
    if info.flag_bits & 0x1:
        return "encrypted", "needs a password"
    if info.file_size > MAX_ENTRY_BYTES or info.file_size > MAX_RATIO * max(info.compress_size, 1024):
        return "archive_bomb", f"{info.compress_size} bytes unpack to {info.file_size}"
    return None


def _entry_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        with archive.open(info) as handle:  # never gives more than the declared size, and checks the CRC at the end
            return handle.read(size)

    return read


def _file_reader(path: Path) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        with path.open("rb") as handle:
            return handle.read(size)

    return read


def _partition_hint(path: Path) -> str:
    """An archive's or folder's own name, which often says 'train' or 'val'; it is no part of the place."""
    return f"<{nfc(path.name)}>"


# ---- where it goes --------------------------------------------------------------------------------


def _place(member: Member, out: Path, partition: str, placed: dict[str, tuple[int, int]], report: Report, *, dry_run: bool) -> None:
    """Sorts one file in, or notes why not."""
    name = member.parts[-1]
    if _NOISE.fullmatch(name):
        _note(report.ignored, member.origin, "system_file")
        return
    if member.size > MAX_ENTRY_BYTES:
        _note(report.refused, member.origin, "too_large", f"{member.size} bytes")
        return
    try:
        kind = sniff(member.read(64))
        if kind not in ("photo", "label"):
            _note(report.ignored, member.origin, "neither_photo_nor_label")
            return
        target = _target(member.parts, kind, partition)
        content = member.read(-1)
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        _note(report.refused, member.origin, "unreadable", str(error))
        return
    _store(member, content, target, out, placed, report, dry_run=dry_run)


def _store(
    member: Member,
    content: bytes,
    target: str,
    out: Path,
    placed: dict[str, tuple[int, int]],
    report: Report,
    *,
    dry_run: bool,
) -> None:
    key, mark = target.casefold(), (len(content), zlib.crc32(content))
    if key in placed:
        rows, reason = (report.duplicates, "same_content") if placed[key] == mark else (report.conflicts, "other_content")
        _note(rows, member.origin, reason, target)
        return
    placed[key] = mark
    report.kinds["/".join(target.split("/")[:2])] += 1
    report.renamed += target.rpartition("/")[2] != member.parts[-1]
    path = out / target
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        report.unchanged += 1
        return
    report.written += 1
    report.bytes_written += len(content)
    if not dry_run:
        _write(path, content)


def _write(path: Path, content: bytes) -> None:
    """Beside and renamed, without flushing each of 900,000 files: a rerun compares contents, so a torn one is written
    again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}{artifacts.TMP_SUFFIX}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _target(parts: tuple[str, ...], kind: str, partition: str) -> str:
    """'<partition>/<images|labels>/<numbered folders>/<name>', whatever wrapped it in the download."""
    for part in parts[:-1]:
        for match in _PARTITION.finditer(part):
            partition = match.lastgroup or partition  # the innermost mention counts
    folders = [repaired(part) for part in parts[:-1] if not part.startswith("<")]
    kept = [part for part in folders if _NUMBERED.fullmatch(part)]
    name = parts[-1]
    if kind == "label" and not name.lower().endswith(".json"):
        name = re.sub(r"-(\d{1,4})$", r"_\1", os.path.splitext(name)[0]) + ".json"
    return "/".join([partition, "images" if kind == "photo" else "labels", *kept, name])


def _note(rows: list[dict[str, str]], path: object, reason: str, detail: str = "") -> None:
    rows.append({"path": printable(path), "reason": reason, "detail": detail})


# ---- command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; exit code 0 done, 3 done with files refused or in conflict."""
    parser = argparse.ArgumentParser(prog="normalize_khairstyle", description="sort a K-Hairstyle download into folders")
    parser.add_argument("sources", type=Path, nargs="+", help="downloaded zips, or folders of zips or unpacked files")
    parser.add_argument("--out", type=Path, required=True, help="where training/ and validation/ go")
    parser.add_argument("--partition", choices=("training", "validation"), default="training", help="for paths that name none")
    parser.add_argument("--dry-run", action="store_true", help="report only")
    parser.add_argument("--report", type=Path, help="write the whole report as JSON")
    arguments = parser.parse_args(argv)
    console.set_up_logging()
    return console.guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    report = normalize(arguments.sources, arguments.out, partition=arguments.partition, dry_run=arguments.dry_run)
    if arguments.report:
        artifacts.write_json(arguments.report, report)
    summary = {name: len(value) if isinstance(value, list) else value for name, value in report.items()}
    sys.stdout.write(json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
    return console.REJECTED_ITEMS if report["refused"] or report["conflicts"] else console.DONE


if __name__ == "__main__":
    sys.exit(main())
