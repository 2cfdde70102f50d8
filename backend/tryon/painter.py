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
from backend.tryon.few_step import Kind
from backend.tryon.placement import Placement
from backend.tryon.remembered import Remembered
from backend.tryon.sampling import Sampler, sample, scheduler_config
from backend.tryon.steering import load_controlnet

PROMPTS = 256  # that are remembered


def device_and_dtype(config: Config) -> tuple[torch.device, torch.dtype]:
    """Where networks run: the card in bf16 where there is one and the configuration allows it, else the CPU in float32."""
    wanted = config.device
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


@dataclass(frozen=True)
class PaintRequest:
    """One head to paint. style: a 224 x 224 uint8 RGB picture, or ``Painter.style_features`` of one, or None; identity: (512,) or None;
    prompt: may be empty.

    photo: (S, S, 3) uint8 RGB, what a strength below 1 begins with; needed only there. own_words: the prompt holds words that a person has
    typed; it is then not remembered.
    """

    head: conditioning.HeadInput
    style: NDArray[np.uint8] | torch.Tensor | None
    identity: NDArray[np.float32] | None
    prompt: str
    seed: int
    photo: NDArray[np.uint8] | None = None
    own_words: bool = False


class Painter:
    """The networks that paint, loaded once and shared; prompts are encoded once and remembered, but for those in a person's own words.

    The UNet computes in the device's precision, whatever it was trained in: what is evaluated and what is served are one. few_step: the
    kind of LoRA that is fused into ``model`` already, if any. placement: as ``sample.offload`` says where it is left out.
    """

    def __init__(
        self, model: HairInpaintingUNet, texture_encoder: TextureEncoder, config: Config, *, vae: Any = None,
        few_step: Kind | None = None, placement: Placement | None = None,
    ) -> None:  # fmt: skip
        pretrained.require(config.paths.weights, "inpainting")
        device, dtype = device_and_dtype(config)
        self._placement = placement or Placement(device, torch.device("cpu") if config.sample.offload else None)
        home = self._placement.home
        inpainting = conditioning.inpainting_folder(config.paths.weights)
        model.unet.to(dtype)
        self._texts = conditioning.TextEncoders(inpainting, device=home, dtype=dtype)
        self._remembered: Remembered[str, tuple[torch.Tensor, torch.Tensor]] = Remembered(PROMPTS)
        self.texture_encoder = texture_encoder.to(home)
        empty_text, empty_pooled = self._text("")
        self.sampler = Sampler(
            model=model.to(home),
            vae=vae if vae is not None else conditioning.load_vae(inpainting, device=home, dtype=dtype),
            scheduler_config=scheduler_config(inpainting),
            empty_text=empty_text,
            empty_pooled=empty_pooled,
            controlnet=load_controlnet(config.paths.weights, device=home, dtype=dtype) if config.sample.controlnet_scale else None,
            controlnet_scale=config.sample.controlnet_scale,
            few_step=few_step,
            placement=self._placement,
        )

    @classmethod
    def of_bundle(cls, bundle: Bundle, config: Config, *, few_step: Kind | None = None) -> Painter:
        """The painter of a deployed bundle."""
        return cls(bundle.model, bundle.texture_encoder, config, few_step=few_step)

    def compile(self, side: int, guidance: float) -> None:
        """Compiles the UNet, in place and for heads of this side, by painting one: the first person does not wait for it."""
        self.sampler.model.unet.compile()
        grey, nothing = np.full((side, side, 3), 127, np.uint8), np.zeros((side, side), np.uint8)
        head = conditioning.HeadInput(nothing, grey, grey)
        self.paint([PaintRequest(head, None, None, "", 0)], steps=1, guidance=guidance)

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
        texts = [self._encoded(request.prompt) if request.own_words else self._text(request.prompt) for request in requests]
        identity, identity_valid = conditioning.identity_tensor([request.identity for request in requests])
        styles = [style if isinstance(style, torch.Tensor) else self.style_features(style) for style in (r.style for r in requests)]
        return Conditions(
            text=torch.cat([text for text, _ in texts]),
            pooled=torch.cat([pooled for _, pooled in texts]),
            style=torch.stack(styles),
            style_valid=torch.tensor([request.style is not None for request in requests]),
            identity=identity,
            identity_valid=identity_valid,
        )

    def style_features(self, picture: NDArray[np.uint8] | None) -> torch.Tensor:
        """What the UNet is told of a style picture (224, 224, 3) uint8 RGB: (S, 2048) float32 on the CPU. None: of nothing, flagged so."""
        if picture is None:
            picture = np.full((8, 8, 3), 127, np.uint8)
        with self._placement.used(self.texture_encoder):
            return conditioning.style_features(self.texture_encoder, [picture], self.sampler.model.injector.style_tokens)[0]

    def _text(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._remembered.get(prompt, lambda: self._encoded(prompt))

    def _encoded(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._texts.encode([prompt], self._placement)
