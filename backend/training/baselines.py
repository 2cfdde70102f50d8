"""What anybody could do without a model: the pictures that every figure is held against (facts of peers, sections 3 and 7)."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging import composite, crop, masks
from backend.imaging.recolour import colour_statistics, recoloured
from backend.training.prepared import Sample

Picture = NDArray[np.uint8]


def colour_transfer(target: Sample, reference: Sample, feather: float) -> Picture:
    """The target's photo with its hair recoloured: mean and spread of L*, a*, b* become the reference hair's (Reinhard et al., 2001).

    Returns (S, S, 3) uint8 RGB; shape, length and curl stay the target's. Raises ValueError when either photo has no hair.
    """
    if not target.hair.any() or not reference.hair.any():
        raise ValueError("colour transfer needs hair in both photos")
    own, wanted = colour_statistics(target.photo, target.hair), colour_statistics(reference.photo, reference.hair)
    rgb = recoloured(target.photo, own, wanted)
    square = crop.Square(0, 0, target.photo.shape[0])
    return composite.paste_back(target.photo, rgb, target.hair, square, feather).image


def crop_paste(target: Sample, reference: Sample, bald: Picture, region: Picture, feather: float) -> tuple[Picture, Picture]:
    """The reference's hair cut out, moved and scaled so that its face lies on the target's, and laid over the bald image.

    bald: (S, S, 3) uint8 RGB; region: (S, S) 0/255, where hair may be. Returns the picture, pasted back like a model's, and the
    hair laid there, (S, S) uint8 0/255.
    """
    side = target.photo.shape[0]
    matrix = face_to_face(reference.hair, reference.face_box, target.hair, target.face_box)
    moved = cv2.warpAffine(reference.photo, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    hair = np.minimum(cv2.warpAffine(reference.hair, matrix, (side, side), flags=cv2.INTER_NEAREST), region).astype(np.uint8)
    laid = np.where(hair[..., None] > 0, moved, bald).astype(np.uint8)
    changed = masks.changed_region(region, target.hair, hair, target.face_box)
    pasted = composite.paste_back(target.photo, laid, changed, crop.Square(0, 0, side), feather)
    return pasted.image, hair


def face_to_face(hair: Picture, face_box: crop.Box | None, other_hair: Picture, other_box: crop.Box | None) -> NDArray[np.float32]:
    """The (2, 3) map that lays a face box (or, where one is missing, the box of the hair) on another: one scale and a shift."""
    both = face_box is not None and other_box is not None
    own = (face_box if both else crop.mask_box(hair)) or (0.0, 0.0, *map(float, hair.shape[::-1]))
    onto = (other_box if both else crop.mask_box(other_hair)) or own
    scale = max(onto[2] - onto[0], onto[3] - onto[1]) / max(own[2] - own[0], own[3] - own[1], 1e-6)
    across = (onto[0] + onto[2]) / 2 - scale * (own[0] + own[2]) / 2
    return np.array([[scale, 0.0, across], [0.0, scale, onto[1] - scale * own[1]]], np.float32)
