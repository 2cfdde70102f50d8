"""How much does Stage 2's mask tell of the hair that it is to learn? Two regressors guess the length class from masks of unseen heads.

    python benchmarks/mask_leak.py --config configs/demo.yaml

Reads a processed set (``deephair prepare``). Beside the shipped policy (random measures, borrowed silhouettes): the same without borrowed
silhouettes, and the raw silhouette of the hair. Figures are balanced accuracies with 95 % bootstrap intervals over heads.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import RidgeClassifier

from backend.config import load_config
from backend.imaging import masks
from backend.training.keyed import numpy_generator
from backend.training.prepared import Prepared
from backend.training.stage2_cache import silhouettes

SIDE = 32  # masks are looked at in this many pixels a side
VARIANTS = 2
POLICIES = ("shipped", "without borrowed silhouettes", "raw silhouette")
BOOTSTRAP = 1000


def draw(prepared: Prepared, rows: Sequence[dict[str, Any]]) -> dict[str, NDArray[np.float32]]:
    """Masks of every policy, (len(rows) * VARIANTS, SIDE * SIDE) in 0..1."""
    pool = silhouettes(prepared, list(rows))
    drawn: dict[str, list[NDArray[np.float32]]] = {policy: [] for policy in POLICIES}
    for row in rows:
        sample = prepared.sample(row)
        for variant in range(VARIANTS):
            rng = numpy_generator(0, "leak/" + row["id"], variant)
            shape = masks.random_shape(rng)
            kinds = (
                masks.edit_region(sample.hair, sample.face_box, shape, masks.borrow(pool, sample.face_box, rng)),
                masks.edit_region(sample.hair, sample.face_box, shape),
                sample.hair,
            )
            for policy, mask in zip(POLICIES, kinds, strict=True):
                small = cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
                drawn[policy].append(small.astype(np.float32).ravel() / 255.0)
    return {policy: np.stack(values) for policy, values in drawn.items()}


def balanced(truth: NDArray[np.int64], guess: NDArray[np.int64], heads: NDArray[np.int64]) -> tuple[float, list[float]]:
    """Mean recall over the classes, with its interval over heads."""
    classes = np.unique(truth)

    def score(weight: NDArray[np.float64]) -> float:
        recalls = [np.average(guess[truth == c] == c, weights=weight[truth == c]) for c in classes if weight[truth == c].sum()]
        return float(np.mean(recalls))

    names, member = np.unique(heads, return_inverse=True)
    rng = np.random.default_rng(0)
    draws = [
        score(np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[member].astype(float)) for _ in range(BOOTSTRAP)
    ]
    return score(np.ones(len(truth))), [float(v) for v in np.percentile(draws, [2.5, 97.5])]


def measure(processed: Path) -> dict[str, Any]:
    """Fits both regressors on two thirds of the heads and scores them on the rest."""
    prepared = Prepared(processed)
    rows = [row for row in prepared.rows() if row["attributes"]["length"]["en"] and row["phase"] != "before"]
    names = sorted({row["attributes"]["length"]["en"] for row in rows})
    labels = np.repeat([names.index(row["attributes"]["length"]["en"]) for row in rows], VARIANTS)
    groups = sorted({row["group"] for row in rows})
    heads = np.repeat([groups.index(row["group"]) for row in rows], VARIANTS)
    held = np.isin(heads, numpy_generator(0, "leak heads").permutation(len(groups))[: len(groups) // 3])
    result: dict[str, Any] = {"photos": len(rows), "heads": len(groups), "held_out_heads": len(groups) // 3, "classes": names,
                              "chance": 1 / len(names)}  # fmt: skip
    for policy, x in draw(prepared, rows).items():
        regressors = {
            "ridge": RidgeClassifier(alpha=30.0, class_weight="balanced"),
            "forest": RandomForestClassifier(150, class_weight="balanced", min_samples_leaf=3, random_state=0),
        }
        for name, regressor in regressors.items():
            guess = regressor.fit(x[~held], labels[~held]).predict(x[held])
            result[f"{policy}: {name}"] = balanced(labels[held], guess, heads[held])
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, for example paths.processed=FOLDER")
    options = parser.parse_args()
    print(json.dumps(measure(load_config(options.config, options.overrides).paths.processed), indent=2))


if __name__ == "__main__":
    main()
