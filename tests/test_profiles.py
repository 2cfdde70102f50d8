"""Colour profiles: a result looks on screen as its upload, a reference's colours are what they look like, and no profile harms an upload."""

from __future__ import annotations

import io
import struct
import sys
import threading
import types
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from backend.cli import main
from backend.demo.portraits import render, sample_hairstyle, sample_identity, sample_scene
from backend.imaging import profiles
from backend.imaging.decode import decode_mask, decode_portrait, decode_reference, decode_stored, decode_upload, encode_png, stored_profile
from backend.training.training_face import FaceAnalyzer
from backend.tryon.pipeline import TryOn
from backend.tryon.segmentation import HairParser
from backend.tryon.values import TryOnRequest
from tests.app_standin import Live, StandIn, app_config, decoded, picture, png, serving
from tests.colour_profiles import cmyk, display_p3, grey, p3_as_srgb, profile_of, with_ballast
from tests.conftest import World

P3 = display_p3()
PIXELS = 10_000_000
RED = (137, 208, 195)  # Lab of sRGB's red under D50: 53.7, 80, 67


def saved(kind: str, image: Image.Image | np.ndarray, profile: bytes | None = P3, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, icc_profile=profile, **options)
    return buffer.getvalue()


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG, each with a sum that is right."""
    found, at = [], 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        body = content[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == struct.unpack_from(">I", content, at + 8 + length)[0]
        found.append((body[:4], body[4:]))
        at += 12 + length
    return found


def profile_in(content: bytes) -> bytes | None:
    return Image.open(io.BytesIO(content)).info.get("icc_profile")


def colours() -> np.ndarray:
    """Every mixture of nine steps of red, green and blue, without noise, in blocks that JPEG keeps."""
    steps = np.array(list(np.ndindex(9, 9, 9)), np.float32) * 31.875
    return np.repeat(np.repeat(steps.round().astype(np.uint8).reshape(27, 27, 3), 8, axis=0), 8, axis=1)


# What is kept


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "palette", "alpha"])
def test_a_portrait_keeps_its_numbers_and_its_profile(kind: str) -> None:
    image = Image.fromarray(colours())
    modes = {"palette": "P", "alpha": "RGBA"}
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    content, plain = (
        saved("PNG" if kind in modes else kind, image.convert(modes.get(kind, "RGB")), profile, exif=exif, **options)
        for profile in (P3, None)
    )
    photo = decode_portrait(content, max_pixels=PIXELS)
    assert photo.profile == P3
    assert np.array_equal(photo.pixels, decode_portrait(plain, max_pixels=PIXELS).pixels)
    assert (
        np.array_equal(photo.pixels, decode_upload(content, max_pixels=PIXELS))
        and decode_portrait(plain, max_pixels=PIXELS).profile is None
    )
    assert np.array_equal(np.rot90(photo.pixels), decode_stored(content, max_pixels=PIXELS))  # data sets keep frame and numbers


@pytest.mark.parametrize("settings", [{}, {"quick": True}, {"compression": 0}])
def test_a_png_carries_the_profile_and_the_same_pixels(settings: dict[str, bool]) -> None:
    image = picture()
    content = encode_png(image, profile=P3, **settings)
    names = [name for name, _ in chunks(content)]
    assert names[:2] == [b"IHDR", b"iCCP"] and set(names[2:]) == {b"IDAT", b"IEND"}
    assert np.array_equal(decoded(content), image) and stored_profile(content) == profile_in(content) == P3
    assert np.array_equal(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], image)
    assert stored_profile(encode_png(image, **settings)) is None


# What the colours mean


@pytest.mark.parametrize("kind", ["PNG", "palette", "JPEG"])
def test_a_reference_is_what_its_profile_says_it_looks_like(kind: str) -> None:
    image = Image.fromarray(colours())
    content = saved("PNG", image.convert("P")) if kind == "palette" else saved(kind, image, **({"quality": 95} if kind == "JPEG" else {}))
    numbers = decode_upload(content, max_pixels=PIXELS)
    seen = decode_reference(content, max_pixels=PIXELS)
    assert np.abs(seen.astype(int) - p3_as_srgb(numbers)).max() <= 2
    assert np.abs(seen.astype(int) - numbers).max() > 30  # it makes a difference
    bare = saved("PNG", numbers, None)
    assert np.array_equal(decode_reference(bare, max_pixels=PIXELS), numbers)


@pytest.mark.parametrize("decode", [decode_upload, decode_reference])
def test_grey_and_cmyk_become_srgb_by_their_profile(decode: object) -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None], 80, axis=0)
    linear = ramp / 255.0
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055) * 255  # of the light that gamma 1 says
    for content in (
        saved("PNG", ramp, grey(1.0)),
        saved("PNG", ramp.astype(np.uint16) * 257, grey(1.0)),
        saved("PNG", Image.fromarray(ramp).convert("LA"), grey(1.0)),
    ):
        assert np.abs(decode(content, max_pixels=PIXELS) - srgb[..., None]).max() <= 1
        assert decode_portrait(content, max_pixels=PIXELS).profile is None
    ink = Image.new("CMYK", (80, 80), (0, 0, 0, 0))
    ink.paste((255, 0, 0, 0), (0, 0, 40, 80))
    content = saved("JPEG", ink, cmyk(RED), quality=95)
    made = decode(content, max_pixels=PIXELS).astype(int)
    assert np.abs(made[:, :32] - (255, 0, 0)).max() <= 8 and made[:, 48:].min() >= 253  # the profile's cyan is red
    by_hand = ImageCms.profileToProfile(
        Image.open(io.BytesIO(content)), ImageCms.ImageCmsProfile(io.BytesIO(cmyk(RED))), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert np.array_equal(made, np.asarray(by_hand)) and decode_portrait(content, max_pixels=PIXELS).profile is None


def test_a_style_picture_is_that_of_the_photo_in_srgb(raw_world: World) -> None:
    config = raw_world.config()
    faces, parser = FaceAnalyzer(config.paths.weights), HairParser(config.paths.weights, device=torch.device("cpu"))
    tryon = TryOn(config, None, faces, parser, {"resolution": 128}, "")  # type: ignore[arg-type]  # nothing is painted
    rng = np.random.default_rng(11)
    hair = sample_hairstyle(rng, length="bob", curl=1, volume=1, tied=False, bangs="none")
    photo = render(sample_identity(11), hair, sample_scene(rng, camera="mid"), 8.0, 512, 11).image.astype(np.float32)
    vivid = np.clip(photo.mean(axis=2, keepdims=True) + 1.5 * (photo - photo.mean(axis=2, keepdims=True)), 0, 255).astype(np.uint8)
    tagged, converted = saved("PNG", vivid), saved("PNG", p3_as_srgb(vivid), None)
    style, wanted = (tryon.style_picture(decode_reference(content, max_pixels=PIXELS)) for content in (tagged, converted))
    other = (np.abs(style.astype(int) - wanted) > 2).any(axis=2)
    assert other.mean() < 0.002  # a level of rounding can move a pixel of the hair's edge
    assert (np.abs(tryon.style_picture(vivid).astype(int) - wanted) > 2).any(axis=2).mean() > 0.4


# What is ignored


def programs(count: int) -> bytes:
    """A profile of a chain of ``count`` matrices and curves, each of them named and none stored twice. lcms takes 26 seconds for 7,900 in 64 KB."""
    curve = b"curf\0\0\0\0\0\1\0\0parf\0\0\0\0\0\0\0\0" + struct.pack(">4f", 1.01, 1, 0, 0)
    curves = b"cvst\0\0\0\0\0\3\0\3" + struct.pack(">II", 36, len(curve)) * 3 + curve
    matrix = b"matf\0\0\0\0\0\3\0\3" + struct.pack(">12f", 0.9, 0.1, 0, 0, 0.9, 0.1, 0.1, 0, 0.9, 0, 0, 0)
    start = 16 + 8 * count
    places = [(start, len(curves)), (start + len(curves), len(matrix))]
    table = b"".join(struct.pack(">II", *places[number % 2]) for number in range(count))
    return profile_of(b"RGB ", b"XYZ ", {b"D2B0": b"mpet\0\0\0\0\0\3\0\3" + struct.pack(">I", count) + table + curves + matrix})


USELESS = {
    "1 MiB": with_ballast(P3, 2**20),
    "1 MiB of noise": np.random.default_rng(0).bytes(2**20),
    "noise": np.random.default_rng(0).bytes(3000),
    "one byte": b"\0",
    "a header and noise": P3[:128] + np.random.default_rng(1).bytes(len(P3) - 128),
    "a header alone": struct.pack(">I", 128) + P3[4:128],
    "no tags": struct.pack(">I", 132) + P3[4:128] + bytes(4),
    "cut off": P3[:300],
    "of CMYK": cmyk(RED),
    "of grey": grey(1.0),
    "of Lab": P3[:16] + b"Lab " + P3[20:],
    "a device link": P3[:12] + b"link" + P3[16:],
    "a chain of programs": programs(1000),
}


@pytest.mark.parametrize("name", USELESS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_profile_of_no_use_is_ignored(name: str, kind: str) -> None:
    content, plain = (saved(kind, picture(), profile) for profile in (USELESS[name], None))
    photo = decode_portrait(content, max_pixels=PIXELS)
    assert photo.profile is None
    for pixels in (photo.pixels, decode_reference(content, max_pixels=PIXELS)):
        assert np.array_equal(pixels, decode_upload(plain, max_pixels=PIXELS))


def test_a_profile_of_another_kind_of_pixels_is_ignored() -> None:
    for image, profile in ((Image.new("L", (70, 70), 100), P3), (Image.new("CMYK", (70, 70), (90, 20, 30, 10)), P3)):
        kind = "JPEG" if image.mode == "CMYK" else "PNG"
        content, plain = saved(kind, image, profile), saved(kind, image, None)
        assert decode_portrait(content, max_pixels=PIXELS).profile is None
        for decode in (decode_upload, decode_reference):
            assert np.array_equal(decode(content, max_pixels=PIXELS), decode_upload(plain, max_pixels=PIXELS))


def test_the_largest_profile_that_is_kept_and_the_largest_that_is_read() -> None:
    for size, is_kept, is_read in (
        (64 * 1024, True, True),
        (64 * 1024 + 4, False, True),
        (768 * 1024, False, True),
        (768 * 1024 + 4, False, False),
    ):
        content = saved("PNG", picture(), with_ballast(P3, size))
        assert (decode_portrait(content, max_pixels=PIXELS).profile is not None) == is_kept
        assert np.array_equal(decode_reference(content, max_pixels=PIXELS), picture()) != is_read


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"a\0\0" + zlib.compress(profile))


BOMB = iccp(bytes(64_000_000))
BROKEN_CHUNKS = {
    "a bomb": BOMB,
    "bombs": BOMB * 3,
    "empty": chunk(b"iCCP", b""),
    "no name": chunk(b"iCCP", b"\0\0" + zlib.compress(P3)),
    "no end of the name": chunk(b"iCCP", b"a" * 50),
    "another method": chunk(b"iCCP", b"a\0\7" + zlib.compress(P3)),
    "not packed": chunk(b"iCCP", b"a\0\0" + P3),
    "cut off": chunk(b"iCCP", b"a\0\0" + zlib.compress(P3)[:-80]),
    "a wrong sum": iccp(P3)[:-1] + b"x",
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", BROKEN_CHUNKS)
def test_a_broken_chunk_costs_a_png_nothing_but_the_profile(name: str, place: str) -> None:
    good = encode_png(picture())
    at = 33 if place == "before" else len(good) - 12
    content = good[:at] + BROKEN_CHUNKS[name] + good[at:]
    photo = decode_portrait(content, max_pixels=PIXELS)
    assert photo.profile is None and np.array_equal(photo.pixels, picture())
    assert np.array_equal(decode_reference(content, max_pixels=PIXELS), picture()) and decode_mask(content, max_pixels=PIXELS).any()


def test_the_first_profile_of_a_png_counts() -> None:
    good = encode_png(picture())
    content = good[:33] + iccp(P3) + BOMB + iccp(grey(1.0)) + good[33:-12] + iccp(grey(1.0)) + good[-12:]
    photo = decode_portrait(content, max_pixels=PIXELS)
    assert photo.profile == P3 and np.array_equal(photo.pixels, picture())


def test_without_a_broken_profile_no_byte_is_another() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        content = saved(kind, picture())
        assert profiles.without_unreadable(content) == content
        assert profiles.without_unreadable(content[:200]) == content[:200]


@pytest.mark.parametrize("pieces", [[b""], [b"\1"], [b"\1\2" + P3[:200]], [b"\1\2" + P3[:200], b"\1"], [b"\1\0" + P3], [b"\0\1"]])
def test_a_broken_profile_of_a_jpeg_costs_nothing_else(pieces: list[bytes]) -> None:
    plain = saved("JPEG", picture(), None)
    markers = b"".join(b"\xff\xe2" + struct.pack(">H", 14 + len(piece)) + b"ICC_PROFILE\0" + piece for piece in pieces)
    photo = decode_portrait(plain[:2] + markers + plain[2:], max_pixels=PIXELS)
    assert photo.profile is None and np.array_equal(photo.pixels, decode_upload(plain, max_pixels=PIXELS))


# Through the server and the command


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with serving(app_config(tmp_path)) as server:
        yield server


def portraits() -> dict[str, bytes]:
    """The same person's photo as a telephone writes it, with place, device and words of its own, and as a PNG."""
    exif = Image.Exif()
    exif[0x010F] = "SecretMaker"
    exif[0x8825] = {1: "N", 2: (48.0, 51.0, 29.0)}
    xmp = b"<x:xmpmeta>secret place</x:xmpmeta>"
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "Secret Name")
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    return {
        "me.jpg": saved("JPEG", colours(), quality=95, exif=exif, xmp=xmp, comment=b"secret words"),
        "me.png": saved("PNG", colours(), exif=exif, pnginfo=text),
        "me.webp": saved("WEBP", colours(), lossless=True, exif=exif, xmp=xmp),
    }


