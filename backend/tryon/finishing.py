"""From the painted head crop to the finished picture, for each mode (DESIGN 5.6).

The model paints whole hairstyles; its style tokens do not keep colour and shape apart. So the two partial modes take apart what it
has painted, by the colour statistics of hair in CIELAB (Reinhard et al., 2001):

- ``colour``: the photo's own hair, every strand at the photo's own resolution, in the colour of the painted hair. The painting and not the
  reference gives the colour, since it is that colour under the photo's own light; and it is there for words, too.
- ``shape``: the painted hair in the colour of the photo's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging import composite, crop, masks
from backend.imaging.recolour import colour_statistics, recoloured
from backend.imaging.uncover import uncovered
from backend.tryon.heads import Head
from backend.tryon.values import Mode, TryOnError

MAX_GAIN = 2.0  # of the spread of lightness and colour: what is beyond shows a photo's noise
MIN_PAINTED = 0.004  # share of the crop that must be painted hair for its colour to be read
WORK_SIDE = 1024  # px; masks of larger crops are feathered at this side
SOFT = 0.006  # blur of the painted hair's mask, share of the crop's side


@dataclass(frozen=True)
class Painted:
    """What the model made of a head: picture (S, S, 3) uint8, its hair and skin (S, S) 0/255, and the region (S, S) 0/255 it might paint in."""

    picture: NDArray[np.uint8]
    hair: NDArray[np.uint8]
    skin: NDArray[np.uint8]
    region: NDArray[np.uint8]


def finish(
    photo: NDArray[np.uint8],
    head: Head,
    painted: Painted,
    *,
    mode: Mode,
    feather: float,
    chosen: NDArray[np.uint8] | None,
) -> composite.Pasted:
    """The photo (H, W, 3) with the painting laid in. chosen: the person's own mask (H, W), outside which nothing changes, or None.

    The partial modes want hair in the photo (``require_hair``, before anything is painted). Raises TryOnError no_hair where they find none
    in the painting to take a colour from.
    """
    resolution = painted.picture.shape[0]
    before = crop.resize(head.hair, resolution)
    if mode == "colour":
        return _colour_only(photo, head, painted, before, feather, chosen)
    picture = painted.picture if mode == "full" else _own_colour(head, painted, before)
    if chosen is not None:
        return composite.paste_back(photo, picture, painted.region, head.square, _fitting(feather, painted.region), chosen)
    region = masks.changed_region(painted.region, before, painted.hair, head.face_box)
    picture = uncovered(head.photo, picture, before, painted.hair, crop.resize(head.skin, resolution), painted.skin)
    return composite.paste_back(photo, picture, region, head.square, feather)


def _fitting(feather: float, region: NDArray[np.uint8]) -> float:
    """The soft edge's width, no wider than leaves the middle of a thin stroke of the brush whole; share of the side."""
    return min(feather, float(cv2.distanceTransform(region, cv2.DIST_L2, 5).max()) / region.shape[0])


def _colour_only(
    photo: NDArray[np.uint8],
    head: Head,
    painted: Painted,
    before: NDArray[np.uint8],
    feather: float,
    chosen: NDArray[np.uint8] | None,
) -> composite.Pasted:
    new = np.minimum(painted.hair, painted.region)
    require_hair(new, "what the model painted", "colour")
    own, wanted = colour_statistics(head.photo, before), colour_statistics(painted.picture, new)
    work = min(head.square.side, max(WORK_SIDE, before.shape[0]))
    # the soft edge lies half inside and half outside of the hair, so that no rim keeps the old colour
    region = masks.grow(crop.resize(head.hair, work), feather / 2 * work)
    return composite.paste_back(photo, recoloured(head.native, own, wanted, max_gain=MAX_GAIN), region, head.square, feather, chosen)


def _own_colour(head: Head, painted: Painted, before: NDArray[np.uint8]) -> NDArray[np.uint8]:
    new = np.minimum(painted.hair, painted.region)
    require_hair(new, "what the model painted", "shape")
    own, wanted = colour_statistics(painted.picture, new), colour_statistics(head.photo, before)
    moved = recoloured(painted.picture, own, wanted, max_gain=MAX_GAIN)
    soft = cv2.GaussianBlur(new, (0, 0), max(SOFT * new.shape[0], 0.5)).astype(np.float32)[..., None] / 255.0
    return (painted.picture + (moved.astype(np.float32) - painted.picture) * soft).round().astype(np.uint8)


def require_hair(hair: NDArray[np.uint8], where: str, mode: str, *, code: str = "no_hair") -> None:
    """Raises TryOnError with ``code`` where a mask (S, S) has too little hair for a partial mode to read a colour from. where: in words."""
    if float((hair > 0).mean()) < MIN_PAINTED:
        raise TryOnError(
            f"there is no hair in {where}, and mode '{mode}' needs its colour",
            hint="use mode 'full', or try another seed or photo",
            code=code,
        )
