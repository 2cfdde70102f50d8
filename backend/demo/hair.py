"""How hair grows: guide strands walk over the head under combing and gravity, and every guide carries a lock of strands.

The strand's path is bent by its curl class: 0 nearly straight, 1 long flat waves, 2 open helices, 3 small coils.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .body import BodySurface, body_surface
from .camera import Array
from .head import HeadSurface, head_surface, scalp_margin
from .traits import Hairstyle, Identity

STEP = 0.09
STANDOFF = (0.045, 0.13, 0.27)
WAVELENGTH = (2.4, 1.4, 0.58, 0.24)
AMPLITUDE = (0.008, 0.21, 0.155, 0.075)
STANDS_OFF = (0.9, 1.0, 1.2, 1.45)  # the tighter the curl, the further the mass of hair stands off the head
CLUMPS = (0, 70, 110, 330)
"""How many clumps wave in step, over the whole head. A curl is drawn large, so that it can be seen at the miniature's 128 pixels."""
SHORT_WAVE = (1.0, 0.44, 0.6, 0.8)  # short hair shows its curl over fewer centimetres
_TIE = np.array([0.0, 0.02, -1.10], np.float32)


@dataclass(frozen=True)
class Strands:
    """The strands of one head, N of them with P points each.

    points (N, P, 3) person coordinates; arc (N, P) head units from the root; layer (N,) 0 inner .. 1 outer; shade (N,) brightness
    about 1; relief (N, P) -1..1 how far the curl lifts the strand out of the mass; accent (N,) whether the strand takes the tip
    or highlight colour; tips (N,) its whole length.
    """

    points: Array
    arc: Array
    layer: Array
    shade: Array
    relief: Array
    accent: NDArray[np.bool_]
    tips: Array


@dataclass
class _Guides:
    """Working state of the growth, one row per guide."""

    root: Array
    comb: Array
    hold: Array
    length: Array
    end: Array
    standoff: Array
    side: Array
    bang: NDArray[np.bool_]
    layer: Array


@lru_cache(maxsize=4)
def grow(who: Identity, style: Hairstyle, garment: str, seed: int, detail: float) -> Strands:
    """Grow one head of hair; `detail` 1.0 suits a 512 px frame. Kept for the other views of the same head."""
    rng = np.random.default_rng([0x4A1B, seed])
    head = head_surface(who)
    guides = _plant(who, style, head, rng)
    paths, lengths = _walk(guides, style, head, body_surface(who, garment), who)
    return _locks(paths, lengths, guides, style, rng, detail)


def _plant(who: Identity, style: Hairstyle, head: HeadSurface, rng: np.random.Generator) -> _Guides:
    """Spread roots evenly over the scalp (Fibonacci sphere) and decide how each is combed and how long it gets."""
    count = 1700
    k = np.arange(count) + 0.5
    y = 1 - 2 * k / count
    turn = np.pi * (1 + 5**0.5) * k
    flat = np.sqrt(1 - y * y)
    root = np.stack([flat * np.sin(turn), y, flat * np.cos(turn)], axis=1) + rng.normal(0, 0.012, (count, 3))
    root = (root / np.linalg.norm(root, axis=1, keepdims=True)).astype(np.float32)
    margin = scalp_margin(who, root)
    root, margin = root[margin > 0.5], margin[margin > 0.5]
    n = len(root)
    lon = np.degrees(np.arctan2(root[:, 0], root[:, 2]))
    part = (style.parting - 5) / 5 * 0.55 if style.parting else 0.0
    side = np.where(root[:, 0] + rng.normal(0, 0.015, n) >= part, 1.0, -1.0).astype(np.float32)
    bang = (np.abs(lon) < 47) & (margin < 24) & (style.bangs != "none") & (not style.tied or style.bangs != "side_swept")
    layer = rng.random(n).astype(np.float32)
    length, end = _lengths(style, root, bang, rng)
    standoff = STANDOFF[style.volume] * STANDS_OFF[style.curl] * (0.22 + 0.78 * layer)
    standoff = np.where(bang, np.minimum(standoff, 0.05 + 0.05 * layer), standoff)
    comb, hold = _combing(style, root, side, bang, rng)
    keep = np.ones(n, bool)
    if style.bangs == "see_through":
        comb_gap = np.sin(lon * 0.42 + rng.uniform(0, 6)) > 0.35
        keep = ~bang | comb_gap
    rooted = root * head.radius_at(root)[:, None]
    return _Guides(
        rooted[keep],
        comb[keep],
        hold[keep],
        length[keep],
        end[keep],
        standoff[keep].astype(np.float32),
        side[keep],
        bang[keep],
        layer[keep],
    )


