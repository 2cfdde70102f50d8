"""SupCon and the masked losses against references (issue 5)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from backend.training.models.supcon import UNKNOWN, Labels, masked_cross_entropy, supcon_loss
from tests.texture_set import one_thread  # noqa: F401 (fixtures)


def slow_supcon(z: Tensor, classes: list[int], groups: list[int], temperature: float) -> Tensor:
    """Equation 2 of arXiv 2004.11362, term by term."""
    rows = [i for i in range(len(classes)) if classes[i] >= 0]
    terms = []
    for i in rows:
        positives = [p for p in rows if p != i and classes[p] == classes[i]]
        if not any(groups[p] != groups[i] for p in positives):
            continue
        denominator = torch.stack([torch.exp(z[i] @ z[a] / temperature) for a in rows if a != i]).sum()
        terms.append(-torch.stack([torch.log(torch.exp(z[i] @ z[p] / temperature) / denominator) for p in positives]).mean())
    return torch.stack(terms).mean() if terms else (z * 0).sum()


def unit(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(count, 16, generator=generator, dtype=torch.float64), dim=1).float()


def value_and_gradient(loss: Any, z: Tensor) -> tuple[float, Tensor]:
    leaf = z.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return float(value.detach()), leaf.grad if leaf.grad is not None else torch.zeros_like(z)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 3)), min_size=1, max_size=10),
    st.integers(0, 1000),
    st.sampled_from([0.07, 0.1, 0.5]),
)
def test_supcon_is_the_papers_formula(rows: list[tuple[int, int]], seed: int, temperature: float) -> None:
    z, classes, groups = unit(len(rows), seed), [c for c, _ in rows], [g for _, g in rows]
    fast = value_and_gradient(lambda x: supcon_loss(x, torch.tensor(classes), torch.tensor(groups), temperature=temperature), z)
    slow = value_and_gradient(lambda x: slow_supcon(x, classes, groups, temperature), z)
    assert fast[0] == pytest.approx(slow[0], abs=1e-5)
    torch.testing.assert_close(fast[1], slow[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5])
def test_supcon_equals_pytorch_metric_learning(temperature: float) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    classes = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1, 2] * 2)
    groups = torch.arange(10).repeat(2)  # two views of ten heads
    z = unit(20, 3)
    # The reference normalises inside, so it is compared on the sphere: our gradient goes through the same normalisation.
    ours = value_and_gradient(lambda x: supcon_loss(nn.functional.normalize(x, dim=1), classes, groups, temperature=temperature), z)
    theirs = value_and_gradient(lambda x: losses.SupConLoss(temperature=temperature)(x, classes), z)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)


def test_supcon_without_positives_is_zero_and_with_one_class_finite() -> None:
    z = unit(4, 0)
    for classes, groups in (([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 0, 1, 1], [5, 5, 6, 6]), ([-1] * 4, [0, 1, 2, 3])):
        value, gradient = value_and_gradient(
            lambda x, c=classes, g=groups: supcon_loss(x, torch.tensor(c), torch.tensor(g), temperature=0.1), z
        )
        assert value == 0 and not gradient.any()
    same = torch.full((4, 16), 0.25)
    value, gradient = value_and_gradient(
        lambda x: supcon_loss(x, torch.zeros(4, dtype=torch.long), torch.arange(4), temperature=0.01), same
    )
    assert value == pytest.approx(math.log(3), abs=1e-5) and torch.isfinite(gradient).all()


def test_missing_labels_are_masked_not_guessed() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, -5.0]])
    expected = -(torch.log_softmax(logits[0], 0)[0] + torch.log_softmax(logits[1], 0)[0]) / 2
    assert masked_cross_entropy(logits, torch.tensor([0, 0, UNKNOWN])) == pytest.approx(float(expected))
    assert masked_cross_entropy(logits, torch.full((3,), UNKNOWN)) == 0
    joint = Labels(torch.tensor([3, -1, 2]), torch.tensor([2, 0, -1]), torch.arange(3)).joint
    assert joint.tolist() == [11, UNKNOWN, UNKNOWN]
