"""What goes into a try-on and what comes out. No torch here: the web server starts without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from backend.config import SampleConfig
from backend.errors import DeepHairError
from backend.imaging.crop import Box
from backend.training.data_processing.prompts import NEUTRAL_PROMPT, prompt_from_choice

Mode = Literal["full", "colour", "shape"]

SEEDS = 2**32  # a job's seed is below this; the evaluation draws no others, so that each of its pictures can be asked for


class Cancelled(Exception):
    """The caller asked to stop; nothing was produced."""


class TryOnError(DeepHairError):
    """A photo that cannot be worked with, in words.

    Codes: no_face, many_faces, too_small, side_view, no_hair, no_own_hair, flat_output, unchanged, nothing_to_try, mask_size, empty_mask,
    few_step.
    """


@dataclass(frozen=True)
class TryOnRequest:
    """target, reference: (H, W, 3) uint8 RGB, upright. At least one of reference, prompt and the four attributes.

    face: index into the preview's faces. mask: (H, W) uint8 of the target's size, zero where nothing may change; it replaces the
    automatic edit region. mode: ``full`` takes the wanted hair whole, ``colour`` only its colour, ``shape`` all but its colour
    (``finishing``). strength: 0..1, see ``sampling.sample``. length, curl, color, bangs: keys of ``prompts.choices()``. profile: the ICC profile
    of target's numbers, which is the result's, too; None for sRGB. reference is sRGB. remember: whether what the networks make of the
    reference may outlive the request; only for a picture that is offered to everybody, never for a person's own.
    """

    target: NDArray[np.uint8]
    reference: NDArray[np.uint8] | None
    prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    face: int | None = None
    mask: NDArray[np.uint8] | None = None
    mode: Mode = "full"
    strength: float = 1.0
    length: str | None = None
    curl: str | None = None
    color: str | None = None
    bangs: str | None = None
    profile: bytes | None = None
    remember: bool = False

    def words(self) -> str:
        """The whole prompt: the attributes in Stage 0's own phrases, then the free words. Raises UsageError for an unknown attribute."""
        picked = prompt_from_choice(self.length, self.curl, self.color, self.bangs)
        if not self.prompt:
            return picked
        return self.prompt if picked == NEUTRAL_PROMPT else f"{picked}, {self.prompt}"

    def check(self) -> None:
        """Raises TryOnError, or UsageError for an unknown attribute, where no picture could fit the request, whatever the photos show."""
        words = self.words()
        if self.reference is None and words == NEUTRAL_PROMPT:
            raise TryOnError(
                "neither a reference photo nor a description of the hair was given", hint="give one of the two", code="nothing_to_try"
            )
        if self.mask is not None:
            check_mask(self.mask, *self.target.shape[:2])


def sampling_of(settings: SampleConfig, steps: int | None, guidance: float | None, strength: float) -> tuple[int, float]:
    """The steps and guidance of a job that asks for these; None takes the settings' own.

    Raises TryOnError few_step for what a distilled LoRA cannot do: it knows its few steps, has guidance inside, and begins with noise alone
    (from a photo SDXL-Lightning paints badly; training_memory.md, section 5).
    """
    kind = settings.few_step
    if kind == "none":
        return steps or settings.steps, guidance or settings.guidance
    steps, guidance = steps or settings.few_steps, guidance or 1.0
    least, most, most_guidance = (4, 4, 1.0) if kind == "lightning" else (1, 8, 2.0)
    if not least <= steps <= most or guidance > most_guidance or strength < 1.0:
        taken = f"{least} to {most} steps" if least < most else f"{most} steps"
        raise TryOnError(
            f"steps {steps}, guidance {guidance:g} and strength {strength:g} were asked for; with the few-step LoRA that is loaded ({kind}) it "
            f"is {taken}, guidance up to {most_guidance:g} and strength 1",
            hint="leave steps, guidance and strength out, or serve with sample.few_step=none",
            code="few_step",
        )
    return steps, guidance


def check_mask(mask: NDArray[np.uint8], height: int, width: int) -> None:
    """Raises TryOnError mask_size or empty_mask where ``mask`` (H, W) cannot be that of a target of this upright size."""
    if mask.shape != (height, width):
        raise TryOnError(
            f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, the upright portrait is {width} x {height}",
            hint="paint the mask at the portrait's own size",
            code="mask_size",
        )
    if not mask.any():
        raise TryOnError("the mask is empty: nothing may change", hint="paint where the hair may change", code="empty_mask")


@dataclass(frozen=True)
class TryOnResult:
    """image: (H, W, 3) uint8 RGB of the target's size. mask: (H, W) float32; where it is 0 image equals target byte for byte."""

    image: NDArray[np.uint8]
    mask: NDArray[np.float32]
    info: dict[str, Any]


@dataclass(frozen=True)
class FaceInfo:
    """A detected face. box: x0, y0, x1, y1 and landmarks (5 x 2) in the picture's pixels."""

    box: Box
    confidence: float
    landmarks: list[list[float]]


@dataclass(frozen=True)
class Preview:
    """What would be worked on. hair_mask: (H, W) uint8 0/255 of the largest face's head; all zero without a face."""

    faces: list[FaceInfo]
    hair_mask: NDArray[np.uint8]
