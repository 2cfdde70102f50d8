"""From records of pairs to the figures of a report: means with intervals, gains over each baseline, slices (DESIGN 4.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backend.config import EvaluateConfig
from backend.training import metrics
from backend.training.pairs import Pair, picture_seed, slices_of


@dataclass(frozen=True)
class Figure:
    """One figure of a protocol. better: which way is better, +1 up, -1 down. form: how a report writes it."""

    name: str
    protocol: str
    title: str
    better: int
    form: str = ".3f"


FIGURES = (
    Figure("lpips", "reconstruction", "LPIPS, whole picture", -1),
    Figure("lpips_alex", "reconstruction", "LPIPS (AlexNet), whole picture", -1),
    Figure("masked_psnr", "reconstruction", "PSNR in the hair, dB", +1, ".2f"),
    Figure("psnr", "reconstruction", "PSNR, whole picture, dB", +1, ".2f"),
    Figure("ssim", "reconstruction", "SSIM, whole picture", +1),
    Figure("hair_color_delta_e", "transfer", "hair colour against the reference, CIEDE2000", -1, ".1f"),
    Figure("curl_agreement", "transfer", "curl class as in the reference, by Stage 1", +1, ".0%"),
    Figure("volume_agreement", "transfer", "volume class as in the reference, by Stage 1", +1, ".0%"),
    Figure("hair_length_error", "transfer", "hair length against the reference, face heights", -1, ".2f"),
    Figure("clip_i", "transfer", "CLIP-I of the hair", +1),
    Figure("dino_hair", "transfer", "DINOv2 similarity of the hair", +1),
    Figure("fid", "transfer", "FID", -1, ".2f"),
    Figure("fid_clip", "transfer", "FID_CLIP", -1, ".2f"),
    Figure("failure_rate", "transfer", "results without a face, or no picture", -1, ".1%"),
    Figure("psnr_non_hair", "preservation", "PSNR outside old and new hair, dB", +1, ".2f"),
    Figure("ssim_non_hair", "preservation", "SSIM outside old and new hair", +1),
    Figure("identity_similarity", "preservation", "identity similarity of target and result", +1),
    Figure("identity_kept", "preservation", "results more alike than 95 % of different people", +1, ".1%"),
)
BY_NAME = {figure.name: figure for figure in FIGURES}
GAINS = ("lpips", "masked_psnr", "hair_color_delta_e", "hair_length_error", "curl_agreement")


@dataclass(frozen=True)
class Record:
    """One pair and what was measured: {method: {figure: value}}. A figure that could not be measured is not there."""

    pair: Pair
    values: dict[str, dict[str, float]]


def summarise(records: Sequence[Record], settings: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """{method: {figure, figure_ci, figure_n where not all pairs count, figure_gain and its interval where ours is measured too}}."""
    methods = dict.fromkeys(method for record in records for method in record.values)
    found: dict[str, dict[str, Any]] = {}
    for method in methods:
        figures: dict[str, Any] = {}
        for name, figure in BY_NAME.items():
            figures |= mean(name, [(r.values[method][name], r.pair.head) for r in records if name in r.values.get(method, {})],
                            settings, of=len(records))  # fmt: skip
            if name in GAINS and method != "ours":
                sign = figure.better
                both = [r for r in records if name in r.values.get(method, {}) and name in r.values.get("ours", {})]
                gains = [(sign * (r.values["ours"][name] - r.values[method][name]), r.pair.head) for r in both]
                figures |= mean(f"{name}_gain", gains, settings, of=len(records))
        found[method] = figures
    return found


def mean(name: str, values: Sequence[tuple[float, str]], settings: EvaluateConfig, *, of: int) -> dict[str, Any]:
    """A mean with its interval from (value, head); nothing without a value, ``_n`` where fewer than ``of`` count."""
    if not values:
        return {}
    average, interval = metrics.mean_with_interval(
        [v for v, _ in values], [h for _, h in values], draws=settings.bootstrap, seed=settings.seed
    )
    counted = {f"{name}_n": len(values)} if len(values) != of else {}
    return {name: average, f"{name}_ci": interval, **counted}


def sliced(records: Sequence[Record], names: Sequence[str], settings: EvaluateConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """{slice: {value: {"pairs", "heads", figures of ours}}}: by curl, length, bangs, sex, yaw and pose gap, always with counts."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    kinds = [slices_of(record.pair) for record in records]
    for kind in kinds[0] if kinds else ():
        for value in sorted({one[kind] for one in kinds}):
            part = [record for record, one in zip(records, kinds, strict=True) if one[kind] == value]
            figures: dict[str, Any] = {"pairs": len(part), "heads": len({record.pair.head for record in part})}
            for name in names:
                values = [(r.values["ours"][name], r.pair.head) for r in part if name in r.values["ours"]]
                figures |= mean(name, values, settings, of=len(part))
            found.setdefault(kind, {})[value] = figures
    return found


def as_json(records: Sequence[Record], settings: EvaluateConfig) -> list[dict[str, Any]]:
    """The records for ``samples.json``: everything that the means are made of, and the seed that made each picture."""
    return [
        {
            "target": r.pair.target["id"],
            "reference": r.pair.reference["id"],
            "head": r.pair.head,
            "seed": picture_seed(r.pair, settings.seed),
            "slices": slices_of(r.pair),
            "figures": r.values,
        }
        for r in records
    ]
