"""Losses of Stage 2 (DESIGN 4.3)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from backend.training.models.perceptual import PerceptualNet


def mask_aware_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor,
    excluded: torch.Tensor,
    *,
    outside_weight: float,
    sample_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """MaskAwareLoss: the squared error averaged over channels and weighted pixels.

    prediction, target: (B, C, h, w). mask, excluded: (B, 1, h, w) in [0, 1]. Pixels inside the mask weigh 1, outside
    ``outside_weight``, excluded ones (blurred faces must not be learnt) 0. sample_weight: (B,) factors, for example min-SNR.
    Returns a scalar in float32: per sample sum(w * err^2) / (C * sum(w)), then the mean over the batch.
    """
    weight = ((1.0 - mask) * outside_weight + mask) * (1.0 - excluded)
    error = (prediction.float() - target.float()).square().mean(dim=1, keepdim=True)
    total = weight.float().sum(dim=(1, 2, 3))
    per_sample = (weight * error).sum(dim=(1, 2, 3)) / total.clamp_min(1e-6)
    return (per_sample if sample_weight is None else per_sample * sample_weight).mean()


def gram_matrix(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Channel correlations over the weighted pixels (Gatys et al., arXiv 1508.06576). features (B, C, h, w), weight (B, 1, h, w)
    -> (B, C, C), divided by the weight's sum and by C."""
    weighted = features * weight
    flat = weighted.flatten(2)
    total = weight.flatten(1).sum(dim=1).clamp_min(1e-6)
    return flat @ features.flatten(2).transpose(1, 2) / (total[:, None, None] * features.shape[1])


def gram_distance(found: list[torch.Tensor], wanted: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """How far Gram matrices of feature maps lie apart inside a mask: |G - G*|^2 / (|G|^2 + |G*|^2), mean over layers and pictures.

    found, wanted: one (B, C, h, w) per layer. mask: (B, 1, H, W). Returns a scalar, 0 for equal ones and at most 1, of features that are
    not negative. It is relative because a layer's entries are as large as its activations squared over its width: with the miniature's
    network the absolute difference was below 1e-6, and a weight that suits one network means nothing for another. By both norms, so that
    a single bright picture cannot outweigh a batch; that also tells curls apart better than by the wanted one's alone (docs/method.md).
    """
    distances = []
    for ours, theirs in zip(found, wanted, strict=True):
        weight = F.interpolate(mask, ours.shape[-2:], mode="area")
        gram, target = gram_matrix(ours, weight), gram_matrix(theirs, weight)
        size = gram.square().sum((1, 2)) + target.square().sum((1, 2))
        distances.append(((gram - target).square().sum((1, 2)) / size.clamp_min(1e-12)).mean())
    return torch.stack(distances).mean()


def texture_consistency_loss(network: PerceptualNet, image: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """TextureConsistencyLoss: ``gram_distance`` of the five feature layers, inside the mask.

    image, target: (B, 3, H, W) in [-1, 1]; gradients flow to ``image``. mask: (B, 1, H, W). Returns a scalar.
    """
    with torch.no_grad():
        wanted = network.features(target)
    return gram_distance(network.features(image), wanted, mask)