def _lengths(style: Hairstyle, root: Array, bang: NDArray[np.bool_], rng: np.random.Generator) -> tuple[Array, Array]:
    """Arc length limit and lowest height of each guide."""
    n = len(root)
    high = np.clip((root[:, 1] - 0.25) / 0.5, 0, 1)
    if style.length == "men":
        sides = 0.10 if style.undercut else 0.34
        length = (sides + (0.85 - sides) * high) * rng.uniform(0.85, 1.1, n)
    elif style.length == "women_short":
        length = (0.62 + 0.50 * high) * rng.uniform(0.88, 1.08, n)
    else:
        length = np.full(n, 5.2)
    end = style.end_height + rng.normal(0, 0.07 if style.length == "bob" else 0.16, n)
    brow = {"full": 0.13, "see_through": 0.10, "side_swept": 0.05, "choppy": 0.36}.get(style.bangs, 0.1)
    ragged = 0.075 if style.bangs == "choppy" else 0.03
    end = np.where(bang, brow + rng.normal(0, ragged, n), end)
    length = np.where(bang, 1.15, length)
    return length.astype(np.float32), end.astype(np.float32)


def _combing(style: Hairstyle, root: Array, side: Array, bang: NDArray[np.bool_], rng: np.random.Generator) -> tuple[Array, Array]:
    """Direction that each root is combed to, and over how long an arc the combing holds against gravity."""
    n = len(root)
    crown = np.array([0.05, 0.86, -0.5], np.float32)
    whorl = root - crown
    whorl /= np.maximum(np.linalg.norm(whorl, axis=1, keepdims=True), 0.05)
    apart = np.stack([side, np.full(n, 0.1), np.where(root[:, 2] > 0.2, -0.35, -0.1)], axis=1)
    back = np.clip((0.15 - root[:, 2]) / 0.6, 0, 1)[:, None]
    swept = np.stack([0.35 * side, np.full(n, 0.75), np.full(n, -0.9)], axis=1)
    if style.parting:
        comb = apart * (1 - back) + whorl * back
        # the front hairline is lifted before it falls aside, or it would cross the forehead
        hairline = np.clip((root[:, 2] - 0.45) / 0.2, 0, 1)[:, None]
        comb = comb + hairline * np.array([0, 0.55, -0.75])
    elif style.bangs == "none":
        comb = swept * (1 - back) + whorl * back
    else:
        comb = whorl
    if style.length not in ("men", "women_short"):
        # long hair over a fringe parts to the sides behind it
        ahead = np.clip((root[:, 2] - 0.0) / 0.3, 0, 1)
        comb[:, 2] -= ahead * (np.maximum(comb[:, 2], 0) + 0.1)
        comb[:, 0] += ahead * 0.6 * side
    # beside the face nothing is combed forwards, or it would cross the cheeks
    beside = np.clip((0.62 - root[:, 1]) / 0.2, 0, 1) * (root[:, 2] > -0.4)
    comb[:, 2] -= beside * (np.maximum(comb[:, 2], 0) + 0.15)
    comb = comb + rng.normal(0, (0.10, 0.14, 0.22)[style.volume], (n, 3))
    drift = 0.95 * (1.0 if style.parting <= 5 else -1.0) if style.bangs == "side_swept" else 0.0
    fringe = np.stack([0.25 * root[:, 0] + drift + rng.normal(0, 0.06, n), np.full(n, -0.1), np.full(n, 1.0)], axis=1)
    comb = np.where(bang[:, None], fringe, comb)
    hold = np.where(bang, 0.45, (0.55, 0.65, 0.8)[style.volume])
    if style.length == "men" and style.bangs == "none" and not style.parting:
        hold = np.where(bang, hold, 1.2)
    return comb.astype(np.float32), hold.astype(np.float32)


