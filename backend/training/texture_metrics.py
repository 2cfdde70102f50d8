"""How right Stage 1 is about heads it has never seen: scores with intervals over heads, and what a linear probe reads (DESIGN 4.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab

from backend.training import keyed
from backend.training.models.supcon import UNKNOWN
from backend.training.models.texture_encoder import CURL_CLASSES, TOKENS, VOLUME_CLASSES, TextureEncoder, pooled, tokens
from backend.training.texture_data import Ints, PatchImages, PatchTable, Pictures, to_unit

Floats = NDArray[np.float64]

BOOTSTRAP = 2000
EVALUATION_PATCHES = 20_000
PROBE_PATCHES = 512
_BATCH = 128
_RIDGE_STRENGTHS = np.logspace(-4, 2, 13)


@dataclass(frozen=True)
class Probabilities:
    """curl (N, 4) and volume (N, 3), float64, each row summing to 1."""

    curl: Floats
    volume: Floats


@dataclass(frozen=True)
class Embeddings:
    """Some patches of a split as the frozen encoder sees them. numbers (N,); pooled (N, 2048); tokens (N, 16, 2048), float32."""

    numbers: Ints
    pooled: NDArray[np.float32]
    tokens: NDArray[np.float32]


@torch.inference_mode()
def predict_probabilities(encoder: TextureEncoder, images: PatchImages, numbers: Ints) -> Probabilities:
    """Class probabilities of patches, in float32 on the encoder's device. The encoder must be in eval mode."""
    curl, volume = [np.zeros((0, len(CURL_CLASSES)))], [np.zeros((0, len(VOLUME_CLASSES)))]
    for batch in _batches(encoder, images, numbers):
        output = encoder(batch)
        curl.append(output.curl_logits.softmax(1).double().cpu().numpy())
        volume.append(output.volume_logits.softmax(1).double().cpu().numpy())
    return Probabilities(np.concatenate(curl), np.concatenate(volume))


@torch.inference_mode()
def embed(encoder: TextureEncoder, images: PatchImages, numbers: Ints) -> Embeddings:
    """Pooled embedding and patch tokens, in float32. The encoder must be in eval mode."""
    whole, parts = [], []
    for batch in _batches(encoder, images, numbers):
        features = encoder.features(batch)
        whole.append(pooled(features).cpu().numpy())
        parts.append(tokens(features).cpu().numpy())
    return Embeddings(numbers, np.concatenate(whole), np.concatenate(parts))


def _batches(encoder: TextureEncoder, images: PatchImages, numbers: Ints) -> Iterator[torch.Tensor]:
    for start in range(0, len(numbers), _BATCH):
        yield to_unit(torch.from_numpy(images.get(numbers[start : start + _BATCH])).to(encoder.mean.device))


def by_photo(values: Floats, photo: Ints) -> tuple[Floats, Ints]:
    """Mean over the patches of each photo, (P, C), and the index of each photo's first patch, (P,)."""
    _, first, inverse, counts = np.unique(photo, return_index=True, return_inverse=True, return_counts=True)
    sums = np.zeros((len(first), values.shape[1]))
    np.add.at(sums, inverse, values)
    return np.asarray(sums / counts[:, None]), first


def balanced_accuracy(confusion: Floats) -> Floats:
    """Mean recall over the classes that occur; confusion (..., true, predicted). NaN where nothing occurs."""
    occurring = confusion.sum(axis=-1)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    recall = np.divide(hits, occurring, out=np.zeros_like(hits), where=occurring > 0)
    present = (occurring > 0).sum(axis=-1)
    return np.asarray(np.divide(recall.sum(axis=-1), present, out=np.full(np.shape(present), np.nan), where=present > 0))