PORTRAITS = portraits()


def assert_stripped_but_for_the_profile(content: bytes) -> None:
    assert {name for name, _ in chunks(content)} == {b"IHDR", b"iCCP", b"IDAT", b"IEND"}
    assert profile_in(content) == P3 and b"ecret" not in content


@pytest.mark.parametrize("name", PORTRAITS)
def test_a_result_over_http_has_the_uploads_profile_and_pixels(live: Live, name: str) -> None:
    done = live.wait(live.post(target=PORTRAITS[name], prompt="bob").json()["id"])
    result, mask = (live.client.get(done["result"][url]).content for url in ("url", "mask_url"))
    assert_stripped_but_for_the_profile(result)
    outside = decoded(mask) == 0
    numbers = decode_stored(PORTRAITS[name], max_pixels=PIXELS)
    assert outside.any() and np.array_equal(decoded(result)[outside], numbers[outside])
    assert np.array_equal(live.engine.seen[0].target, numbers) and live.engine.seen[0].profile == P3
    assert Image.open(io.BytesIO(mask)).info == {}


def test_the_profile_waits_in_the_kept_portrait_alone_and_goes_with_it(tmp_path: Path) -> None:
    with serving(app_config(tmp_path), StandIn(gate=threading.Semaphore(0))) as live:
        brush = saved("PNG", np.full(colours().shape[:2], 255, np.uint8), grey(1.0))
        job = live.post(target=PORTRAITS["me.jpg"], reference=PORTRAITS["me.png"], mask=brush).json()["id"]
        live.wait(job, "running")
        folder = tmp_path / "jobs" / job
        assert_stripped_but_for_the_profile((folder / "target.png").read_bytes())
        for other in ("reference.png", "brush.png"):
            assert Image.open(folder / other).info == {}
        packed = (b"iCCP", P3[132:200])
        live.client.delete(f"/api/v1/jobs/{job}").raise_for_status()
        live.engine.gate.release()
        left = [path for path in (tmp_path / "jobs").rglob("*") if path.is_file()]
        assert left and not any(part in path.read_bytes() for path in left for part in packed)


