"""Stage 1 metrics on cases worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from backend.training.models.supcon import UNKNOWN
from backend.training.texture_metrics import balanced_accuracy, by_photo, score
from backend.training.texture_report import tsne
from tests.texture_set import one_thread  # noqa: F401 (fixtures)


def test_scores_of_a_hand_computed_case() -> None:
    predicted = np.eye(3)[[0, 0, 1, 1, 1, 2]]
    labels, groups = np.array([0, 0, 0, 1, 1, UNKNOWN]), np.array([0, 0, 1, 2, 2, 3])
    found = score(predicted, labels, groups, ("a", "b", "c"), seed=0)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)  # class c does not occur
    assert found["confusion"] == [[2, 1, 0], [0, 2, 0], [0, 0, 0]] and found["samples"] == 5 and found["heads"] == 3
    assert found["per_class"]["b"] == {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(0.8), "samples": 2}
    assert found["per_class"]["c"]["recall"] is None
    low, high = found["balanced_accuracy_ci"]
    assert low <= found["balanced_accuracy"] <= high
    assert score(predicted, np.full(6, UNKNOWN), groups, ("a", "b", "c"), seed=0)["balanced_accuracy"] is None
    json.dumps(found, allow_nan=False)


def test_interval_over_heads_is_wider_than_over_patches() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(10) < 0.7  # ten heads, each wholly right or wholly wrong, thirty patches each
    labels, heads = np.repeat(np.arange(10) % 2, 30), np.repeat(np.arange(10), 30)
    predicted = np.eye(2)[np.where(np.repeat(right, 30), labels, 1 - labels)]
    by_head, by_patch = (score(predicted, labels, g, ("a", "b"), seed=0)["balanced_accuracy_ci"] for g in (heads, np.arange(300)))
    assert by_head[1] - by_head[0] > 3 * (by_patch[1] - by_patch[0])
    assert math.isnan(float(balanced_accuracy(np.zeros((2, 2)))))


def test_photos_average_their_patches() -> None:
    values, first = by_photo(np.array([[1.0, 0], [0, 1], [0, 1], [0.5, 0.5]]), np.array([4, 4, 4, 2]))
    np.testing.assert_allclose(values, [[0.5, 0.5], [1 / 3, 2 / 3]])
    assert first.tolist() == [3, 0]


def test_tsne_keeps_clusters_apart() -> None:
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(3), 20)
    places = tsne(rng.normal(size=(60, 10)) + 8 * np.eye(10)[label], seed=0)
    distance = np.linalg.norm(places[:, None] - places[None], axis=2) + np.diag(np.full(60, np.inf))
    assert (label[distance.argmin(axis=1)] == label).all()
