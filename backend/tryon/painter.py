"""Head crops plus conditions become painted head crops. The part of the product that needs no detector: evaluation uses it as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backend import weights as pretrained
from backend.config import Config
from backend.training.models.bundle import Bundle
from backend.training.models.stage2_unet import Conditions, HairInpaintingUNet
from backend.training.models.texture_encoder import TextureEncoder
from backend.tryon import conditioning
from backend.tryon.sampling import Sampler, sample, scheduler_config
from backend.tryon.steering import load_controlnet


def device_and_dtype(config: Config) -> tuple[torch.device, torch.dtype]:
    """Where networks run: the card in bf16 where there is one and the configuration allows it, else the CPU in float32."""
    wanted = config.device
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


ALIGNMENT = 64  # bytes; what torch's own allocations on the CPU begin at


def align(network: torch.nn.Module) -> None:
    """Moves weights that begin at an odd place in memory to one that torch would have given them.

    A safetensors file puts tensors at any multiple of 8 bytes, by the length of its header. On a CPU the last bits of a product with a single
    row depend on that (2.7e-5 of a float32 layer 1280 wide), so one network out of two files would paint two pictures.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


@dataclass(frozen=True)
class PaintRequest:
    """One head to paint. style: a 224 x 224 uint8 RGB picture or None; identity: (512,) or None; prompt: may be empty.

    photo: (S, S, 3) uint8 RGB, what a strength below 1 begins with; needed only there.
    """

    head: conditioning.HeadInput
    style: NDArray[np.uint8] | None
    identity: NDArray[np.float32] | None
    prompt: str
    seed: int
    photo: NDArray[np.uint8] | None = None


class Painter:
    """The networks that paint, loaded once and shared; prompts are encoded once and remembered.

    The UNet computes in the device's precision, whatever it was trained in: what is evaluated and what is served are one.
    """

    def __init__(self, model: HairInpaintingUNet, texture_encoder: TextureEncoder, config: Config, *, vae: Any = None) -> None:
        pretrained.require(config.paths.weights, "inpainting")
        self._device, dtype = device_and_dtype(config)
        inpainting = conditioning.inpainting_folder(config.paths.weights)
        model.unet.to(dtype)
        self._texts = conditioning.TextEncoders(inpainting, device=self._device, dtype=dtype)
        self._remembered: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.texture_encoder = texture_encoder.to(self._device)
        empty_text, empty_pooled = self._text("")
        self.sampler = Sampler(
            model=model.to(self._device),
            vae=vae if vae is not None else conditioning.load_vae(inpainting, device=self._device, dtype=dtype),
            scheduler_config=scheduler_config(inpainting),
            empty_text=empty_text,
            empty_pooled=empty_pooled,
            controlnet=load_controlnet(config.paths.weights, device=self._device, dtype=dtype) if config.sample.controlnet_scale else None,
            controlnet_scale=config.sample.controlnet_scale,
        )
        if self._device.type == "cpu":  # a card's memory is given out aligned
            align(model)
            align(self.texture_encoder)

    @classmethod
    def of_bundle(cls, bundle: Bundle, config: Config) -> Painter:
        """The painter of a deployed bundle."""
        return cls(bundle.model, bundle.texture_encoder, config)

    def paint(
        self,
        requests: Sequence[PaintRequest],
        *,
        steps: int,
        guidance: float,
        strength: float = 1.0,
        on_step: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Paints a batch: (B, 3, S, S) float32 in about [-1, 1]; not yet checked for being finite. Raises Cancelled.

        strength: 1 begins with noise, less with the requests' photos (``sampling.sample``).
        """
        return sample(
            self.sampler,
            [request.head for request in requests],
            self.conditions(requests),
            seeds=[request.seed for request in requests],
            steps=steps,
            guidance=guidance,
            strength=strength,
            photos=[request.photo for request in requests if request.photo is not None],
            on_step=on_step,
            cancelled=cancelled,
        )

    def conditions(self, requests: Sequence[PaintRequest]) -> Conditions:
        """The condition tensors of a batch, on the CPU."""
        texts = [self._text(request.prompt) for request in requests]
        identity, identity_valid = conditioning.identity_tensor([request.identity for request in requests])
        tokens = self.sampler.model.injector.style_tokens
        grey = np.full((8, 8, 3), 127, np.uint8)
        styles = [
            conditioning.style_features(self.texture_encoder, [request.style if request.style is not None else grey], tokens)
            for request in requests
        ]
        return Conditions(
            text=torch.cat([text for text, _ in texts]),
            pooled=torch.cat([pooled for _, pooled in texts]),
            style=torch.cat(styles),
            style_valid=torch.tensor([request.style is not None for request in requests]),
            identity=identity,
            identity_valid=identity_valid,
        )

    def _text(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        if prompt not in self._remembered:
            if len(self._remembered) > 256:  # people type many prompts; a forgotten one is encoded again
                self._remembered.clear()
            self._remembered[prompt] = self._texts.encode([prompt])
        return self._remembered[prompt]
