"""Losses of Stage 2 (DESIGN 4.3)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from backend.training.models.perceptual import PerceptualNet


def mask_aware_loss(
    noise_pred: torch.Tensor,
    noise: torch.Tensor,
    mask: torch.Tensor,
    excluded: torch.Tensor,
    *,
    outside_weight: float,
    sample_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """MaskAwareLoss: the squared error averaged over channels and weighted pixels.

    noise_pred, noise: (B, C, h, w). mask, excluded: (B, 1, h, w) in [0, 1]. Pixels inside the mask weigh 1, outside
    ``outside_weight``, excluded ones (blurred faces must not be learnt) 0. sample_weight: (B,) factors, for example min-SNR.
    Returns a scalar in float32: per sample sum(w * err^2) / (C * sum(w)), then the mean over the batch.
    """
    weight = ((1.0 - mask) * outside_weight + mask) * (1.0 - excluded)
    error = (noise_pred.float() - noise.float()).square().mean(dim=1, keepdim=True)
    total = weight.float().sum(dim=(1, 2, 3))
    per_sample = (weight * error).sum(dim=(1, 2, 3)) / total.clamp_min(1e-6)
    return (per_sample if sample_weight is None else per_sample * sample_weight).mean()


def min_snr_weight(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, gamma) / SNR for noise prediction (Hang et al., arXiv 2303.09556, section 3.4); all ones when gamma is 0."""
    if gamma == 0:
        return torch.ones(timesteps.shape[0], device=timesteps.device)
    alpha = alphas_cumprod[timesteps].float()
    snr = alpha / (1 - alpha)
    return snr.clamp_max(gamma) / snr


def predicted_x0(noisy: torch.Tensor, noise_pred: torch.Tensor, alpha_cumprod: torch.Tensor) -> torch.Tensor:
    """The clean latents that a noise prediction implies (Ho et al., arXiv 2006.11239, eq. 15). alpha_cumprod: (B,)."""
    alpha = alpha_cumprod.view(-1, 1, 1, 1).to(noisy.dtype)
    return (noisy - (1 - alpha).sqrt() * noise_pred) / alpha.sqrt()


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
