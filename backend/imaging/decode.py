"""Photos in and out: decoded from sniffed bytes with bounds, encoded without metadata (DESIGN 5.1; reliability.md C1.3, C1.8)."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from backend import artifacts
from backend.errors import DeepHairError
from backend.imaging import profiles

FORMATS = ("JPEG", "PNG", "WEBP")
MIN_SIDE = 64

Image.MAX_IMAGE_PIXELS = None  # the pixel count is checked from the header below, with a limit of our own


class ImageError(DeepHairError):
    """Bytes that are not a usable photo. Codes: not_an_image, unsupported_format, too_many_pixels, truncated, too_small."""

    code = "not_an_image"


def sniff(data: bytes) -> str | None:
    """The image format that the first bytes show, whatever the name says; None when it is none that Pillow is asked to open."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


class Photo(NamedTuple):
    """pixels: (H, W, 3) uint8 RGB, upright. profile: the ICC profile that says what their numbers look like; None where they are sRGB."""

    pixels: NDArray[np.uint8]
    profile: bytes | None


def decode_portrait(data: bytes, *, max_pixels: int) -> Photo:
    """A person's portrait: upright by its EXIF orientation, alpha over white, all metadata dropped but a colour profile.

    RGB pixels keep their numbers, and a usable profile of at most ``profiles.MAX_KEPT`` bytes stays beside them. CMYK and grey pixels become
    sRGB by their profile, where it is usable. The header is read first and a picture above ``max_pixels`` is refused before a pixel is decoded.
    Raises ImageError.
    """
    with _open(data, max_pixels) as picture:
        upright, profile = _upright(picture)
        if profiles.colour_mode(upright) == "RGB":
            return Photo(_to_rgb(upright), profiles.kept(profile))
        return Photo(_to_srgb(upright, profile), None)


def decode_upload(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """The pixels of ``decode_portrait`` alone."""
    return decode_portrait(data, max_pixels=max_pixels).pixels


def decode_reference(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """A photo whose colours are to be taken over, as (H, W, 3) uint8 sRGB: by its profile where it has a usable one, else by its numbers.

    The rest is as in ``decode_portrait``.
    """
    with _open(data, max_pixels) as picture:
        return _to_srgb(*_upright(picture))


def decode_mask(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """A painted mask, a PNG, as (H, W) uint8 0/255: 255 where a pixel is neither black nor wholly transparent.

    Only PNG, since what a lossy format makes of black is not black. Bounds and errors are those of ``decode_upload``.
    """
    if sniff(data) in ("JPEG", "WEBP"):
        raise ImageError("the mask is not a PNG", hint="send the mask as an 8-bit PNG", code="unsupported_format")
    with _open(data, max_pixels) as picture:
        upright = ImageOps.exif_transpose(_loaded(picture))
        if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa", "P"):
            rgba = np.asarray(upright.convert("RGBA"))
            values, opaque = rgba[..., :3], rgba[..., 3] > 0
        else:
            values = np.atleast_3d(np.asarray(upright))
            opaque = np.ones(values.shape[:2], bool)
        return np.where(values.any(axis=2) & opaque, 255, 0).astype(np.uint8)


def decode_stored(data: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """A dataset photo as (H, W, 3) uint8 RGB in its STORED frame: labels live there, so EXIF orientation is not applied.

    A truncated JPEG is an ImageError here (OpenCV would return it half grey without a word).
    """
    with _open(data, max_pixels) as picture:
        return _to_rgb(_loaded(picture))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    kind = sniff(data)
    if kind is None:
        code = "unsupported_format" if _is_other_image(data) else "not_an_image"
        raise ImageError("the file is not a JPEG, PNG or WebP picture", hint="send the photo as JPEG, PNG or WebP", code=code)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(profiles.without_unreadable(data)), formats=[kind])
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"the {kind} file cannot be read: {error}", hint="save the picture again and retry", code="truncated") from error
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageError(
            f"the picture has {width} x {height} = {width * height / 1e6:.1f} megapixels, at most {max_pixels / 1e6:.1f} are taken",
            hint="send a smaller version of it",
            code="too_many_pixels",
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"the picture is {width} x {height} pixels, at least {MIN_SIDE} a side are needed",
            hint="send a larger version",
            code="too_small",
        )
    return picture


def _loaded(picture: Image.Image) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture.load()
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise ImageError(f"the picture is damaged or cut off: {error}", hint="save or transfer it again", code="truncated") from error
    return picture


def _upright(picture: Image.Image) -> tuple[Image.Image, bytes | None]:
    """The picture decoded and turned upright, and the profile that stands before its pixels."""
    profile = picture.info.get("icc_profile")
    return ImageOps.exif_transpose(_loaded(picture)), profile


def _to_srgb(picture: Image.Image, profile: bytes | None) -> NDArray[np.uint8]:
    """8-bit RGB as ``_to_rgb`` gives it, but in the colours that a usable profile says."""
    mode = profiles.colour_mode(picture)
    transform = profiles.to_srgb(profile, mode)
    if transform is None:
        return _to_rgb(picture)
    if mode == "CMYK":
        return np.asarray(transform.apply(picture))
    pixels = _to_rgb(picture)
    if mode == "RGB":
        return np.asarray(transform.apply(Image.fromarray(pixels)))
    greys = np.asarray(transform.apply(Image.fromarray(np.arange(256, dtype=np.uint8)[None])))[0]  # (256, 3)
    return greys[pixels[..., 0]]


def _to_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    """8-bit RGB from any mode: 16-bit is scaled, transparency is laid over white."""
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture, dtype=np.float64)
        top = 65535.0 if values.max(initial=0.0) > 255 else 255.0
        grey = np.clip(values * (255.0 / top), 0, 255).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))  # converting RGB would copy 50 MB of a raw photo