def test_a_reference_over_http_is_in_srgb_and_a_portrait_without_a_profile_gets_none(live: Live) -> None:
    done = live.wait(live.post(target=png(), reference=PORTRAITS["me.png"]).json()["id"])
    assert np.abs(live.engine.seen[0].reference.astype(int) - p3_as_srgb(colours())).max() <= 2
    assert live.engine.seen[0].profile is None
    assert profile_in(live.client.get(done["result"]["url"]).content) is None


@pytest.mark.parametrize("name", USELESS)
def test_a_profile_of_no_use_is_ignored_over_http(live: Live, name: str) -> None:
    content = saved("PNG", picture(), USELESS[name])
    done = live.wait(live.post(target=content, reference=content).json()["id"])
    assert done["state"] == "succeeded" and profile_in(live.client.get(done["result"]["url"]).content) is None
    assert np.array_equal(live.engine.seen[0].target, picture()) and np.array_equal(live.engine.seen[0].reference, picture())


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """What ``deephair tryon`` paints with."""
    stand_in = StandIn()
    monkeypatch.setattr("backend.tryon.command.TryOn.load", lambda config: stand_in)
    return stand_in


def assert_the_upload_lives_on(result: bytes, upload: bytes) -> None:
    assert_stripped_but_for_the_profile(result)
    below = slice(colours().shape[0] // 2 + 1, None)  # where the stand-in paints nothing
    assert np.array_equal(decoded(result)[below], decode_stored(upload, max_pixels=PIXELS)[below])


def test_the_command_keeps_the_profile_of_a_file_and_of_a_folder(engine: StandIn, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("me.jpg", "me.png"):
        (photos / name).write_bytes(PORTRAITS[name])
        assert main(["tryon", str(photos / name), str(photos / name), "-o", str(tmp_path / "one.png")]) == 0
        assert_the_upload_lives_on((tmp_path / "one.png").read_bytes(), PORTRAITS[name])
        numbers = decode_stored(PORTRAITS[name], max_pixels=PIXELS)
        assert np.abs(engine.seen[-1].reference.astype(int) - p3_as_srgb(numbers)).max() <= 2
    (photos / "me.png").unlink()
    (photos / "plain.png").write_bytes(png())
    assert main(["tryon", str(photos), "-o", str(tmp_path / "done"), "--color", "black"]) == 0
    assert_the_upload_lives_on((tmp_path / "done" / "me.png").read_bytes(), PORTRAITS["me.jpg"])
    assert profile_in((tmp_path / "done" / "plain.png").read_bytes()) is None


def test_the_command_keeps_the_profile_between_stdin_and_stdout(engine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    result = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(PORTRAITS["me.jpg"])))
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(buffer=result))
    assert main(["tryon", "-", "-o", "-", "--color", "black"]) == 0
    assert_the_upload_lives_on(result.getvalue(), PORTRAITS["me.jpg"])