def _walk(g: _Guides, style: Hairstyle, head: HeadSurface, body: BodySurface, who: Identity) -> tuple[Array, Array]:
    """March every guide; returns paths (G, K, 3) and the valid length of each in steps (fractional)."""
    steps = int(min(5.2, float(g.length.max())) / STEP) + 2
    p = g.root * 1.005
    out = g.root / np.linalg.norm(g.root, axis=1, keepdims=True)
    g.comb -= (g.comb * out).sum(axis=1, keepdims=True) * out
    g.comb /= np.maximum(np.linalg.norm(g.comb, axis=1, keepdims=True), 0.3)
    direction = 0.3 * out + 0.7 * g.comb
    paths = np.empty((len(p), steps + 1, 3), np.float32)
    paths[:, 0] = p
    alive = np.ones(len(p), bool)
    count = np.zeros(len(p), np.float32)
    for k in range(1, steps + 1):
        s = k * STEP
        want = _pull(g, style, p, s)
        direction = 0.5 * direction + 0.5 * want
        direction /= np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-6)
        p = p + STEP * direction
        p = _keep_off_head(p, g, style, head, s)
        p = _keep_off_face(p, g, who)
        p = _keep_off_body(p, g, body)
        alive &= (s <= g.length) & ((p[:, 1] > g.end) | (s < 0.2))
        count += alive
        paths[:, k] = p
        if not alive.any():
            paths[:, k:] = p[:, None]
            break
    return paths, np.maximum(count, 1.0)


def _pull(g: _Guides, style: Hairstyle, p: Array, s: float) -> Array:
    gravity = np.array([0, -1, 0], np.float32)
    held = np.exp(-((s / g.hold) ** 2))[:, None]
    if style.tied:
        to_tie = _TIE - p
        far = np.linalg.norm(to_tie, axis=1, keepdims=True)
        tied = (~g.bang) & (s < 3.0)
        gather = to_tie / np.maximum(far, 1e-3)
        reached = (far < 0.16) | (p[:, 2:3] < -1.12) | (s > 1.9)
        pulled = np.where(reached, gravity + np.array([0, 0, -0.25], np.float32), gather)
        loose = held * g.comb + (1 - held) * gravity
        return np.where(tied[:, None], pulled, loose).astype(np.float32)
    return held * g.comb + (1 - held) * gravity


def _keep_off_head(p: Array, g: _Guides, style: Hairstyle, head: HeadSurface, s: float) -> Array:
    """Stay on or above the hair's own shell over the skull; on the upper half the shell also holds the strand down."""
    radius = np.sqrt((p * p).sum(axis=1))
    rise = 1 - np.exp(-s / 0.2)
    shell = head.radius_at(p) + 0.015 + g.standoff * rise
    if style.tied:
        shell = np.where(g.bang, shell, head.radius_at(p) + 0.02 + 0.04 * g.layer)
    above = np.clip(p[:, 1] / np.maximum(radius, 1e-6) * 3, 0, 1)
    target = np.where(radius < shell, shell, radius + (shell - radius) * 0.6 * above)
    off = p * (target / np.maximum(radius, 1e-6))[:, None]
    low = np.clip((-0.25 - off[:, 1]) / 0.8, 0, 1) * (0.030, 0.014, 0.0)[style.volume]
    off[:, 0] *= 1 - low
    return off


