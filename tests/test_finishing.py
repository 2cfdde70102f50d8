"""The modes without a model: a drawn painting of known colours goes into a drawn photo."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from backend.imaging import crop, masks
from backend.imaging.decode import ImageError, decode_mask, encode_png
from backend.imaging.recolour import colour_statistics, recoloured
from backend.tryon.finishing import Painted, finish, require_hair
from backend.tryon.heads import Head
from backend.tryon.values import TryOnError

SQUARE, SIDE = crop.Square(200, -50, 800), 128
DARK, GOLD = 45, np.array([200, 160, 90])


@pytest.fixture(scope="module")
def hair() -> np.ndarray:
    mask = np.zeros((900, 1200), np.uint8)
    return cv2.ellipse(mask, (600, 300), (220, 260), 0, 0, 360, 255, -1)


@pytest.fixture(scope="module")
def photo(hair: np.ndarray) -> np.ndarray:
    """Grey noise with dark striped hair, the stripes three pixels wide at the photo's own scale."""
    image = np.random.default_rng(0).integers(90, 130, (900, 1200, 3), dtype=np.uint8)
    stripes = (np.sin(np.arange(1200) / 3) * 25 + DARK).astype(np.uint8)
    image[hair > 0] = np.broadcast_to(stripes[None, :, None], image.shape)[hair > 0]
    return image


@pytest.fixture(scope="module")
def head(photo: np.ndarray, hair: np.ndarray) -> Head:
    native = crop.crop_square(photo, SQUARE)
    found = crop.crop_square(hair, SQUARE)
    return Head(SQUARE, crop.resize(native, SIDE), native, found, np.zeros_like(found), np.full_like(found, 255), (50.0, 50.0, 80.0, 90.0))


@pytest.fixture(scope="module")
def painted() -> Painted:
    """Larger, golden hair."""
    rng = np.random.default_rng(1)
    picture = rng.integers(90, 130, (SIDE, SIDE, 3), dtype=np.uint8)
    mask = cv2.ellipse(np.zeros((SIDE, SIDE), np.uint8), (64, 64), (40, 60), 0, 0, 360, 255, -1)
    picture[mask > 0] = GOLD + rng.integers(-20, 20, (int((mask > 0).sum()), 1))
    return Painted(picture, mask, np.zeros_like(mask), np.full_like(mask, 255))


@pytest.mark.parametrize(("mode", "colour"), [("full", GOLD), ("colour", GOLD), ("shape", np.full(3, DARK))])
@pytest.mark.parametrize("brushed", [False, True])
def test_each_mode_gives_its_colour_and_touches_nothing_else(
    photo: np.ndarray, hair: np.ndarray, head: Head, painted: Painted, mode: str, colour: np.ndarray, brushed: bool
) -> None:
    chosen = hair if brushed else None
    done = finish(photo, head, painted, mode=mode, feather=0.02, chosen=chosen)  # type: ignore[arg-type]
    assert np.array_equal(done.image[done.mask == 0], photo[done.mask == 0])
    assert np.abs(done.image[done.mask > 0.99].mean(axis=0) - colour).max() < 4
    if brushed:
        assert not done.mask[hair == 0].any()


def test_colour_only_keeps_every_stripe_and_the_outline(photo: np.ndarray, hair: np.ndarray, head: Head, painted: Painted) -> None:
    done = finish(photo, head, painted, mode="colour", feather=0.02, chosen=None)
    core = done.mask > 0.99
    before, after = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[core].astype(float) for image in (photo, done.image))
    assert np.corrcoef(before, after)[0, 1] > 0.99
    assert not done.mask[cv2.dilate(hair, np.ones((33, 33), np.uint8)) == 0].any() and core[hair > 0].mean() > 0.8


def test_a_partial_mode_without_hair_says_so(photo: np.ndarray, head: Head, painted: Painted) -> None:
    none = np.zeros_like(painted.hair)
    for mode in ("colour", "shape"):
        with pytest.raises(TryOnError) as caught:
            finish(photo, head, replace(painted, hair=none), mode=mode, feather=0.02, chosen=None)  # type: ignore[arg-type]
        assert caught.value.code == "no_hair" and caught.value.hint
    with pytest.raises(TryOnError) as caught:
        require_hair(none, "your photo", "colour", code="no_own_hair")
    assert caught.value.code == "no_own_hair"
    require_hair(painted.hair, "your photo", "colour", code="no_own_hair")


@pytest.mark.parametrize("stroke", [3, 6, 24])
def test_a_thin_stroke_of_the_brush_is_painted_all_the_same(photo: np.ndarray, head: Head, painted: Painted, stroke: int) -> None:
    chosen = np.zeros(photo.shape[:2], np.uint8)
    cv2.line(chosen, (500, 200), (700, 200), 255, stroke)
    region = masks.any_coverage(crop.crop_square(chosen, SQUARE), SIDE)
    done = finish(photo, head, replace(painted, region=region), mode="full", feather=0.05, chosen=chosen)
    assert done.mask.max() > 0.5 and not done.mask[chosen == 0].any()


def test_recolouring_moves_mean_and_spread_and_bounds_the_gain() -> None:
    rng = np.random.default_rng(2)
    image = np.repeat(rng.integers(80, 120, (700, 40, 1), dtype=np.uint8), 3, axis=2)  # more rows than are converted at a time
    other = np.repeat(rng.integers(60, 180, (50, 50, 1), dtype=np.uint8), 3, axis=2)
    own, wanted = (colour_statistics(one, np.ones(one.shape[:2], np.uint8)) for one in (image, other))
    for gain, share in ((float("inf"), 1.0), (1.5, 1.5 * own.spread[0] / wanted.spread[0])):
        moved = colour_statistics(recoloured(image, own, wanted, max_gain=gain), np.ones(image.shape[:2], np.uint8))
        assert abs(moved.mean[0] - wanted.mean[0]) < 0.5 and abs(moved.spread[0] / wanted.spread[0] - share) < 0.03
    with pytest.raises(ValueError, match="no pixels"):
        colour_statistics(image, np.zeros(image.shape[:2], np.uint8))


def test_a_mask_is_what_is_neither_black_nor_transparent() -> None:
    layers = np.zeros((70, 80, 4), np.uint8)
    layers[10:20, :, :3], layers[10:20, 30:40, 3] = 200, 1
    layers[30:40, :, 3] = 255  # black, opaque
    drawn = decode_mask(encode_png(layers), max_pixels=10**6)
    assert drawn.shape == (70, 80) and set(np.unique(drawn)) == {0, 255}
    assert np.array_equal(np.argwhere(drawn)[[0, -1]], [[10, 30], [19, 39]])
    assert decode_mask(encode_png(np.full((70, 80), 1, np.uint8)), max_pixels=10**6).all()
    assert not decode_mask(encode_png(np.zeros((70, 80, 3), np.uint8)), max_pixels=10**6).any()
    for content, code in ((b"\xff\xd8\xff" + bytes(50), "unsupported_format"), (b"text", "not_an_image")):
        with pytest.raises(ImageError) as caught:
            decode_mask(content, max_pixels=10**6)
        assert caught.value.code == code