def _is_other_image(data: bytes) -> bool:
    heads = (b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"8BPS", b"icns", b"DDS ", b"SIMPLE", b"%!PS", b"\x00\x00\x01\x00")
    return data.startswith(heads) or data[4:12] in (b"ftypheic", b"ftypavif", b"ftypmif1", b"ftypheix")


def encode_png(image: NDArray[np.uint8], *, compression: int = 3, quick: bool = False, profile: bytes | None = None) -> bytes:
    """PNG bytes, without metadata, of (H, W), (H, W, 3) RGB or (H, W, 4) RGBA uint8. profile: the ICC profile of RGB numbers that are not sRGB.

    compression: zlib's level, 0 to 9; 0 writes the pixels as they are, unfiltered. quick: for what a person waits for and then loads, level 1 with
    one filter for all rows and runs instead of matches. A rendered photo of a megapixel took 152 ms of a CPU and 1.20 MB at level 3, 60 ms and
    1.18 MB quick, 6 ms and 3.15 MB at level 0; to read them again took 44, 31 and 9 ms.
    """
    channels = 1 if image.ndim == 2 else image.shape[2]
    if channels == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    elif channels == 4:
        image = cv2.cvtColor(image, cv2.COLOR_RGBA2BGRA)
    settings = [cv2.IMWRITE_PNG_COMPRESSION, 1 if quick else compression]
    if quick:
        settings += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_AVG]
    elif compression == 0:
        settings += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    done, encoded = cv2.imencode(".png", image, settings)
    if not done:
        raise ImageError(f"an array of shape {image.shape} and type {image.dtype} cannot be written as PNG")
    return encoded.tobytes() if profile is None else profiles.png_with(encoded.tobytes(), profile)


def write_png(path: Path, image: NDArray[np.uint8], *, compression: int = 3) -> None:
    """Writes a PNG beside and renames it (``encode_png`` for the layouts)."""
    artifacts.write_bytes(path, encode_png(image, compression=compression))


def read_png(path: Path) -> NDArray[np.uint8]:
    """One of our own PNGs as stored: (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA uint8. Raises ImageError naming the file."""
    try:
        return decode_png(path.read_bytes())
    except (OSError, ImageError) as error:
        raise ImageError(
            f"{path} cannot be read: {error}", hint="run 'deephair prepare' again; it rewrites what is damaged", code="truncated"
        ) from error


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """A PNG of our own in memory, as ``read_png`` gives it. Raises ImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.load()
            return np.asarray(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"the PNG is damaged: {error}", code="truncated") from error


def stored_profile(data: bytes) -> bytes | None:
    """The ICC profile in a PNG of our own. Raises ImageError."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            return picture.info.get("icc_profile")
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"the PNG is damaged: {error}", code="truncated") from error
