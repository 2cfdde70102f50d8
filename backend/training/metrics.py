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
from backend.training.models.perceptual import LpipsNet
from backend.tryon.conditioning import passes, to_tensor

Picture = NDArray[np.uint8]


def lpips(network: LpipsNet, pictures: Sequence[Picture], others: Sequence[Picture]) -> list[float]:
    """LPIPS (Zhang et al., arXiv 1801.03924) of whole pictures, (S, S, 3) uint8 RGB, at their own size; 0 for equal ones."""
    device = next(network.buffers()).device
    values: list[float] = []
    with torch.no_grad():
        for part in passes(len(pictures), pictures[0].shape[0] * pictures[0].shape[1] if pictures else 0, most=8):
            ours, theirs = (to_tensor(listed[part]).to(device) for listed in (pictures, others))
            values += network.lpips(ours, theirs).cpu().tolist()
    return values


def psnr(picture: Picture, truth: Picture) -> float:
    """10 * log10(1 / MSE) over the whole picture, values scaled to [0, 1]; capped at 100 dB for equal pictures."""
    return masked_psnr(picture, truth, np.full(picture.shape[:2], 255, np.uint8))


def ssim(picture: Picture, truth: Picture, mask: Picture | None = None) -> float:
    """SSIM (Wang et al., 2004) of RGB pictures: 11 px Gaussian window of sigma 1.5, mean over channels; 1 for equal ones.

    mask: (S, S), only windows whose centre lies in it count; None: all that lie wholly inside the picture. The pictures themselves are
    left as they are: filling what lies outside would make them agree there. Raises ValueError for a mask without a pixel.
    """
    from skimage.metrics import structural_similarity  # late: a slow import

    _, windows = structural_similarity(
        picture, truth, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=2, full=True
    )
    reach = 5  # half of the window
    if mask is None:
        return float(windows[reach:-reach, reach:-reach].mean())
    if not mask.any():
        raise ValueError("SSIM over an empty mask")
    return float(windows[mask > 0].mean())


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


def hair_length(hair: Picture, face_box: crop.Box | None) -> float | None:
    """How far the hair hangs below the top of the face box, in heights of that box; None without a face or hair.

    Its lowest place is the 98th percentile of the mask's rows, so that a speck does not decide. hair: (S, S) uint8 0/255.
    """
    rows = np.nonzero(hair)[0]
    if face_box is None or not rows.size:
        return None
    return (float(np.percentile(rows, 98)) - face_box[1]) / max(face_box[3] - face_box[1], 1e-6)


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> list[float]:
    """The cosines of two stacks of vectors row by row, (N, D) each."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return [float(value) for value in (a * b).sum(axis=1) / np.maximum(lengths, 1e-12)]


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
