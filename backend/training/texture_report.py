"""Stage 1's page: scores on unseen heads, what is confused with what, and the embedding in pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.training import html, keyed
from backend.training.evenly import evenly
from backend.training.models.supcon import UNKNOWN
from backend.training.models.texture_encoder import CURL_CLASSES, VOLUME_CLASSES
from backend.training.texture_data import Ints, PatchImages, PatchTable
from backend.training.texture_metrics import Evidence, Floats

_NAMES = {"curl": CURL_CLASSES, "volume": VOLUME_CLASSES}
_COLOURS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189))  # RGB, of classes and of lines
_UNKNOWN_COLOUR = (170, 170, 170)
_MAP_SIDE, _MAP_POINTS = 420, 300


def write_report(
    path: Path, metrics: Mapping[str, Any], tables: Mapping[str, PatchTable], images: Mapping[str, PatchImages], evidence: Evidence | None
) -> None:
    """Writes the page. ``metrics`` is the content of stage1_metrics.json; without ``evidence`` (no validation patch) pictures are left out."""
    scores = metrics["metrics"]
    body = [
        _headline(scores),
        *(_split_tables(split, scores[split]) for split in ("val", "test") if split in scores),
        _curve(metrics["history"]),
    ]
    if evidence is not None:
        table = tables["val"]
        body += [_colour(scores["colour_probe"]), _map(evidence, table), _neighbours(evidence, tables, images)]
        body.append(_mistakes(evidence, table, images["val"]))
    lead = f"{metrics['steps']} steps, weights of step {metrics['chosen_step']}; every figure is of heads that training never saw."
    artifacts.write_text(path, html.page("Stage 1: the texture encoder", body, lead=lead))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(scores: Mapping[str, Any]) -> str:
    low_high = scores["balanced_accuracy_ci"]
    return "–" if low_high is None else f"{_share(low_high[0])} to {_share(low_high[1])}"


def _headline(scores: Mapping[str, Any]) -> str:
    rows = []
    for split, name, unit in itertools.product(("val", "test"), _NAMES, ("photo", "patch")):
        if split in scores:
            found = scores[split][name][unit]
            present = sum(map(any, found["confusion"]))  # classes that occur
            chance = _share(1 / present if present else None)
            accuracy = _share(found["balanced_accuracy"])
            rows.append((f"{name}, {split}, by {unit}", accuracy, _interval(found), found["samples"], found["heads"], chance))
    return "<h2>Balanced accuracy</h2>" + html.table(
        ("what", "balanced accuracy", "95 % interval over heads", "samples", "heads", "chance"), rows
    )


def _split_tables(split: str, scores: Mapping[str, Any]) -> str:
    parts = []
    for name, classes in _NAMES.items():
        found = scores[name]["photo"]
        rows = [
            (c, _share(v["precision"]), _share(v["recall"]), _share(v["f1"]), v["samples"], *found["confusion"][i])
            for i, (c, v) in enumerate(found["per_class"].items())
        ]
        columns = (name, "precision", "recall", "F1", "photos", *(f"said {c}" for c in classes))
        parts.append(f"<h2>{name.capitalize()}, {split}, by photo</h2>" + html.table(columns, rows))
    return "".join(parts)


def _colour(probe: Mapping[str, float]) -> str:
    rows = [(part, f"{probe[part + '_delta_e']:.2f}", f"{probe[part + '_delta_e_of_mean']:.2f}") for part in ("pooled", "tokens")]
    text = "<p>Stage 2 learns the reference's colour from this embedding alone. A linear probe reads the patch's mean colour from it:</p>"
    return "<h2>Is the colour still there?</h2>" + text + html.table(("embedding", "mean CIEDE2000", "of guessing the mean colour"), rows)


def _curve(history: list[list[float]]) -> str:
    """The losses over the steps, one line each, as SVG."""
    if len(history) < 2:
        return ""
    values = np.array(history)
    width, height = 720.0, 200.0
    x = width * (values[:, 0] - values[0, 0]) / max(values[-1, 0] - values[0, 0], 1)
    top = max(float(values[:, 1:].max()), 1e-9)
    lines = []
    for column, (name, colour) in enumerate(zip(("loss", "curl", "volume", "contrast", "colour"), _COLOURS, strict=True), 1):
        points = " ".join(f"{a:.1f},{height * (1 - b / top):.1f}" for a, b in zip(x, values[:, column], strict=True))
        paint = f"rgb{colour}"
        lines.append(f'<polyline fill="none" stroke="{paint}" stroke-width="1.5" points="{points}"/>')
        lines.append(f'<text x="{width - 90}" y="{18 * column}" fill="{paint}" font-size="13">{name}</text>')
    return (
        f'<h2>Losses</h2><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="losses from 0 to {top:.2f}">{"".join(lines)}</svg>'
    )


def _map(evidence: Evidence, table: PatchTable) -> str:
    """The embeddings of validation patches in the plane, painted by their true classes."""
    chosen = evenly(len(evidence.unseen.numbers), _MAP_POINTS)
    if len(chosen) < 8:
        return ""
    numbers = evidence.unseen.numbers[chosen]
    places = tsne(evidence.unseen.pooled[chosen].astype(np.float64), seed=0)
    figures = []
    for name, labels in (("curl", table.curl[numbers]), ("volume", table.volume[numbers])):
        legend = ", ".join(f"{c} {shade}" for c, shade in zip(_NAMES[name], ("blue", "orange", "green", "red"), strict=False))
        figures.append(html.picture(_scatter(places, labels), f"{name}: {legend}; grey: no label", side=_MAP_SIDE))
    return "<h2>The embedding in the plane (t-SNE)</h2>" + f'<div style="display:flex;flex-wrap:wrap;gap:1rem">{"".join(figures)}</div>'


def _scatter(places: Floats, labels: Ints) -> NDArray[np.uint8]:
    canvas = np.full((2 * _MAP_SIDE, 2 * _MAP_SIDE, 3), 255, np.uint8)
    low, high = places.min(axis=0), places.max(axis=0)
    spots = ((0.04 + 0.92 * (places - low) / np.maximum(high - low, 1e-12)) * 2 * _MAP_SIDE).astype(int)
    for (x, y), label in zip(spots.tolist(), labels.tolist(), strict=True):
        cv2.circle(canvas, (x, y), 7, _UNKNOWN_COLOUR if label == UNKNOWN else _COLOURS[label], -1, cv2.LINE_AA)
    return canvas


def _neighbours(
    evidence: Evidence, tables: Mapping[str, PatchTable], images: Mapping[str, PatchImages], queries: int = 8, shown: int = 5
) -> str:
    """Some validation patches and the training patches nearest to them by cosine."""
    unit = [e.pooled / np.maximum(np.linalg.norm(e.pooled, axis=1, keepdims=True), 1e-12) for e in (evidence.unseen, evidence.seen)]
    similarity = unit[0] @ unit[1].T
    rows = []
    for query in evenly(len(similarity), queries):
        number = evidence.unseen.numbers[query : query + 1]
        figures = [html.picture(images["val"].get(number)[0], "asked: " + _truth(tables["val"], int(number[0])), side=110)]
        for near in np.argsort(-similarity[query])[:shown]:
            found = evidence.seen.numbers[near : near + 1]
            caption = f"{similarity[query, near]:.2f} " + _truth(tables["train"], int(found[0]))
            figures.append(html.picture(images["train"].get(found)[0], caption, side=110))
        rows.append(html.row(figures))
    return "<h2>Nearest training patches</h2>" + "".join(rows)


def _truth(table: PatchTable, number: int) -> str:
    curl, volume = int(table.curl[number]), int(table.volume[number])
    return f"{CURL_CLASSES[curl] if curl != UNKNOWN else 'curl ?'}, {VOLUME_CLASSES[volume] if volume != UNKNOWN else 'volume ?'}"


def _mistakes(evidence: Evidence, table: PatchTable, images: PatchImages, shown: int = 12) -> str:
    """The patches that gave their true curl or volume the least probability."""
    parts = []
    for name, values, labels in (
        ("curl", evidence.probabilities.curl, table.curl[evidence.numbers]),
        ("volume", evidence.probabilities.volume, table.volume[evidence.numbers]),
    ):
        wrong = np.flatnonzero((labels != UNKNOWN) & (values.argmax(axis=1) != labels))
        worst = wrong[np.argsort(values[wrong, labels[wrong]])][:shown]
        figures = []
        for row in worst:
            said = int(values[row].argmax())
            caption = f"{_NAMES[name][labels[row]]}, said {_NAMES[name][said]} ({_share(values[row, said])})"
            figures.append(html.picture(images.get(evidence.numbers[row : row + 1])[0], caption, side=110))
        parts.append(f"<h2>Worst mistakes, {name}</h2>" + (html.row(figures) if figures else "<p>none</p>"))
    return "".join(parts)


def tsne(points: Floats, *, seed: int, perplexity: float = 20.0, rounds: int = 350) -> Floats:
    """Exact t-SNE (van der Maaten and Hinton 2008) of (N, D) points, N in the hundreds; returns (N, 2)."""
    count = len(points)
    joint = _similarities(points, min(perplexity, (count - 1) / 3))
    rng = keyed.numpy_generator(seed, "t-SNE")
    places, moved = 1e-4 * rng.standard_normal((count, 2)), np.zeros((count, 2))
    gains = np.ones_like(places)
    for turn in range(rounds):
        early = turn < 100
        kernel = 1 / (1 + _squared_distances(places))
        np.fill_diagonal(kernel, 0.0)
        force = ((12.0 if early else 1.0) * joint - kernel / kernel.sum()) * kernel
        gradient = 4 * (force.sum(axis=1)[:, None] * places - force @ places)
        gains = np.maximum(np.where((gradient > 0) != (moved > 0), gains + 0.2, gains * 0.8), 0.01)
        moved = (0.5 if early else 0.8) * moved - max(count / 12, 50.0) * gains * gradient
        places = places + moved
        places -= places.mean(axis=0)
    return np.asarray(places)


def _squared_distances(points: Floats) -> Floats:
    norms = np.square(points).sum(axis=1)
    return np.asarray(np.maximum(norms[:, None] + norms[None, :] - 2 * points @ points.T, 0.0))


def _similarities(points: Floats, perplexity: float) -> Floats:
    """Symmetric joint probabilities whose rows have the given perplexity, found by bisection on each row's precision."""
    distances = _squared_distances(points)
    distances /= max(float(distances.mean()), 1e-12)
    low, high = np.full(len(points), -20.0), np.full(len(points), 20.0)  # of the logarithm of the precision
    off = ~np.eye(len(points), dtype=bool)
    for _ in range(40):
        middle = (low + high) / 2
        exponents = -distances * np.exp(middle)[:, None]
        exponents = np.where(off, exponents - np.where(off, exponents, -np.inf).max(axis=1, keepdims=True), -np.inf)
        rows = np.exp(exponents)
        rows /= rows.sum(axis=1, keepdims=True)
        entropy = -(rows * np.log(np.maximum(rows, 1e-300))).sum(axis=1)
        flat = entropy > np.log(perplexity)
        low, high = np.where(flat, middle, low), np.where(flat, high, middle)
    return np.asarray(np.maximum((rows + rows.T) / (2 * len(points)), 1e-12))