class Painted:
    """Paints one sRGB picture whatever it is asked for, and remembers what it was shown."""

    def __init__(self, picture: np.ndarray) -> None:
        self.picture, self.shown = picture, []

    def paint(self, requests: list, **_: object) -> torch.Tensor:
        self.shown.append(requests[0].photo)
        return torch.from_numpy(self.picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def test_the_model_sees_a_wide_target_in_srgb_and_its_painting_looks_the_same_in_the_result(raw_world: World) -> None:
    config = raw_world.config(app__smooth_face=False)
    faces, parser = FaceAnalyzer(config.paths.weights), HairParser(config.paths.weights, device=torch.device("cpu"))
    rng = np.random.default_rng(11)
    hair = sample_hairstyle(rng, length="bob", curl=1, volume=1, tied=False, bangs="none")
    photo = render(sample_identity(11), hair, sample_scene(rng, camera="mid"), 8.0, 512, 11).image
    painting = np.full((128, 128, 3), (200, 40, 30), np.uint8)
    painting[::2] = (190, 50, 40)
    painter = Painted(painting)
    tryon = TryOn(config, painter, faces, parser, {"resolution": 128, "sampling": {"few_step": None}}, "")  # type: ignore[arg-type]
    brush = np.zeros(photo.shape[:2], np.uint8)
    brush[100:400, 150:350] = 255
    plain, wide = (tryon.run(TryOnRequest(photo, None, prompt="red hair", mask=brush, profile=profile)) for profile in (None, P3))
    whole = wide.mask == 1
    assert whole.any() and np.array_equal(wide.image[wide.mask == 0], photo[wide.mask == 0])
    assert np.abs(p3_as_srgb(wide.image[whole]).astype(int) - plain.image[whole]).max() <= 3
    assert np.abs(wide.image[whole].astype(int) - plain.image[whole]).max() > 15
    assert np.abs(painter.shown[1].astype(int) - p3_as_srgb(painter.shown[0])).max() <= 2
