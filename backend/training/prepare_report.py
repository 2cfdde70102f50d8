"""What Stage 0 did, for programs (report.json) and for people (report.html)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.config import Config
from backend.imaging.decode import read_png
from backend.training import html
from backend.training.data_processing.labels import REASONS
from backend.training.prepare_photo import PHOTO_REASONS
from backend.training.prepared import join

SHOWN_FIELDS = ("basestyle", "length", "curl", "hair-width", "bang", "color", "sex")
SHOWN_PHOTOS = 16


def write(
    processed: Path, counts: dict[str, int], accepted: list[dict[str, Any]], quarantine: list[dict[str, Any]], config: Config
) -> None:
    """Writes both reports; their counts balance: accepted + quarantined = inputs."""
    reasons = Counter(row["reason"] for row in quarantine)
    report = {
        **counts,
        "heads": len({row["group"] for row in accepted}),
        "splits": _by_split(accepted),
        "attributes": {field: _values(accepted, field) for field in SHOWN_FIELDS},
        "classes": {name: dict(sorted(Counter(str(row[name]) for row in accepted).items())) for name in ("curl", "volume", "phase")},
        "identity_valid": sum(row["identity_valid"] for row in accepted),
        "faces_detected": sum(row["face_detected"] for row in accepted),
        "patches": sum(len(row["patches"]) for row in accepted),
        "photos_without_patches": sum(not row["patches"] for row in accepted),
        "reasons": dict(sorted(reasons.items())),
        "config_digest": config.digest("data"),
    }
    artifacts.write_if_changed(processed / "report.json", json.dumps(report, ensure_ascii=False, indent=2, sort_keys=True) + "\n")
    artifacts.write_if_changed(processed / "report.html", _page(processed, report, accepted, quarantine))


def _by_split(accepted: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    return {
        split: {
            "photos": sum(row["split"] == split for row in accepted),
            "heads": len({row["group"] for row in accepted if row["split"] == split}),
            "patches": sum(len(row["patches"]) for row in accepted if row["split"] == split),
        }
        for split in ("train", "val", "test")
    }


def _values(accepted: list[dict[str, Any]], field: str) -> dict[str, int]:
    return dict(Counter((row["attributes"].get(field) or {}).get("en") or "not given" for row in accepted).most_common())


def _page(processed: Path, report: dict[str, Any], accepted: list[dict[str, Any]], quarantine: list[dict[str, Any]]) -> str:
    parts = [
        f'<div class="verdict good"><p><strong>{report["accepted"]}</strong> photos of {report["heads"]} heads accepted, '
        f"<strong>{report['quarantined']}</strong> of {report['inputs']} inputs quarantined.</p></div>",
        "<h2>Splits</h2><p>All photos of one head lie in one split.</p>",
        html.table(["split", "photos", "heads", "patches"], [[name, *row.values()] for name, row in report["splits"].items()]),
        "<h2>Contact sheet</h2><p>Photo, hair mask, hair taken out, hair alone, style picture and a patch, as training sees them.</p>",
    ]
    for number in np.unique(np.linspace(0, len(accepted) - 1, min(SHOWN_PHOTOS, len(accepted))).round().astype(int)):
        parts.append(_photo_row(processed, accepted[number]))
    parts.append("<h2>Attributes</h2>")
    for field, values in report["attributes"].items():
        parts.append(html.table([field, "photos"], list(values.items())))
    parts.append("<h2>Quarantine</h2>")
    known = {**REASONS, **PHOTO_REASONS}
    parts.append(
        html.table(["reason", "meaning", "inputs"], [[r, known.get(r, ""), n] for r, n in report["reasons"].items()], numeric=False)
    )
    parts.append(
        html.details("first 200 quarantined inputs", "\n".join(f"{q['reason']}: {q['path']} ({q['detail']})" for q in quarantine[:200]))
    )
    return html.page("Stage 0: prepared data", parts, lead="Counts that balance, attributes, and what the pictures look like.")


def _photo_row(processed: Path, row: dict[str, Any]) -> str:
    bald, alone = read_png(processed / row["files"]["bald"]), read_png(processed / row["files"]["hair_only"])
    photo = join(bald, alone)
    figures = [
        html.picture(_outlined(photo, row), f"{row['id']} ({row['split']})"),
        html.picture(alone[..., 3], "hair mask"),
        html.picture(bald, "hair taken out"),
        html.picture(alone[..., :3], "hair alone"),
        html.picture(read_png(processed / row["files"]["style"]), "style picture"),
    ]
    if row["patches"]:
        figures.append(html.picture(read_png(processed / row["patches"][0]), f"curl {row['curl']}, volume {row['volume']}"))
    return html.row(figures) + f'<p class="soft">{row["prompt"]}</p>'


def _outlined(photo: NDArray[np.uint8], row: dict[str, Any]) -> NDArray[np.uint8]:
    shown = photo.copy()
    if row["face_box"]:
        x0, y0, x1, y1 = (round(v) for v in row["face_box"])
        cv2.rectangle(shown, (x0, y0), (x1, y1), (90, 200, 120), max(1, shown.shape[0] // 128))
    return shown
