"""Figures about pictures, each with its definition, and the interval that goes with a mean (DESIGN 4.5)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from backend.imaging import crop, masks
from backend.training.keyed import numpy_generator
from backend.training.models.perceptual import PerceptualNet
from backend.tryon.conditioning import to_tensor

Picture = NDArray[np.uint8]


def lpips(network: PerceptualNet, pictures: Sequence[Picture], others: Sequence[Picture]) -> list[float]:
    """LPIPS (Zhang et al., arXiv 1801.03924) of whole pictures, (S, S, 3) uint8 RGB, at their own size; 0 for equal ones."""
    device = next(network.buffers()).device
    values: list[float] = []
    with torch.no_grad():
        for start in range(0, len(pictures), 8):
            ours, theirs = (to_tensor(part[start : start + 8]).to(device) for part in (pictures, others))
            values += network.lpips(ours, theirs).cpu().tolist()
    return values


def masked_psnr(picture: Picture, truth: Picture, mask: Picture) -> float:
    """10 * log10(1 / MSE) over the mask's pixels, values scaled to [0, 1]; capped at 100 dB for equal pictures.

    Raises ValueError for an empty mask: a figure over nothing would look like a good one.
    """
    inside = mask > 0
    if not inside.any():
        raise ValueError("masked PSNR over an empty mask")
    error = float(np.square(picture[inside].astype(np.float64) - truth[inside]).mean()) / 255.0**2
    return 100.0 if error <= 1e-10 else -10.0 * float(np.log10(error))


def hair_colour(picture: Picture, hair: Picture) -> NDArray[np.float64]:
    """Mean CIE L*a*b* (D65) over the hair without its outermost pixels, (3,). Raises ValueError for an empty mask."""
    core = masks.shrink(hair, max(1.0, 0.01 * hair.shape[0]))
    chosen = core if (core > 0).sum() >= 16 else hair
    if not chosen.any():
        raise ValueError("the hair's colour needs a mask that is not empty")
    from skimage.color import rgb2lab  # late: a slow import

    lab: NDArray[np.float64] = rgb2lab(picture[chosen > 0][None].astype(np.float64) / 255.0)[0]
    return lab.mean(axis=0)


def ciede2000(lab: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """CIEDE2000 colour difference of two L*a*b* values (Sharma et al., 2005); about 1 is just noticeable."""
    from skimage.color import deltaE_ciede2000

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hue of exact greys
        return float(deltaE_ciede2000(lab, other))


def crown(hair: Picture, face_box: crop.Box | None) -> Picture:
    """The hair above the middle of the face: where every hairstyle has hair, so a colour read there is a hair colour."""
    box = crop.mask_box(hair)
    if box is None:
        return hair
    limit = (face_box[1] + face_box[3]) / 2 if face_box else box[1] + 0.6 * (box[3] - box[1])
    upper = hair.copy()
    upper[max(0, round(limit)) :] = 0
    return upper if (upper > 0).sum() >= 16 else hair


def outside_max_abs_diff(picture: Picture, original: Picture, mask: NDArray[np.float32]) -> int:
    """The largest difference of any channel where the feathered mask is 0; 0 means that every such byte is the original's."""
    outside = mask == 0
    return int(cv2.absdiff(picture, original)[outside].max()) if outside.any() else 0


def mean_with_interval(values: Sequence[float], heads: Sequence[str], *, draws: int, seed: int) -> tuple[float, list[float]]:
    """The mean and its 95 % bootstrap interval, resampling heads (photos of one head are not independent).

    values and heads run in parallel. Raises ValueError when there is no value.
    """
    if not values:
        raise ValueError("no value to take the mean of")
    array = np.asarray(values, np.float64)
    names, member = np.unique(np.asarray(heads), return_inverse=True)
    sums, counts = np.bincount(member, weights=array, minlength=len(names)), np.bincount(member, minlength=len(names))
    picked = numpy_generator(seed, "bootstrap", len(values)).integers(len(names), size=(draws, len(names)))
    means = sums[picked].sum(axis=1) / counts[picked].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), [float(low), float(high)]
