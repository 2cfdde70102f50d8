"""Which photo gets whose hair: the evaluation's protocols, drawn by seed, checked and stored (facts of peers, section 3).

Reconstruction: target and reference are two photos of one head with one hairstyle, so the target's own photo is the truth. Transfer:
the reference is of another head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend import artifacts
from backend.config import EvaluateConfig
from backend.errors import InvalidArtifactError, MissingInputError
from backend.training.keyed import key, numpy_generator
from backend.training.prepared import reference_candidates
from backend.tryon.values import SEEDS

Row = dict[str, Any]
FRONTAL = 60.0  # degrees of yaw: what serving accepts as a target
POSE_GAPS = ((15.0, "easy"), (30.0, "medium"))  # degrees between the yaws of target and reference; beyond: hard


@dataclass(frozen=True)
class Protocol:
    """How pairs are drawn and measured. side: pictures are brought to it before they are measured, None: their own.

    samples: pairs of each kind, None: as many as the configuration asks for. published: what its authors report for their own model.
    """

    name: str
    samples: int | None = None
    max_yaw: float = FRONTAL
    both_faces: bool = False
    side: int | None = None
    source: str = ""
    published: dict[str, float] = field(default_factory=dict)


PROTOCOLS = {
    "standard": Protocol("standard"),
    "hairfusion": Protocol(
        "hairfusion",
        samples=2000,
        max_yaw=30.0,
        both_faces=True,
        side=512,
        source="HairFusion (AAAI 2025), K-Hairstyle, unaligned: 2,000 random test pairs, |yaw| <= 30, whole pictures at 512 px",
        published={"fid": 10.82, "ssim": 0.70, "psnr": 21.15, "lpips": 0.18},
    ),
}


@dataclass(frozen=True)
class Pair:
    """Rows of metadata: whose photo is changed, and whose hair it gets."""

    target: Row
    reference: Row

    @property
    def head(self) -> str:
        """Whose head is changed: what the intervals resample."""
        return str(self.target["group"])


def picture_seed(pair: Pair, seed: int) -> int:
    """The seed of a pair's pictures, one that a try-on takes: whoever gives it to the app gets the noise of the report's picture."""
    return key(seed, "picture/" + str(pair.target["id"])) % SEEDS


@dataclass(frozen=True)
class PairSet:
    """The pairs of one evaluation. ``shuffled`` and ``reconstruction_shuffled`` run parallel to the pairs they are held against."""

    transfer: list[Pair]
    shuffled: list[Pair]
    reconstruction: list[Pair]
    reconstruction_shuffled: list[Pair]


def draw(rows: list[Row], settings: EvaluateConfig) -> PairSet:
    """All pairs of an evaluation by its seed. Raises MissingInputError when the split has too few heads to form a pair."""
    protocol = PROTOCOLS[settings.protocol]
    transfer = transfer_pairs(rows, protocol.samples or settings.samples, settings.seed, protocol)
    same = reconstruction_pairs(rows, protocol.samples or settings.samples_reconstruction, settings.seed, protocol)
    if not transfer or not same:
        raise MissingInputError(
            f"the {settings.split} split has {len(rows)} photos of {len({row['group'] for row in rows})} heads: too few for pairs",
            hint="prepare more photos, or choose evaluate.split=val",
        )
    return _checked(PairSet(transfer, shuffled(transfer, settings.seed), same, _other_heads(same, rows, settings.seed, protocol)))


def usable(rows: Sequence[Row], max_yaw: float = FRONTAL) -> list[Row]:
    """Rows whose head serving would accept: a face box and not seen from the side or behind."""
    return [row for row in rows if row["face_box"] and (row["yaw"] is None or abs(row["yaw"]) <= max_yaw)]


def reconstruction_pairs(rows: list[Row], count: int, seed: int, protocol: Protocol = PROTOCOLS["standard"]) -> list[Pair]:
    """Up to ``count`` (target, other photo of the same source and phase), drawn by seed, spread over heads."""
    fitting = _references(rows, protocol)
    others = reference_candidates(rows)
    index = {row["id"]: number for number, row in enumerate(rows)}
    pairs = []
    for row in _spread(usable(rows, protocol.max_yaw), count, seed, "reconstruction"):
        candidates = [rows[k] for k in others[index[row["id"]]] if rows[k]["id"] in fitting and rows[k]["sha256"] != row["sha256"]]
        if candidates:
            pick = numpy_generator(seed, "reconstruction/" + row["id"]).integers(len(candidates))
            pairs.append(Pair(row, candidates[int(pick)]))
    return pairs[:count]


def transfer_pairs(rows: list[Row], count: int, seed: int, protocol: Protocol = PROTOCOLS["standard"]) -> list[Pair]:
    """Up to ``count`` (target, photo of another head); a target comes again with another reference when photos are few."""
    fitting = _references(rows, protocol)
    targets = _spread(usable(rows, protocol.max_yaw), count, seed, "transfer")
    pairs: list[Pair] = []
    for lap in range(count):
        for row in targets:
            others = [other for other in rows if other["group"] != row["group"] and other["id"] in fitting]
            if len(pairs) == count or not others:
                return pairs
            pick = numpy_generator(seed, "transfer/" + row["id"], lap).integers(len(others))
            pairs.append(Pair(row, others[int(pick)]))
    return pairs


def shuffled(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Every target with the reference of another pair whose reference is of another head than its own, where there is one."""
    order = numpy_generator(seed, "shuffle").permutation(len(pairs))
    place = {int(number): rank for rank, number in enumerate(order)}
    found = []
    for number, pair in enumerate(pairs):
        later = (pairs[int(order[(place[number] + shift) % len(pairs)])].reference for shift in range(1, len(pairs)))
        fitting = (row for row in later if row["group"] not in (pair.reference["group"], pair.target["group"]))
        found.append(Pair(pair.target, next(fitting, pair.reference)))
    return found


