"""The base model's noise schedule as training needs it: noising, the target, what a prediction implies, loss weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from backend.errors import UsageError

Prediction = Literal["epsilon", "v_prediction"]
"""What the network predicts: the noise, or the velocity (Salimans and Ho, arXiv 2202.00512)."""


class NoiseSchedule:
    """Forward process of a scheduler's configuration (``scheduler_config.json`` of the base model), through diffusers' DDPMScheduler.

    kind: what the network predicts. steps: number of training timesteps. Latents are (B, C, h, w), timesteps (B,) int64. Raises
    UsageError for a prediction type that Stage 2 does not train.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        kind = config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise UsageError(f"the base model predicts '{kind}'; Stage 2 trains epsilon and v_prediction")
        self.kind: Prediction = "v_prediction" if kind == "v_prediction" else "epsilon"
        self._forward = DDPMScheduler.from_config(config)
        self.steps = len(self._forward.alphas_cumprod)

    def alpha(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Cumulative alphas of the timesteps, (B,) float32, on their device."""
        alphas: torch.Tensor = self._forward.alphas_cumprod.to(timesteps.device)
        return alphas[timesteps]

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """sqrt(a) clean + sqrt(1 - a) noise (arXiv 2006.11239, eq. 4)."""
        noisy: torch.Tensor = self._forward.add_noise(clean, noise, timesteps)
        return noisy

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should predict: the noise, or the velocity sqrt(a) noise - sqrt(1 - a) clean."""
        if self.kind == "epsilon":
            return noise
        velocity: torch.Tensor = self._forward.get_velocity(clean, noise, timesteps)
        return velocity

    def predicted_x0(self, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The clean latents that a prediction implies (arXiv 2006.11239, eq. 15; arXiv 2202.00512, appendix D)."""
        alpha = self.alpha(timesteps).view(-1, 1, 1, 1).to(noisy.dtype)
        if self.kind == "epsilon":
            return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction

    def min_snr_weight(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Loss factors (B,) that count an error of the clean picture min(SNR, gamma) times (Hang et al., arXiv 2303.09556, section 3.4).

        For noise min(SNR, gamma) / SNR, for velocity min(SNR, gamma) / (SNR + 1); all ones when gamma is 0.
        """
        if gamma == 0:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr: torch.Tensor = compute_snr(self._forward, timesteps).float().clamp_min(1e-8)  # zero terminal SNR: the last timestep has none
        return snr.clamp_max(gamma) / (snr if self.kind == "epsilon" else snr + 1)
