"""A head in a photo: the square around face and hair, and whose hair is whose (DESIGN 4.1: serving takes Stage 0's crop)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.imaging import crop, masks
from backend.training.training_face import DetectedFace
from backend.tryon.segmentation import HairParser

Picture = NDArray[np.uint8]
PARSED_SIDE = 1024  # px, at most: the parser itself sees 512, and a close selfie's square has 100 megapixels
ENLARGED, ENLARGEMENTS = 1.5, 3  # how far and how often a square grows in search of hair that leaves it
TOUCHING = 0.01  # share of the side: hair so near to an edge goes on beyond it


@dataclass(frozen=True)
class Head:
    """A head found in a photo, its square cut out.

    photo: (S, S, 3) uint8 at the model's resolution. native: (side, side, 3) at the photo's own scale. hair, skin: (P, P) uint8 0/255 at a
    scale between the two; skin is face, ears and neck. own: (P, P) 0/255, what lies nearer to this face than to any other. face_box: in
    ``photo``'s pixels.
    """

    square: crop.Square
    photo: Picture
    native: Picture
    hair: Picture
    skin: Picture
    own: Picture
    face_box: crop.Box | None


def find_head(parser: HairParser, image: Picture, face: DetectedFace | None, others: Sequence[DetectedFace], resolution: int) -> Head:
    """The head of ``face``, or of a photo from behind (None), in (H, W, 3) uint8 RGB. others: the photo's other faces, whose hair is theirs.

    The square is laid around the face, and around face and hair once the hair is found; while hair reaches an edge that is not the photo's, the
    search goes on beyond it.
    """
    height, width = image.shape[:2]
    frame = (width, height)
    whole = (0.0, 0.0, float(width), float(height))
    square = crop.head_square(whole if face is None else None, face.box if face else None, frame)
    hair = _own_hair(parser, image, square, face, others)
    for _ in range(ENLARGEMENTS):
        if not _goes_on(_hanging(hair, square, face), square, frame):
            break
        square = _larger(square, frame)
        hair = _own_hair(parser, image, square, face, others)
    found = crop.mask_box(_hanging(hair, square, face))
    if found is not None:
        scale = square.side / hair.shape[0]
        box = tuple(v * scale + start for v, start in zip(found, (square.x0, square.y0) * 2, strict=True))
        clipped = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], whole[2]), min(box[3], whole[3]))
        if clipped[0] < clipped[2] and clipped[1] < clipped[3]:
            square = crop.head_square(clipped, face.box if face else None, frame)
    native = crop.crop_square(image, square)
    seen = _seen(native)
    hair, skin = parser.hair_and_skin(seen)
    own = territory(face, others, square, hair.shape[0])
    face_box = square.scaled_box(face.box, resolution) if face else None
    return Head(square, crop.resize(native, resolution), native, np.minimum(hair, own), np.minimum(skin, own), own, face_box)


def territory(face: DetectedFace | None, others: Sequence[DetectedFace], square: crop.Square, side: int) -> Picture:
    """What of a square lies nearer to ``face`` than to any of the others, (side, side) uint8 0/255; distances in each face's own size, and
    half as long downwards, where hair hangs."""
    rivals = [other for other in others if face is not None and not _same(face, other)]
    if face is None or not rivals:
        return np.full((side, side), 255, np.uint8)
    distances = [_distance(square.scaled_box(one.box, side), side) for one in (face, *rivals)]
    return np.where(distances[0] <= np.min(distances[1:], axis=0), 255, 0).astype(np.uint8)


def _same(face: DetectedFace, other: DetectedFace) -> bool:
    """Whether the other is a second finding of the same face: its centre lies in it."""
    x, y = (other.box[0] + other.box[2]) / 2, (other.box[1] + other.box[3]) / 2
    return face.box[0] <= x <= face.box[2] and face.box[1] <= y <= face.box[3]


def _distance(box: crop.Box, side: int) -> NDArray[np.float32]:
    across, down = np.arange(side, dtype=np.float32)[None], np.arange(side, dtype=np.float32)[:, None]
    beside = np.maximum(np.maximum(box[0] - across, across - box[2]), 0)
    below = np.maximum(np.maximum(box[1] - down, down - box[3]), 0) / 2
    return np.asarray(np.hypot(beside, below) / max(box[2] - box[0], box[3] - box[1]), np.float32)


def _own_hair(
    parser: HairParser, image: Picture, square: crop.Square, face: DetectedFace | None, others: Sequence[DetectedFace]
) -> Picture:
    hair = parser.hair(_seen(crop.crop_square(image, square)))
    return np.minimum(hair, territory(face, others, square, hair.shape[0]))


def _seen(native: Picture) -> Picture:
    """The crop as the parser gets it."""
    return crop.resize(native, min(native.shape[0], PARSED_SIDE))


def _hanging(hair: Picture, square: crop.Square, face: DetectedFace | None) -> Picture:
    """The parts of the hair that reach the head, a face's size around the face: dark clothes that were taken for hair are not followed."""
    kept = masks.without_specks(hair)
    if face is None:
        return kept
    side = hair.shape[0]
    x0, y0, x1, y1 = square.scaled_box(face.box, side)
    reach = max(x1 - x0, y1 - y0)
    left, top, right, bottom = (int(np.clip(v, 0, side)) for v in (x0 - reach, y0 - reach, x1 + reach, y1 + reach))
    _, numbered = cv2.connectedComponents(kept, connectivity=8)
    near = np.unique(numbered[top:bottom, left:right])
    return np.where(np.isin(numbered, near[near > 0]), 255, 0).astype(np.uint8)


def _goes_on(kept: Picture, square: crop.Square, frame: tuple[int, int]) -> bool:
    """Whether hair lies at an edge of the square beyond which there is more of the photo."""
    rim = max(1, round(TOUCHING * kept.shape[0]))
    left, top, right, bottom = square.inner_edges(frame)
    return bool(
        (left and kept[:, :rim].any()) or (top and kept[:rim].any()) or (right and kept[:, -rim:].any()) or (bottom and kept[-rim:].any())
    )


def _larger(square: crop.Square, frame: tuple[int, int]) -> crop.Square:
    """The square grown about its upper middle, since hair hangs down, and moved inside the photo where it fits."""
    side = round(ENLARGED * square.side)
    return crop.Square(
        crop.inside(square.x0 - (side - square.side) // 2, side, frame[0]),
        crop.inside(square.y0 - (side - square.side) // 8, side, frame[1]),
        side,
    )
