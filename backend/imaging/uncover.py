"""What old hair uncovers when it goes: background and clothes drawn on from the photo beside it, neck and ears in the photo's own light.

The bald image hides the whole edit region from the model, which therefore makes up everything in it, while only where hair was or has come is pasted
(``masks.changed_region``). Where long hair goes, that left a patch of invented background in the shape of the old hair, a halo. Held
against the same head rendered with the new hair, the colours there are off by half as much with this (docs/method.md).
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging.bald import STRAY_MARGIN, WORK_SIDE, filled
from backend.imaging.masks import CHANGED_MARGIN, any_coverage, grow

Picture = NDArray[np.uint8]
Field = NDArray[np.float32]
SOFT = 0.008  # blur of the line between what stays painted and what is drawn on, share of the side
COARSE = 0.008  # what is coarser than this is taken from the photo, what is finer from the painting, share of the side


def uncovered(photo: Picture, painted: Picture, before: Picture, after: Picture, skin_before: Picture, skin_after: Picture) -> Picture:
    """The painted head crop with what it shows beside hair brought into line with the photo around the old hair.

    photo, painted: (S, S, 3) uint8 RGB. before, after: (S, S) uint8 0/255, the hair of each; skin_before, skin_after: face, ears and neck of
    each, without which (all zero) skin is taken for background. New hair is left as it is painted. Returns (S, S, 3) uint8 RGB.
    """
    side = painted.shape[0]
    if not before.any():
        return painted
    work = min(side, WORK_SIDE)
    ours, theirs = (cv2.resize(image, (work, work), interpolation=cv2.INTER_AREA) for image in (photo, painted))
    old, new, skin, new_skin = (any_coverage(mask, work) for mask in (before, after, skin_before, skin_after))
    gone = grow(old, CHANGED_MARGIN * work)
    hair = _soft(grow(new, 1), work)
    stays = np.maximum(hair, _soft(new_skin, work))
    hole = np.maximum(gone, grow(skin, STRAY_MARGIN * work))
    surroundings = cv2.inpaint(ours, hole, 3, cv2.INPAINT_TELEA)
    beside = _coarse(surroundings.astype(np.float32) - theirs, 1 - stays, work)
    shared = np.where((gone == 0) & (grow(new, CHANGED_MARGIN * work) == 0), 255, 0).astype(np.uint8)
    light = filled(ours.astype(np.float32) - theirs, shared) if shared.any() else np.zeros_like(beside)
    shift = beside * (1 - stays) + light * (stays - np.minimum(hair, stays))
    if work < side:
        shift = cv2.resize(shift, (side, side), interpolation=cv2.INTER_LINEAR)
    return np.clip((painted + shift).round(), 0, 255).astype(np.uint8)


def _soft(mask: Picture, work: int) -> Field:
    """A mask with a soft edge, (S, S, 1) float32 in [0, 1]."""
    return cv2.GaussianBlur(mask, (0, 0), max(SOFT * work, 0.5)).astype(np.float32)[..., None] / 255.0


def _coarse(field: Field, weight: Field, work: int) -> Field:
    """The field's coarse part, from where the weight is; (S, S, 3) float32."""
    sigma = COARSE * work
    total = cv2.GaussianBlur(weight, (0, 0), sigma)[..., None]
    return np.asarray(cv2.GaussianBlur(field * weight, (0, 0), sigma) / np.maximum(total, 1e-4), np.float32)
