"""An optional ControlNet (arXiv 2302.05543) beside the UNet: it holds the head's structure while the hair is painted (DESIGN 5.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from backend import weights as pretrained
from backend.weights_load import load_network


def load_controlnet(weights: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The ControlNet below ``paths.weights``. Raises MissingInputError, or InvalidArtifactError when it is none."""
    from diffusers import ControlNetModel

    pretrained.require(weights, "controlnet")
    folder = pretrained.folder(weights, "controlnet")
    return load_network(ControlNetModel, folder, "the ControlNet", torch_dtype=dtype).to(device).eval().requires_grad_(False)


class SteeredUNet(nn.Module):
    """A UNet that adds a ControlNet's residuals to every prediction; in everything else it is the UNet itself, not a copy.

    structure: head-structure maps (B, 3, S, S) in [0, 1]; with guidance the batch comes doubled and so do they. scale: 0 changes nothing.
    """

    def __init__(self, unet: Any, controlnet: Any, structure: torch.Tensor, scale: float) -> None:
        super().__init__()
        self._parts = (unet, controlnet)  # a tuple: neither is registered here a second time
        self._structure, self._scale = structure, scale

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_parts")[0], name)

    def forward(self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **options: Any) -> Any:
        """The UNet's own arguments and result; ``sample`` has 9 channels, of which the ControlNet sees the noisy latents."""
        unet, controlnet = self._parts
        repeats = sample.shape[0] // self._structure.shape[0]
        down, middle = controlnet(
            sample[:, :4],
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            controlnet_cond=self._structure.repeat(repeats, 1, 1, 1).to(sample),
            conditioning_scale=self._scale,
            added_cond_kwargs=options.get("added_cond_kwargs"),
            return_dict=False,
        )
        return unet(
            sample, timestep, encoder_hidden_states=encoder_hidden_states, down_block_additional_residuals=down,
            mid_block_additional_residual=middle, **options,
        )  # fmt: skip