def _keep_off_face(p: Array, g: _Guides, who: Identity) -> Array:
    """Hair that is not a fringe slides aside to the temples instead of crossing the face."""
    guard = (0.56 + 0.12 * g.layer) * who.face_width * np.clip(1.25 - 0.35 * np.abs(p[:, 1] + 0.1), 0.7, 1.0)
    crossing = (~g.bang) & (p[:, 2] > 0.05) & (p[:, 1] < 0.66) & (np.abs(p[:, 0]) < guard)
    strength = np.clip((0.66 - p[:, 1]) / 0.2, 0, 1) * crossing
    strength *= np.clip((p[:, 1] + 1.5) / 0.3, 0, 1)
    side = np.where(np.abs(p[:, 0]) > 0.2, np.sign(p[:, 0]), g.side)
    p = p.copy()
    p[:, 0] += strength * 0.5 * (side * guard - p[:, 0])
    p[:, 2] -= strength * 0.05
    p[:, 1] += strength * 0.08 * (p[:, 1] > 0.3)
    return p


def _keep_off_body(p: Array, g: _Guides, body: BodySurface) -> Array:
    """Push strands to the front or back surface of neck and shoulders."""
    if float(p[:, 1].min()) > -0.9:
        return p
    half_width, half_depth, centre, _ = body.section(p[:, 1]).T
    off = 0.03 + 0.35 * g.standoff
    across = np.clip(1 - (p[:, 0] / (half_width + off)) ** 2, 0, 1)
    surface = (half_depth + off) * np.sqrt(across)
    z = p[:, 2] - centre
    inside = (np.abs(z) < surface) & (p[:, 1] < -0.9)
    moved = np.where(z > 0.12, surface, -surface)
    p = p.copy()
    p[:, 2] += np.where(inside, np.clip(moved - z, -0.16, 0.16), 0)
    return p


def _locks(paths: Array, counts: Array, g: _Guides, style: Hairstyle, rng: np.random.Generator, detail: float) -> Strands:
    """Spread every guide into a lock of strands, resample them and add the curl."""
    each = max(2, round((3.6, 2.8, 2.8)[style.volume] * detail * (1.5 if style.length in ("men", "women_short") else 1.0)))
    owner = np.repeat(np.arange(len(paths)), each)
    n = len(owner)
    longest = float(counts.max()) * STEP
    spacing = max(0.06 if style.curl < 2 else WAVELENGTH[style.curl] / 6, longest / 130)
    samples = max(8, int(longest / spacing))
    lengths = counts[owner] * rng.uniform(0.86, 1.0, n).astype(np.float32)
    index = np.linspace(0, 1, samples, dtype=np.float32)[None, :] * lengths[:, None]
    low = np.minimum(index.astype(np.int32), paths.shape[1] - 2)
    mix = (index - low)[..., None]
    points = paths[owner[:, None], low] * (1 - mix) + paths[owner[:, None], low + 1] * mix
    arc = index * STEP
    clump = _clumps(g, style, rng)[owner]
    points = points + _scatter(g, owner, arc, style, rng)
    bend, relief = _curl(points, arc, g.root[owner], clump, style, rng)
    points = points + bend
    by_lock, by_strand = ((0.10, 0.12), (0.10, 0.10), (0.16, 0.08), (0.06, 0.16))[style.curl]
    # fine hair lies smooth, thick hair parts into heavy locks with shadow between them
    uneven = (0.45, 1.0, 1.9)[style.volume]
    shade = (1 + uneven * (by_lock * rng.normal(size=len(paths))[owner] + by_strand * rng.normal(size=n))).astype(np.float32)
    accent = rng.random(len(paths))[owner] < (0.25 if style.colour == "two-tone" else 0.22)
    layer = np.clip(g.layer[owner] + rng.uniform(-0.15, 0.15, n), 0, 1).astype(np.float32)
    return Strands(points.astype(np.float32), arc, layer, np.clip(shade, 0.55, 1.6), relief, accent, lengths * STEP)