def _other_heads(pairs: Sequence[Pair], rows: list[Row], seed: int, protocol: Protocol) -> list[Pair]:
    """Every target with a photo of another head: what a reconstruction owes to the right reference shows against it."""
    fitting = _references(rows, protocol)
    found = []
    for pair in pairs:
        others = [row for row in rows if row["group"] != pair.target["group"] and row["id"] in fitting]
        pick = numpy_generator(seed, "other_head/" + pair.target["id"]).integers(len(others)) if others else 0
        found.append(Pair(pair.target, others[int(pick)] if others else pair.reference))
    return found


def _references(rows: Sequence[Row], protocol: Protocol) -> set[str]:
    return {row["id"] for row in (usable(rows, protocol.max_yaw) if protocol.both_faces else rows)}


def _spread(rows: list[Row], count: int, seed: int, purpose: str) -> list[Row]:
    """Rows in an order that takes one photo of every head before a second of any."""
    order = numpy_generator(seed, "spread/" + purpose).permutation(len(rows))
    seen: dict[str, int] = {}
    ranked: list[tuple[int, int, Row]] = []
    for number in order:
        row = rows[int(number)]
        seen[row["group"]] = seen.get(row["group"], 0) + 1
        ranked.append((seen[row["group"]], len(ranked), row))
    return [row for _, _, row in sorted(ranked, key=lambda item: item[:2])][: max(count, 1) * 4]


