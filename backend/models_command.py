"""``deephair models list|download|verify``: the pretrained parts, as a person or a program asks for them (docs/models.md)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from backend import console, weights, weights_check, weights_fetch
from backend.config import Config


def show(config: Config, *, as_json: bool) -> int:
    """Lists every part: found, missing or wrong. Exit code 0 whatever is missing; it is a listing."""
    found = weights_check.rows(config.paths.weights, weights.needed(config))
    if as_json:
        console.print_result({"folder": str(config.paths.weights), "parts": found})
        return console.DONE
    for row in found:
        kind = "needed" if row["needed"] else "optional"
        sys.stdout.write(f"{row['state']:8} {kind:9} {row['name']:14} {row['folder']}  ({row['source']}; {row['licence']})\n")
        if row["state"] == "wrong":
            sys.stdout.write(f"{'':18} {row['detail']}\n")
    absent = [row for row in found if row["needed"] and row["state"] != "found"]
    if absent:
        size = sum(row["download_gb"] for row in absent)
        sys.stdout.write(f"{len(absent)} needed parts are not there: deephair models download (about {size:.1f} GB)\n")
    return console.DONE


def download(config: Config, names: Sequence[str], *, dry_run: bool, as_json: bool, endpoint: str | None = None) -> int:
    """Fetches the named parts, all that this configuration needs where none is named; ``all``: every part that can be fetched.

    Parts named are hashed first, so that damaged files are fetched anew. ``endpoint`` None is
    ``HF_ENDPOINT`` or the hub. Raises DeepHairError (offline, not reachable, wrong checksum).
    """
    folder = config.paths.weights
    if list(names) == ["all"]:
        chosen = [part.name for part in weights.PARTS if part.hub is not None]
    else:
        chosen = [weights.part(name).name for name in names] or weights.needed(config)
    files = [
        (part, name) for part, name in weights_fetch.to_fetch(folder, chosen, rehash=bool(names)) if name != part.lpips_heads
    ]  # the heads come out of an installed package
    if dry_run and files and weights_fetch.offline():
        return _offline_plan(files, as_json=as_json)
    wanted = weights_fetch.ask(folder, files, endpoint=endpoint)
    result: dict[str, Any] = {
        "folder": str(folder),
        "files": [
            {"part": file.part.name, "path": str(file.path), "url": file.url, "size": file.size, "to_fetch": file.size - file.here}
            for file in wanted
        ],
        "bytes": sum(file.size - file.here for file in wanted),
    }
    if not dry_run:
        from backend import artifacts

        with artifacts.folder_lock(folder):
            weights_fetch.fetch(folder, wanted)
            result["written"] = weights_fetch.write_lpips_heads(folder, chosen)
    if as_json:
        console.print_result(result)
        return console.DONE
    for file in wanted:
        sys.stdout.write(f"{file.part.name:14} {weights_fetch.gb(file.size):>9}  {file.path}  ({file.url}; {file.part.licence})\n")
    verb = "would be fetched" if dry_run else "fetched"
    sys.stdout.write(f"{len(wanted)} files, {weights_fetch.gb(result['bytes'])} {verb} into {folder}\n")
    return console.DONE


def _offline_plan(files: Sequence[tuple[weights.Part, str]], *, as_json: bool) -> int:
    """The plan where no connection may be made: the files, and their parts' rounded sizes."""
    parts = {part.name: part for part, _ in files}
    size = sum(part.gb for part in parts.values())
    if as_json:
        console.print_result({"files": [{"part": part.name, "file": name} for part, name in files], "about_gb": round(size, 3)})
        return console.DONE
    for part, name in files:
        sys.stdout.write(f"{part.name:14} {part.folder}/{name}\n")
    sys.stdout.write(
        f"{len(files)} files would be fetched, about {size:.1f} GB for the whole parts (offline: exact sizes were not asked for)\n"
    )
    return console.DONE


def verify(config: Config, names: Sequence[str], *, as_json: bool) -> int:
    """Reads every byte of the named parts (all that are there where none is named) and holds it against its digest.

    Exit code 1 where a part is wrong, or one of those named, or needed where none is named, is missing.
    """
    folder = config.paths.weights
    asked = [weights.part(name).name for name in names] or weights.needed(config)
    chosen = [part for part in weights.PARTS if part.name in asked or (not names and weights_check.files_of(folder, part))]
    progress = console.Progress("verify", max(1, sum(weights_check.files_of(folder, part) for part in chosen)), unit="files")
    record = weights_check.read_record(folder)
    seen = [weights_check.look(folder, part, record, each=progress.update) for part in chosen]
    bad = [look for look in seen if look.state == "wrong" or (look.state == "missing" and look.part.name in asked)]
    if as_json:
        console.print_result(
            {
                "folder": str(folder),
                "parts": [
                    {
                        "name": look.part.name,
                        "state": look.state,
                        "detail": look.detail,
                        "hashed": look.hashed,
                        "no_digest_known": look.unknown,
                    }
                    for look in seen
                ],
            }
        )
    else:
        for look in seen:
            note = look.detail or f"{len(look.hashed)} files hashed" + (
                f", no digest known for {len(look.unknown)}" if look.unknown else ""
            )
            sys.stdout.write(f"{look.state:8} {look.part.name:14} {note}\n")
        if bad:
            sys.stdout.write(f"to mend: deephair models download {' '.join(look.part.name for look in bad)}\n")
    return console.FAILED if bad else console.DONE