def score(probabilities: Floats, labels: Ints, groups: Ints, names: tuple[str, ...], *, seed: int) -> dict[str, Any]:
    """Scores of predictions (N, C) against labels (N,), samples without a label left out; JSON values only.

    balanced_accuracy comes with a 95 % interval from a bootstrap over heads (``groups``), since photos of one head are no independent
    evidence. It is None where no sample has a label.
    """
    known = labels != UNKNOWN
    classes = len(names)
    heads, head = np.unique(groups[known], return_inverse=True)
    per_head = np.zeros((len(heads), classes, classes))
    np.add.at(per_head, (head, labels[known], probabilities[known].argmax(axis=1)), 1.0)
    confusion = per_head.sum(axis=0)
    hits, actual, claimed = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    per_class = {
        name: {
            "precision": float(hits[c] / claimed[c]) if claimed[c] else None,
            "recall": float(hits[c] / actual[c]) if actual[c] else None,
            "f1": float(2 * hits[c] / (actual[c] + claimed[c])) if actual[c] + claimed[c] else None,
            "samples": int(actual[c]),
        }
        for c, name in enumerate(names)
    }
    shared = {"per_class": per_class, "confusion": confusion.astype(int).tolist(), "samples": int(known.sum()), "heads": len(heads)}
    if not len(heads):
        return {"balanced_accuracy": None, "balanced_accuracy_ci": None, **shared}
    rng = keyed.numpy_generator(seed, "texture bootstrap")
    weights = rng.multinomial(len(heads), np.full(len(heads), 1 / len(heads)), size=BOOTSTRAP)
    drawn = (weights @ per_head.reshape(len(heads), -1)).reshape(-1, classes, classes)
    interval = np.nanpercentile(balanced_accuracy(drawn), [2.5, 97.5])
    return {"balanced_accuracy": float(balanced_accuracy(confusion)), "balanced_accuracy_ci": [float(v) for v in interval], **shared}


def score_split(probabilities: Probabilities, table: PatchTable, numbers: Ints, *, seed: int) -> dict[str, Any]:
    """Scores of both labels, by photo (probabilities averaged over its patches: the headline) and by single patch.

    Curl is read from patches and from windows of the style picture, volume from patches alone.
    """
    result: dict[str, Any] = {}
    patches = table.window[numbers] < 0
    for name, values, labels, names, kept in (
        ("curl", probabilities.curl, table.curl[numbers], CURL_CLASSES, np.ones_like(patches)),
        ("volume", probabilities.volume, table.volume[numbers], VOLUME_CLASSES, patches),
    ):
        groups = table.group[numbers][kept]
        averaged, first = by_photo(values[kept], table.photo[numbers][kept])
        result[name] = {
            "photo": score(averaged, labels[kept][first], groups[first], names, seed=seed),
            "patch": score(values[kept], labels[kept], groups, names, seed=seed),
        }
    return result