def _checked(pairs: PairSet) -> PairSet:
    """Refuses pairs that give the answer away (the target as its own reference, a transfer within one head) and baselines of other targets."""
    for pair in (*pairs.transfer, *pairs.reconstruction):
        if pair.target["id"] == pair.reference["id"] or pair.target["sha256"] == pair.reference["sha256"]:
            raise InvalidArtifactError(f"the pair {pair.target['id']} / {pair.reference['id']} has the target itself as its reference")
    for pair in pairs.transfer:
        if pair.target["group"] == pair.reference["group"]:
            raise InvalidArtifactError(f"the transfer pair {pair.target['id']} / {pair.reference['id']} is of one head")
    for pair in pairs.reconstruction:
        if (pair.target["source"], pair.target["phase"]) != (pair.reference["source"], pair.reference["phase"]):
            raise InvalidArtifactError(f"the reconstruction pair {pair.target['id']} / {pair.reference['id']} is not of one hairstyle")
    for kind, own, other in (
        ("shuffled", pairs.transfer, pairs.shuffled),
        ("reconstruction_shuffled", pairs.reconstruction, pairs.reconstruction_shuffled),
    ):
        if [pair.target["id"] for pair in own] != [pair.target["id"] for pair in other]:
            raise InvalidArtifactError(f"the targets of '{kind}' are not those of the pairs that they are held against")
    return pairs


# ---- slices ----


def pose_gap(pair: Pair) -> str:
    """How far the two heads are turned apart: easy to 15 degrees of yaw, medium to 30, hard beyond; unknown where a yaw is."""
    ours, theirs = pair.target["yaw"], pair.reference["yaw"]
    if ours is None or theirs is None:
        return "unknown"
    return next((name for limit, name in POSE_GAPS if abs(ours - theirs) <= limit), "hard")


def slices_of(pair: Pair) -> dict[str, str]:
    """What a pair is sorted by in the report: the reference's curl, length and bangs, the target's sex and yaw, and the pose gap."""
    yaw = pair.target["yaw"]
    turned = "unknown" if yaw is None else f"{15 * int(abs(yaw) // 15)} to {15 * int(abs(yaw) // 15) + 15} degrees"
    curl = pair.reference["curl"]
    return {
        "curl": "unknown" if curl is None else str(curl),
        "length": _said(pair.reference, "length"),
        "bangs": _said(pair.reference, "bang"),
        "sex": _said(pair.target, "sex"),
        "yaw": turned,
        "pose": pose_gap(pair),
    }


def _said(row: Row, name: str) -> str:
    value = row["attributes"].get(name) or {}
    return str(value.get("en") or value.get("raw") or "unknown")


# ---- storing ----

_KINDS = ("transfer", "shuffled", "reconstruction", "reconstruction_shuffled")


def stored(pairs: PairSet, settings: EvaluateConfig, data_digest: str) -> dict[str, Any]:
    """The pairs as JSON, from which ``read`` makes the same ones."""
    ids = {kind: [[pair.target["id"], pair.reference["id"]] for pair in getattr(pairs, kind)] for kind in _KINDS}
    return {
        "format": 1, "protocol": settings.protocol, "split": settings.split, "seed": settings.seed, "data_digest": data_digest, **ids
    }  # fmt: skip


def read(path: Path, rows: Sequence[Row], protocol: str = "standard") -> PairSet:
    """Stored pairs on the present data. Raises InvalidArtifactError when the file is none, names photos that the split lacks, or holds
    pairs of another protocol than ``protocol``, whose figures would be shown as that protocol's.
    """
    content = artifacts.read_json(path)
    known = {row["id"]: row for row in rows}
    try:
        found = PairSet(**{kind: [Pair(known[target], known[reference]) for target, reference in content[kind]] for kind in _KINDS})
    except KeyError as error:
        raise InvalidArtifactError(
            f"{path} names {error}, which the evaluated split does not have",
            hint="the pairs were drawn from other data; leave out evaluate.pairs",
        ) from error
    except (TypeError, ValueError) as error:
        raise InvalidArtifactError(f"{path} holds no stored pairs: {error}") from error
    if content.get("protocol") != protocol:
        raise InvalidArtifactError(
            f"{path} holds pairs of the protocol '{content.get('protocol')}', asked for is '{protocol}'",
            hint=f"leave out evaluate.pairs, or set evaluate.protocol={content.get('protocol')}",
        )
    whole = len(found.transfer) == len(found.shuffled) > 0 and len(found.reconstruction) == len(found.reconstruction_shuffled) > 0
    if not whole:
        raise InvalidArtifactError(f"{path} does not hold as many shuffled references as pairs, or no pair at all")
    return _checked(found)
