"""What Stage 0 did, for programs (report.json) and for people (report.html)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.config import Config
from backend.imaging.decode import read_png
from backend.training import html
from backend.training.data_processing.labels import REASONS
from backend.training.data_processing.split import SPLITS
from backend.training.prepare_photo import PHOTO_REASONS
from backend.training.prepared import join

SHOWN_FIELDS = ("basestyle", "length", "curl", "hair-width", "bang", "color", "sex")
SHOWN_PHOTOS = 60  # at most: a page of about 5 MB
SHOWN_PER_REASON = 40  # quarantined inputs listed on the page; all are in quarantine.jsonl
NOT_GIVEN = "not given"

Groups = dict[str, tuple[str, str]]  # photo id -> group, split


class Facts(NamedTuple):
    """What the report counts of one accepted photo, small enough to be held for half a million of them."""

    id: str
    curl: int | None
    volume: int | None
    phase: str | None
    view: str
    identity_valid: bool
    face_detected: bool
    patches: int
    values: tuple[str, ...]  # English, in the order of SHOWN_FIELDS


def facts(row: dict[str, Any]) -> Facts:
    """The facts of a row of metadata."""
    values = ((row["attributes"].get(name) or {}).get("en") or NOT_GIVEN for name in SHOWN_FIELDS)
    return Facts(
        id=row["id"],
        curl=row["curl"],
        volume=row["volume"],
        phase=row["phase"],
        view=_view(row["yaw"]),
        identity_valid=row["identity_valid"],
        face_detected=row["face_detected"],
        patches=len(row["patches"]),
        values=tuple(map(sys.intern, values)),
    )


def _view(yaw: float | None) -> str:
    if yaw is None:
        return NOT_GIVEN
    return "front" if abs(yaw) <= 30 else "side" if abs(yaw) <= 120 else "back"


def _filters(item: Facts, groups: Groups) -> dict[str, str]:
    """What a photo on the contact sheet can be filtered by."""
    own = {"split": groups[item.id][1], "view": item.view, "phase": item.phase or NOT_GIVEN}
    classes = {"curl class": item.curl, "volume class": item.volume}
    return own | {name: NOT_GIVEN if value is None else str(value) for name, value in classes.items()} | _fields(item)


def _fields(item: Facts) -> dict[str, str]:
    return dict(zip(SHOWN_FIELDS, item.values, strict=True))


def chosen(accepted: Sequence[Facts], groups: Groups) -> dict[str, dict[str, Any]]:
    """The ids of the contact sheet in order, to be given their rows: one for every value of every filter first, then evenly spread."""
    picked: dict[str, int] = {}
    met: set[tuple[str, str]] = set()
    for number, item in enumerate(accepted):
        if len(picked) == SHOWN_PHOTOS:
            break
        new = set(_filters(item, groups).items()) - met
        if new:
            met |= new
            picked[item.id] = number
    for spread in np.linspace(0, len(accepted) - 1, SHOWN_PHOTOS).round().astype(int):
        if len(picked) < SHOWN_PHOTOS:
            picked.setdefault(accepted[spread].id, int(spread))
    return {name: {} for name in sorted(picked, key=picked.__getitem__)}


def write(
    processed: Path,
    counts: dict[str, int],
    accepted: Sequence[Facts],
    groups: Groups,
    shown: list[dict[str, Any]],
    quarantine: list[dict[str, Any]],
    config: Config,
) -> None:
    """Writes both reports; their counts balance: accepted + quarantined = inputs. ``shown`` are the rows of the contact sheet."""
    reasons = Counter(row["reason"] for row in quarantine)
    splits = [groups[item.id][1] for item in accepted]
    report = {
        **counts,
        "heads": len({groups[item.id][0] for item in accepted}),
        "splits": {split: _totals([item for item, own in zip(accepted, splits, strict=True) if own == split], groups) for split in SPLITS},
        "attributes": {field: _values([item.values[number] for item in accepted]) for number, field in enumerate(SHOWN_FIELDS)},
        "attributes_by_split": {field: _table([i.values[n] for i in accepted], splits) for n, field in enumerate(SHOWN_FIELDS)},
        "classes": {
            "curl": _table([str(item.curl) for item in accepted], splits),
            "volume": _table([str(item.volume) for item in accepted], splits),
            "phase": _table([str(item.phase) for item in accepted], splits),
        },
        "identity_valid": sum(item.identity_valid for item in accepted),
        "faces_detected": sum(item.face_detected for item in accepted),
        "patches": sum(item.patches for item in accepted),
        "photos_without_patches": sum(not item.patches for item in accepted),
        "reasons": dict(sorted(reasons.items())),
        "config_digest": config.digest("data"),
    }
    artifacts.write_if_changed(processed / "report.json", json.dumps(report, ensure_ascii=False, indent=2, sort_keys=True) + "\n")
    by_id = {item.id: item for item in accepted}
    filters = [_filters(by_id[row["id"]], groups) for row in shown]
    artifacts.write_if_changed(processed / "report.html", _page(processed, report, shown, filters, quarantine))


def _totals(members: list[Facts], groups: Groups) -> dict[str, int]:
    return {
        "photos": len(members),
        "heads": len({groups[item.id][0] for item in members}),
        "patches": sum(item.patches for item in members),
    }


def _values(values: list[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _table(values: list[str], splits: list[str]) -> dict[str, dict[str, int]]:
    """How often each value stands in each split: {value: {split: photos}}, by value."""
    counts = Counter(zip(values, splits, strict=True))
    return {value: {split: counts[value, split] for split in SPLITS} for value in sorted(set(values))}


# ---- the page ----


def _page(
    processed: Path, report: dict[str, Any], shown: list[dict[str, Any]], filters: list[dict[str, str]], quarantine: list[dict[str, Any]]
) -> str:
    parts = [
        f'<div class="verdict good"><p><strong>{report["accepted"]}</strong> photos of {report["heads"]} heads accepted, '
        f"<strong>{report['quarantined']}</strong> of {report['inputs']} inputs quarantined.</p></div>",
        "<h2>Splits</h2><p>All photos of one head lie in one split.</p>",
        html.table(["split", "photos", "heads", "patches"], [[name, *row.values()] for name, row in report["splits"].items()]),
        f"<h2>Contact sheet</h2><p>{len(shown)} of {report['accepted']} photos, with every value of every filter among them where there is "
        "room. Photo, hair mask, hair taken out, hair alone, style picture and patches, as training sees them.</p>",
        _choosers("sheet", filters),
        '<div class="sheet">',
        *(_photo(processed, row, own, filters) for row, own in zip(shown, filters, strict=True)),
        "</div>",
        "<h2>Attributes by split</h2>",
    ]
    for field, values in {**report["attributes_by_split"], **report["classes"]}.items():
        rows = sorted(values.items(), key=lambda item: -sum(item[1].values()))
        parts.append(html.table([field, *SPLITS, "photos"], [[value, *of.values(), sum(of.values())] for value, of in rows]))
    parts += _quarantine(report["reasons"], quarantine)
    return html.page("Stage 0: prepared data", parts, lead="Counts that balance, attributes, and what the pictures look like.")


def _quarantine(reasons: dict[str, int], quarantine: list[dict[str, Any]]) -> list[str]:
    known = {**REASONS, **PHOTO_REASONS}
    listed: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for row in quarantine:
        counts[row["reason"]] += 1
        if counts[row["reason"]] <= SHOWN_PER_REASON:
            listed.append(row)
    filters = [{"reason": row["reason"]} for row in listed]
    lines = "".join(
        f"<tr{_marks(own, filters)}><td>{escape(row['reason'])}</td><td>{escape(row['path'])}</td><td>{escape(row['detail'])}</td></tr>"
        for row, own in zip(listed, filters, strict=True)
    )
    return [
        "<h2>Quarantine</h2>",
        html.table(["reason", "meaning", "inputs"], [[r, known.get(r, ""), n] for r, n in reasons.items()], numeric=False),
        f"<p>The first {SHOWN_PER_REASON} of each reason; all are in quarantine.jsonl.</p>",
        _choosers("rejects", filters),
        '<div class="scroll rejects"><table><thead><tr><th scope="col">reason</th><th scope="col">input</th><th scope="col">detail</th></tr>'
        f"</thead><tbody>{lines}</tbody></table></div>",
    ]


def _choosers(scope: str, filters: list[dict[str, str]]) -> str:
    """A drop-down list per filter, and the style rules that make them work: the page needs no script."""
    lists, rules = [], []
    for number, name in enumerate(filters[0] if filters else ()):
        values = _filter_values(filters, name)
        options = "".join(f'<option value="{n}">{escape(value)}</option>' for n, value in enumerate(values))
        lists.append(f'<label>{escape(name)} <select id="{scope}-{number}"><option value="">all</option>{options}</select></label>')
        rules += [
            f'main:has(#{scope}-{number} option[value="{n}"]:checked) .{scope} [data-f{number}]:not([data-f{number}="{n}"]){{display:none}}'
            for n in range(len(values))
        ]
    style = ".filters{display:flex;flex-wrap:wrap;gap:.5rem 1rem;margin:.6rem 0}" + "".join(rules)
    return f'<style>{style}</style><form class="filters" autocomplete="off">{"".join(lists)}<button type="reset">show all</button></form>'


def _filter_values(filters: list[dict[str, str]], name: str) -> list[str]:
    return sorted({own[name] for own in filters})


def _marks(own: dict[str, str], filters: list[dict[str, str]]) -> str:
    return "".join(f' data-f{number}="{_filter_values(filters, name).index(value)}"' for number, (name, value) in enumerate(own.items()))


def _photo(processed: Path, row: dict[str, Any], own: dict[str, str], filters: list[dict[str, str]]) -> str:
    bald, alone = read_png(processed / row["files"]["bald"]), read_png(processed / row["files"]["hair_only"])
    figures = [
        html.picture(_outlined(join(bald, alone), row), f"{row['id']} ({row['split']})"),
        html.picture(alone[..., 3], "hair mask"),
        html.picture(bald, "hair taken out"),
        html.picture(alone[..., :3], "hair alone"),
        html.picture(read_png(processed / row["files"]["style"]), "style picture"),
    ]
    for file in row["patches"][:: max(1, len(row["patches"]) // 2)][:2]:
        figures.append(html.picture(read_png(processed / file), f"curl {row['curl']}, volume {row['volume']}", side=128))
    return f'<div{_marks(own, filters)}>{html.row(figures)}<p class="soft">{escape(row["prompt"])}</p></div>'


def _outlined(photo: NDArray[np.uint8], row: dict[str, Any]) -> NDArray[np.uint8]:
    shown = photo.copy()
    if row["face_box"]:
        x0, y0, x1, y1 = (round(v) for v in row["face_box"])
        cv2.rectangle(shown, (x0, y0), (x1, y1), (90, 200, 120), max(1, shown.shape[0] // 128))
    return shown
