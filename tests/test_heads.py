"""Finding a head: whose hair is whose, how far hair is followed, and at which scale it is looked at. The parser here knows the truth."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from backend.imaging import crop
from backend.training.training_face import DetectedFace
from backend.tryon import heads
from backend.tryon.heads import find_head, territory

HAIR, WALL = (40, 30, 20), 180


class TrueParser:
    """Hair is what has hair's colour; it writes down at which sides it was asked."""

    def __init__(self) -> None:
        self.sides: list[int] = []

    def hair(self, image: np.ndarray) -> np.ndarray:
        self.sides.append(image.shape[0])
        return np.where(np.abs(image.astype(int) - HAIR).sum(axis=2) < 40, 255, 0).astype(np.uint8)

    def hair_and_skin(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.hair(image), np.zeros(image.shape[:2], np.uint8)


def _face(x: float, y: float, size: float) -> DetectedFace:
    box = (x - 0.4 * size, y - 0.5 * size, x + 0.4 * size, y + 0.5 * size)
    return DetectedFace(box, 0.9, np.zeros((5, 2), np.float32))


def _photo(height: int, width: int, *styles: tuple[int, int, int, int]) -> np.ndarray:
    photo = np.full((height, width, 3), WALL, np.uint8)
    for x0, y0, x1, y1 in styles:
        cv2.rectangle(photo, (x0, y0), (x1, y1), HAIR, -1)
    return photo


def _find(photo: np.ndarray, face: DetectedFace, *others: DetectedFace) -> tuple[Any, TrueParser]:
    parser = TrueParser()
    return find_head(parser, photo, face, others, 128), parser  # type: ignore[arg-type]


@pytest.mark.parametrize("bottom", [500, 900, 1250])
def test_hair_is_followed_beyond_the_first_square(bottom: int) -> None:
    """Down to the hips it left the square around the face, and what hung below stayed in the picture as it was; Stage 0 sees it by the label."""
    face = _face(460, 325, 150)
    head, parser = _find(_photo(1600, 900, (330, 180, 590, bottom)), face)
    wanted = crop.head_square((330.0, 180.0, 591.0, bottom + 1.0), face.box, (900, 1600))
    assert np.abs(np.subtract(*((s.x0, s.y0, s.side) for s in (head.square, wanted)))).max() <= 4  # the mask may be smaller than the photo
    assert len(parser.sides) <= 2 + heads.ENLARGEMENTS


def test_short_hair_is_looked_for_once() -> None:
    head, parser = _find(_photo(1600, 900, (380, 200, 540, 300)), _face(460, 325, 150))
    assert len(parser.sides) == 2 and head.hair.any()


def test_hair_at_the_photos_own_edge_is_not_searched_beyond() -> None:
    head, parser = _find(_photo(560, 500, (150, 100, 350, 559)), _face(250, 250, 180))
    assert len(parser.sides) == 2 and head.square.y0 + head.square.side >= 560


def test_dark_clothes_are_not_followed() -> None:
    """A parser takes them for hair now and then; the square grew to the feet, and the head became small in it."""
    plain, _ = _find(_photo(1600, 900, (380, 200, 540, 300)), _face(460, 325, 150))
    dressed, parser = _find(_photo(1600, 900, (380, 200, 540, 300), (250, 560, 670, 1500)), _face(460, 325, 150))
    assert dressed.square == plain.square and len(parser.sides) == 2
    assert (dressed.hair > 0).sum() > (plain.hair > 0).sum(), "what lies in the square is still to be seen"


def test_a_neighbours_hair_is_the_neighbours() -> None:
    """Two people side by side: the other one's hair is neither replaced nor painted on, whoever is chosen."""
    left, right = _face(300, 300, 150), _face(560, 320, 140)
    photo = _photo(800, 900, (220, 180, 390, 480), (480, 200, 650, 600))
    for face, other, columns in ((left, right, slice(480, 651)), (right, left, slice(220, 391))):
        head, _ = _find(photo, face, other)
        scale = head.square.side / head.hair.shape[0]
        enlarged = cv2.resize(head.hair, (head.square.side, head.square.side), interpolation=cv2.INTER_NEAREST)
        laid = np.zeros((2000, 2000), np.uint8)
        y, x = head.square.y0 + 500, head.square.x0 + 500
        laid[y : y + head.square.side, x : x + head.square.side] = enlarged
        assert scale >= 1 and not laid[500:, 500:][:800, columns].any()
        own = laid[500:1300, 500:1400][photo[..., 0] == HAIR[0]]
        assert (own > 0).sum() > 20_000


def test_the_territory_of_one_face_is_everything_and_a_second_finding_of_it_no_rival() -> None:
    face, square = _face(300, 300, 150), crop.Square(0, 0, 600)
    again = DetectedFace((face.box[0] + 5, face.box[1] - 4, face.box[2], face.box[3]), 0.6, face.landmarks)
    assert (territory(face, [], square, 64) == 255).all() and (territory(face, [again], square, 64) == 255).all()
    assert (territory(None, [again], square, 64) == 255).all()
    parts = [
        territory(a, [b], square, 64)
        for a, b in ((_face(150, 300, 100), _face(450, 300, 100)), (_face(450, 300, 100), _face(150, 300, 100)))
    ]
    assert (parts[0][:, :30] == 255).all() and (parts[0][:, 34:] == 0).all()
    assert (np.maximum(*parts) == 255).all()


def test_a_close_selfie_is_parsed_at_a_bounded_side() -> None:
    head, parser = _find(_photo(3000, 4000, (1200, 300, 2800, 2900)), _face(2000, 1500, 1600))
    assert head.square.side > 4000 and max(parser.sides) == heads.PARSED_SIDE == head.hair.shape[0]
    assert head.native.shape[0] == head.square.side
