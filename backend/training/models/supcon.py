"""The losses of Stage 1: cross entropy where a label is known, and supervised contrast (arXiv 2004.11362) over two views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

UNKNOWN = -1
VOLUME_CLASSES = 3
_EXCLUDED = -1e9  # a finite stand-in for minus infinity: exp() of it is 0, and a row of nothing else stays free of NaN


@dataclass(frozen=True)
class Labels:
    """What is known of N samples, int64 (N,) each. curl 0..3 and volume 0..2, or UNKNOWN; group: the head a sample was cut from."""

    curl: Tensor
    volume: Tensor
    group: Tensor

    @property
    def joint(self) -> Tensor:
        """The class of contrast: curl and volume together, int64 (N,); UNKNOWN unless both are known."""
        known = (self.curl >= 0) & (self.volume >= 0)
        return torch.where(known, self.curl * VOLUME_CLASSES + self.volume, UNKNOWN)

    def repeated(self, rows: Tensor) -> Labels:
        """The labels of samples ``rows`` (M,), in that order."""
        return Labels(self.curl[rows], self.volume[rows], self.group[rows])

    def to(self, device: torch.device) -> Labels:
        """The labels on another device."""
        return Labels(self.curl.to(device), self.volume.to(device), self.group.to(device))


def supcon_loss(features: Tensor, classes: Tensor, groups: Tensor, *, temperature: float) -> Tensor:
    """Supervised contrastive loss, L_out of arXiv 2004.11362 equation 2, averaged over its anchors.

    features: (N, D) unit vectors, any float type, the views of one sample being rows of their own; classes: (N,) int64, negative for
    unknown; groups: (N,) int64, the head of each row. Positives of an anchor are all other rows of its class. An anchor counts only if
    one of them shows another head: else the loss would teach to recognise the head. Rows of unknown class are neither anchor, positive
    nor negative. Returns a float32 scalar; 0 (with zero gradients) when no anchor counts.
    """
    features = features.float()
    known = classes >= 0
    others = known[None, :] & known[:, None] & ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    positives = others & (classes[:, None] == classes[None, :])
    anchors = (positives & (groups[:, None] != groups[None, :])).any(dim=1)

    logits = (features @ features.T / temperature).masked_fill(~others, _EXCLUDED)
    log_probability = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    mean_over_positives = log_probability.masked_fill(~positives, 0.0).sum(dim=1) / positives.sum(dim=1).clamp(min=1)
    return -(mean_over_positives * anchors).sum() / anchors.sum().clamp(min=1)


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the rows whose label is known; 0 when none is. logits: (N, C); labels: (N,) int64, UNKNOWN left out."""
    total = functional.cross_entropy(logits.float(), labels, ignore_index=UNKNOWN, reduction="sum")
    return total / (labels != UNKNOWN).sum().clamp(min=1)