def headline(scores: dict[str, Any]) -> float | None:
    """What training is judged by: the mean of the two balanced accuracies by photo, of those that exist."""
    values = [scores[name]["photo"]["balanced_accuracy"] for name in ("curl", "volume")]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def ridge_predict(x: NDArray[np.floating], y: Floats, groups: Ints, x_new: NDArray[np.floating], *, seed: int) -> Floats:
    """A linear probe: ridge regression of y (N, K) on x (N, D), evaluated at x_new (M, D).

    Its strength is chosen on a quarter of the heads, kept out of the fit; then it is fitted on all.
    """
    heads = keyed.numpy_generator(seed, "texture probe").permutation(np.unique(groups))
    held = np.isin(groups, heads[: max(len(heads) // 4, 1)])
    strength = _RIDGE_STRENGTHS[0]
    if held.any() and not held.all():
        tried = _ridge_path(x[~held], y[~held], x[held], _RIDGE_STRENGTHS)
        strength = _RIDGE_STRENGTHS[int(np.argmin([np.square(found - y[held]).mean() for found in tried]))]
    return _ridge_path(x, y, x_new, np.array([strength]))[0]


def _ridge_path(x: NDArray[np.floating], y: Floats, x_new: NDArray[np.floating], strengths: Floats) -> list[Floats]:
    """Ridge solutions at x_new for each strength, a share of the mean eigenvalue; in the dual, which suits N < D."""
    centre, spread = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    spread = np.where(spread > 1e-6 * max(float(spread.max()), 1e-12), spread, np.inf)
    fitted, new = (x - centre) / spread, (x_new - centre) / spread
    values, vectors = np.linalg.eigh(fitted @ fitted.T)
    offset = y.mean(axis=0)
    projected, cross = vectors.T @ (y - offset), (new @ fitted.T) @ vectors
    return [offset + cross @ (projected / (values + strength * values.mean() + 1e-12)[:, None]) for strength in strengths]


def mean_lab(images: Pictures, grid: int = 1) -> Floats:
    """Mean colour of each cell of a ``grid`` x ``grid`` division, CIE L*a*b*: (N, grid*grid, 3). images: (N, S, S, 3) uint8."""
    count, side = images.shape[:2]
    usable = side - side % grid
    cells = images[:, :usable, :usable].reshape(count, grid, usable // grid, grid, usable // grid, 3)
    return np.asarray(rgb2lab(cells.mean(axis=(2, 4)) / 255.0), np.float64).reshape(count, grid * grid, 3)


def colour_probe(
    fit: Embeddings, fit_table: PatchTable, fit_images: PatchImages, new: Embeddings, new_images: PatchImages, *, seed: int
) -> dict[str, float]:
    """Does the embedding know the hair's colour? Mean CIEDE2000 of a linear probe on unseen heads, beside predicting the mean colour.

    Pooled: the patch's mean colour from its embedding. Tokens: the mean colour of a token's cell from the token, on a sample of tokens; a
    cell is a sixteenth of the patch, or more where the last feature map has fewer cells (a quarter at 64 px).
    """
    groups = fit_table.group[fit.numbers]
    fit_pixels, new_pixels = fit_images.get(fit.numbers), new_images.get(new.numbers)
    side = int(np.sqrt(TOKENS))
    cells = min(side, -(-fit_pixels.shape[1] // 32))  # of the feature map, along one side
    result: dict[str, float] = {}
    choice = keyed.numpy_generator(seed, "texture tokens").integers(TOKENS, size=(2, max(len(fit.numbers), len(new.numbers))))
    own, other = (np.arange(len(fit.numbers)), choice[0, : len(fit.numbers)]), (np.arange(len(new.numbers)), choice[1, : len(new.numbers)])
    for name, x, y, x_new, y_new in (
        ("pooled", fit.pooled, mean_lab(fit_pixels)[:, 0], new.pooled, mean_lab(new_pixels)[:, 0]),
        (
            "tokens",
            fit.tokens[own],
            _cell_colours(fit_pixels, cells, side)[own],
            new.tokens[other],
            _cell_colours(new_pixels, cells, side)[other],
        ),
    ):
        found = ridge_predict(x, y, groups, x_new, seed=seed)
        result[f"{name}_delta_e"] = _mean_difference(y_new, found)
        result[f"{name}_delta_e_of_mean"] = _mean_difference(y_new, np.broadcast_to(y.mean(axis=0), y_new.shape))
    return result


def _cell_colours(images: Pictures, cells: int, side: int) -> Floats:
    """The colour of the cell that each of side x side tokens comes from, (N, side * side, 3)."""
    colours = mean_lab(images, cells).reshape(len(images), cells, cells, 3)
    nearest = np.arange(side) * cells // side
    return colours[:, nearest][:, :, nearest].reshape(len(images), side * side, 3)


def _mean_difference(one: Floats, other: Floats) -> float:
    return float(deltaE_ciede2000(one, other).mean())  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Evidence:
    """What the page shows of the validation split: every judged patch's probabilities, and embeddings of some beside training's."""

    numbers: Ints
    probabilities: Probabilities
    seen: Embeddings
    unseen: Embeddings


def evaluate_encoder(
    encoder: TextureEncoder, tables: Mapping[str, PatchTable], images: Mapping[str, PatchImages], *, seed: int
) -> tuple[dict[str, Any], Evidence | None]:
    """Scores on val and test (where they hold patches) and the colour probe, as JSON values; and the evidence, None without val patches."""
    scores: dict[str, Any] = {}
    evidence = None
    for split in ("val", "test"):
        table = tables[split]
        numbers = table.whole_photos(EVALUATION_PATCHES)
        if not len(numbers):
            continue
        probabilities = predict_probabilities(encoder, images[split], numbers)
        scores[split] = {**score_split(probabilities, table, numbers, seed=seed), "patches": len(numbers), "patches_of": len(table)}
        if split == "val":
            seen = embed(encoder, images["train"], tables["train"].spread(PROBE_PATCHES))
            unseen = embed(encoder, images["val"], table.spread(PROBE_PATCHES))
            evidence = Evidence(numbers, probabilities, seen, unseen)
            scores["colour_probe"] = colour_probe(seen, tables["train"], images["train"], unseen, images["val"], seed=seed)
    return scores, evidence