def _clumps(g: _Guides, style: Hairstyle, rng: np.random.Generator) -> NDArray[np.int64]:
    """Number of the clump that each guide belongs to: neighbours on the scalp. Straight hair has a clump for every guide."""
    n = len(g.root)
    if not style.curl:
        return np.arange(n)
    clump, first = np.empty(n, np.int64), 0
    kinds = g.bang + 2 * (g.side > 0)  # neither a fringe nor the two sides of a parting wave together
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        centres = g.root[rng.choice(members, max(1, round(CLUMPS[style.curl] * len(members) / n)), replace=False)]
        clump[members] = first + ((g.root[members][:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        first += len(centres)
    return clump


def _scatter(g: _Guides, owner: NDArray[np.int64], arc: Array, style: Hairstyle, rng: np.random.Generator) -> Array:
    """Offset of each strand from its guide: spread at the root, drawn together towards the tip, lifted off the head."""
    n = len(owner)
    out = g.root[owner] / np.linalg.norm(g.root[owner], axis=1, keepdims=True)
    offset = rng.normal(0, 1, (n, 3)).astype(np.float32)
    offset -= (offset * out).sum(axis=1, keepdims=True) * out
    offset *= (0.06, 0.055, 0.04, 0.06)[style.curl]
    lift = out * np.abs(rng.normal(0, 0.25, (n, 1))).astype(np.float32) * g.standoff[owner][:, None]
    gathered = np.clip(1.0 - 0.22 * arc, 0.45, 1.0)[..., None]
    frizz = (0.0, 0.25, 0.6)[style.volume] * np.clip(arc / 2.5, 0, 1)[..., None]
    return offset[:, None, :] * (gathered + frizz) + lift[:, None, :] * np.clip(arc / 0.3, 0, 1)[..., None]


def _curl(
    points: Array, arc: Array, root: Array, clump: NDArray[np.int64], style: Hairstyle, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Displacement (N, P, 3) of the strand's own shape (flat waves for class 1, helices for 2 and 3) and its relief (N, P)."""
    n, clumps = len(points), int(clump.max()) + 1
    cropped = style.length in ("men", "women_short")
    short = 0.82 if cropped else 1.0
    wavelength = (
        WAVELENGTH[style.curl]
        * (SHORT_WAVE[style.curl] if cropped else 1.0)
        * (1 + 0.12 * rng.normal(size=clumps)[clump] + 0.03 * rng.normal(size=n))
    )
    amplitude = AMPLITUDE[style.curl] * short * rng.uniform(0.8, 1.2, n)
    coherent = 3.0 * root[:, 0] + 2.0 * root[:, 1]
    own = rng.uniform(0, 2 * np.pi, clumps)[clump]
    loose = rng.normal(0, (1.5, 0.2, 0.25, 0.4)[style.curl], n)
    phase = (coherent + 0.5 * np.sin(own) if style.curl == 1 else own) + loose
    tangent = np.gradient(points, axis=1)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=2, keepdims=True), 1e-6)
    out = points * np.array([1, 0.35, 1], np.float32)
    out -= (out * tangent).sum(axis=2, keepdims=True) * tangent
    out /= np.maximum(np.linalg.norm(out, axis=2, keepdims=True), 1e-6)
    across = np.cross(tangent, out)
    angle = (2 * np.pi / wavelength)[:, None] * arc + phase[:, None]
    start = (0.2, 0.15, 0.08, 0.04)[style.curl] * short
    grown = amplitude[:, None] * (1 - np.exp(-((arc / start) ** 2) * 0.5))
    flat = 0.35 if style.curl <= 1 else 1.0
    bend = (grown * np.sin(angle))[..., None] * across + (grown * flat * (1 + np.cos(angle)))[..., None] * out
    relief = np.cos(angle) * (grown / amplitude[:, None]) * (0.0, 0.9, 1.0, 1.0)[style.curl]
    return bend.astype(np.float32), relief.astype(np.float32)
