"""Which heads are trained on and which are judged on (DESIGN 4.1; facts/khairstyle.md section 4, recommended split).

The authors' split leaks: 400 of 4,347 sources stand on both sides. Here all photos of one head share a *group*, and a
group lies wholly in one split.

Groups. The same client is sometimes filed as two sources (A/B styling), at most 16 apart in the running folder index.
Neighbours by index alone would not do: the index runs over all sources, so they chain into one group per prefix. Two
sources are therefore merged only where prefix and sex agree, ages differ by at most a year and the index by at most
16; an unknown sex or age agrees with any, an unknown index with none. Merging chains, up to a span of 64 indices.
Simulated on 4,347 sources with the real shares of sex, one prefix after the other (the worst case), and ages spread
widely or narrowly (their real shares are not published): 2,093 or 1,172 groups, the largest of 30 or 43 sources;
without the span the largest had 44 or 313.

Splits. A group's split is a hash of its name, so photos or heads that are added move no other group, but for two
cases: a new source can merge two groups, and the floor below can be met by another group. The floor: the first of
train, val, test up to the number of groups are not empty, and a basestyle of which a split should get at least one
group gets one there. A plain hash leaves a tenth of the small basestyles without a head to judge; the floor moves at
most one group per basestyle and split.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.errors import UsageError
from backend.training.data_processing.mapping import value_key

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
NEIGHBOUR_GAP = 16  # folder indices
AGE_TOLERANCE = 1  # years: a birthday may lie between two visits
MAX_SPAN = 64  # folder indices within one group
_LOOK_BACK = 64  # sources compared with each; at most 16 stand that near in the released set


@dataclass(frozen=True)
class SplitRecord:
    """What the split needs to know of one photo; None where unknown."""

    id: str
    source: str
    prefix: str
    folder_index: int | None
    basestyle: str | None
    sex: str | None = None
    age: str | None = None


@dataclass
class _Source:
    name: str
    prefix: str
    index: int | None
    basestyle: str
    sex: str | None
    age: float | None


def split_record(line: Mapping[str, Any]) -> SplitRecord:
    """The split's view of a line of metadata.jsonl; sex and age come from the raw values of its ``attributes``."""
    attributes = line.get("attributes") or {}
    sex, age = ((attributes.get(name) or {}).get("raw") for name in ("sex", "age"))
    return SplitRecord(line["id"], line["source"], line.get("prefix") or "", line.get("folder_index"), line.get("basestyle"), sex, age)


def assign_splits(
    records: Iterable[SplitRecord | Mapping[str, Any]], *, seed: int, fractions: Sequence[float] = (0.8, 0.1, 0.1)
) -> dict[str, tuple[str, str]]:
    """``{photo id: (group, split)}``; the order of ``records`` (or lines of metadata.jsonl) does not matter.

    A group is named after its source with the lowest folder index. ``fractions`` are of train, val and test. Raises
    UsageError.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise UsageError(f"split fractions {tuple(fractions)} are not three shares that sum to 1", hint="for example 0.8, 0.1, 0.1")
    converted = (item if isinstance(item, SplitRecord) else split_record(item) for item in records)
    photos = sorted(converted, key=lambda record: record.id)
    sources = _sources(photos)
    group_of = _groups(sources)
    strata = {name: sources[name].basestyle for name in set(group_of.values())}
    splits = {name: _drawn(name, seed, fractions) for name in strata}
    by_style: dict[str, list[str]] = defaultdict(list)
    for name in sorted(strata):
        by_style[strata[name]].append(name)
    for names in by_style.values():
        _fill(
            splits,
            names,
            [split for split, share in zip(SPLITS, fractions, strict=True) if share * len(names) >= 1],
            seed,
        )
    wanted = [split for split, share in zip(SPLITS, fractions, strict=True) if share > 0][: len(splits)]
    _fill(splits, sorted(splits), wanted, seed)
    logger.info(
        "%d photos of %d sources in %d groups: %s",
        len(photos),
        len(sources),
        len(splits),
        dict(Counter(splits.values())),
    )
    return {photo.id: (group_of[photo.source], splits[group_of[photo.source]]) for photo in photos}


# ---- groups ------------------------------------------------------------


def _sources(photos: Sequence[SplitRecord]) -> dict[str, _Source]:
    """One record per source; of its photos the first with a value counts."""
    sources: dict[str, _Source] = {}
    for photo in photos:
        source = sources.setdefault(photo.source, _Source(photo.source, photo.prefix.upper(), None, "", None, None))
        source.index = photo.folder_index if source.index is None else source.index
        source.basestyle = source.basestyle or value_key(photo.basestyle or "")
        source.sex = source.sex or value_key(photo.sex or "") or None
        source.age = _years(photo.age) if source.age is None else source.age
    return sources


def _years(age: str | None) -> float | None:
    try:
        years = float(age or "")
    except ValueError:
        return None
    return years if math.isfinite(years) and years > 0 else None


def _groups(sources: dict[str, _Source]) -> dict[str, str]:
    """``{source: group}`` by union-find over neighbours in index order."""
    parent = {name: name for name in sources}
    span = {name: (source.index or 0, source.index or 0) for name, source in sources.items()}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for earlier, later in _neighbours(sources):
        one, other = sorted((root(earlier), root(later)), key=lambda name: (span[name][0], sources[name].index or 0, name))
        low, high = min(span[one][0], span[other][0]), max(span[one][1], span[other][1])
        if one != other and high - low <= MAX_SPAN:
            parent[other] = one
            span[one] = (low, high)
    return {name: root(name) for name in sources}


def _neighbours(sources: dict[str, _Source]) -> Iterable[tuple[str, str]]:
    ordered = sorted((source.prefix, source.index, source.name) for source in sources.values() if source.index is not None)
    for number, (prefix, index, name) in enumerate(ordered):
        for other_prefix, other_index, other in reversed(ordered[max(0, number - _LOOK_BACK) : number]):
            if other_prefix != prefix or index - other_index > NEIGHBOUR_GAP:
                break
            if _may_be_one_client(sources[name], sources[other]):
                yield other, name


def _may_be_one_client(one: _Source, other: _Source) -> bool:
    if one.sex and other.sex and one.sex != other.sex:
        return False
    return one.age is None or other.age is None or abs(one.age - other.age) <= AGE_TOLERANCE


# ---- splits ------------------------------------------------------------


def _drawn(group: str, seed: int, fractions: Sequence[float]) -> str:
    """The split that the group's hash falls into."""
    position = _hash(f"{seed}:{group}") / 2**64
    if position < fractions[0]:
        return "train"
    return "val" if position < fractions[0] + fractions[1] else "test"


def _fill(splits: dict[str, str], names: Sequence[str], wanted: Sequence[str], seed: int) -> None:
    """Gives each wanted split that has none of ``names`` one of them, taken from where most are, chosen by hash."""
    for split in wanted:
        counts = Counter(splits[name] for name in names)
        donors = [name for name in SPLITS if counts[name] > (name in wanted)]  # a wanted split keeps its last one
        if counts[split] or not donors:
            continue
        donor = max(donors, key=lambda name: (counts[name], -SPLITS.index(name)))
        chosen = min((name for name in names if splits[name] == donor), key=lambda name: (_hash(f"{seed}:{split}:{name}"), name))
        splits[chosen] = split


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
