"""Losses of Stage 2 (DESIGN 4.3)."""

from __future__ import annotations

from typing import Literal

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


Prediction = Literal["epsilon", "v_prediction"]
"""What the network predicts; the base model's scheduler says which (``prediction_type`` in diffusers)."""


def target_of(kind: Prediction, clean: torch.Tensor, noise: torch.Tensor, alpha_cumprod: torch.Tensor) -> torch.Tensor:
    """What the network should predict: the noise, or the velocity sqrt(a) noise - sqrt(1 - a) clean (Salimans and Ho, arXiv 2202.00512).

    clean, noise: (B, C, h, w). alpha_cumprod: (B,).
    """
    if kind == "epsilon":
        return noise
    alpha = alpha_cumprod.view(-1, 1, 1, 1).to(clean.dtype)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


def min_snr_weight(kind: Prediction, alpha_cumprod: torch.Tensor, gamma: float) -> torch.Tensor:
    """Loss factors (B,) that count an error of the clean picture min(SNR, gamma) times (Hang et al., arXiv 2303.09556, section 3.4).

    For noise min(SNR, gamma) / SNR, for velocity min(SNR, gamma) / (SNR + 1); all ones when gamma is 0. alpha_cumprod: (B,).
    """
    if gamma == 0:
        return torch.ones_like(alpha_cumprod)
    alpha = alpha_cumprod.float()
    snr = (alpha / (1 - alpha)).clamp_min(1e-8)  # zero terminal SNR: the last timestep has none
    return snr.clamp_max(gamma) / (snr if kind == "epsilon" else snr + 1)


def predicted_x0(kind: Prediction, noisy: torch.Tensor, prediction: torch.Tensor, alpha_cumprod: torch.Tensor) -> torch.Tensor:
    """The clean latents that a prediction implies (arXiv 2006.11239, eq. 15; arXiv 2202.00512, appendix D). alpha_cumprod: (B,)."""
    alpha = alpha_cumprod.view(-1, 1, 1, 1).to(noisy.dtype)
    if kind == "epsilon":
        return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction


def gram_matrix(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Channel correlations over the weighted pixels (Gatys et al., arXiv 1508.06576). features (B, C, h, w), weight (B, 1, h, w)
    -> (B, C, C), divided by the weight's sum and by C."""
    weighted = features * weight
    flat = weighted.flatten(2)
    total = weight.flatten(1).sum(dim=1).clamp_min(1e-6)
    return flat @ features.flatten(2).transpose(1, 2) / (total[:, None, None] * features.shape[1])


def texture_consistency_loss(network: PerceptualNet, image: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """TextureConsistencyLoss: mean squared difference of the Gram matrices of all five feature layers, inside the mask.

    image, target: (B, 3, H, W) in [-1, 1]; gradients flow to ``image``. mask: (B, 1, H, W). Returns a scalar.
    """
    with torch.no_grad():
        wanted = network.features(target)
    losses = []
    for ours, theirs in zip(network.features(image), wanted, strict=True):
        weight = F.interpolate(mask, ours.shape[-2:], mode="area")
        losses.append((gram_matrix(ours, weight) - gram_matrix(theirs, weight)).square().mean())
    return torch.stack(losses).mean()
