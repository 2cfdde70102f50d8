"""ICC colour profiles of photos: which are usable, what the numbers under them are in sRGB, and how a PNG of our own carries one (DESIGN 5.1).

A profile comes from outside. It is bounded before it is parsed, and one that is broken, foreign to its picture or too large is as good as none.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

MAX_KEPT = 64 * 1024  # bytes of a profile that travels with a job into its result
MAX_READ = 768 * 1024  # bytes of one that is only read: the usual ones of print (SWOP, FOGRA39) have 550 to 650 KB
SPACES = {"RGB": b"RGB ", "L": b"GRAY", "CMYK": b"CMYK"}  # Pillow's mode: the colour space in a profile's header
CLASSES = (b"scnr", b"mntr", b"prtr", b"spac")  # of devices; the others describe no picture
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEAD = len(PNG_SIGNATURE) + 25  # bytes: with IHDR, which iCCP may follow


def colour_mode(picture: Image.Image) -> str:
    """RGB, L or CMYK: whose profile a picture can have. A palette is one of RGB."""
    if picture.mode == "CMYK":
        return "CMYK"
    return "L" if Image.getmodebase(picture.mode) == "L" else "RGB"


def to_srgb(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What makes sRGB of the numbers of a picture of ``mode`` (RGB, L or CMYK) that has this profile; None where the profile is of no use."""
    if profile is None or not _is_profile_of(profile, mode):
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # of a grey curve lcms makes a short table, which is 10 levels off in the shadows
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Colours:
    """There and back between the numbers of an RGB picture and sRGB, for what is painted in sRGB and pasted into it."""

    _there: ImageCms.ImageCmsTransform | None = None
    _back: ImageCms.ImageCmsTransform | None = None

    @classmethod
    def of(cls, profile: bytes | None) -> Colours:
        """Of a kept profile; both ways change nothing where it is None or can only be read."""
        there = to_srgb(profile, "RGB")
        if profile is None or there is None:
            return cls()
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return cls(there, ImageCms.buildTransform(ImageCms.createProfile("sRGB"), own, "RGB", "RGB"))
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
            return cls()

    def to_srgb(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 under the profile, in sRGB."""
        return _applied(self._there, pixels)

    def from_srgb(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 sRGB, in the profile's numbers."""
        return _applied(self._back, pixels)


def _applied(transform: ImageCms.ImageCmsTransform | None, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return pixels if transform is None else np.array(transform.apply(Image.fromarray(pixels)))


def kept(profile: bytes | None) -> bytes | None:
    """The profile of an RGB picture where it is usable and small enough to be kept beside the pixels, else None."""
    return profile if profile is not None and len(profile) <= MAX_KEPT and to_srgb(profile, "RGB") is not None else None


def _is_profile_of(profile: bytes, mode: str) -> bool:
    """By the header (ICC.1:2022, 7.2) alone. Chains of computing elements (``mpet``), which no camera writes, are left out: 64 KB
    can name so many that lcms needs half a minute for a transform."""
    return (
        132 <= len(profile) <= MAX_READ
        and int.from_bytes(profile[:4], "big") == len(profile)
        and profile[12:16] in CLASSES
        and profile[16:20] == SPACES.get(mode)
        and profile[36:40] == b"acsp"
        and b"mpet" not in profile
    )


def png_with(png: bytes, profile: bytes) -> bytes:
    """A PNG of our own, with the profile as its iCCP chunk."""
    chunk = b"iCCP" + b"ICC Profile\0\0" + zlib.compress(profile)
    return b"".join((png[:PNG_HEAD], struct.pack(">I", len(chunk) - 4), chunk, struct.pack(">I", zlib.crc32(chunk)), png[PNG_HEAD:]))


def without_unreadable(data: bytes) -> bytes:
    """The JPEG, PNG or WebP without those profiles at which Pillow gives up the whole picture: in a PNG what is damaged, unpacks to more than
    MAX_READ bytes or is not the first, in a JPEG a piece too short to be numbered."""
    if data[:3] == b"\xff\xd8\xff":
        for length in (b"\x00\x0e", b"\x00\x0f"):
            data = data.replace(b"\xff\xe2" + length + b"ICC_PROFILE\0", b"\xff\xe2" + length + b"ICC_NOTHING\0")
    elif data.startswith(PNG_SIGNATURE) and b"iCCP" in data:
        data = b"".join(_png_parts(data))
    return data


def _png_parts(data: bytes) -> Iterator[bytes]:
    """A PNG in parts, as far as its chunks can be followed, without the profiles that are cut out of it."""
    start, copied, seen = len(PNG_SIGNATURE), 0, False
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] == b"iCCP" and end <= len(data):
            if seen or not _unpacks(data[start:end]):
                yield data[copied:start]
                copied = end
            seen = True
        start = end
    yield data[copied:]


def _unpacks(chunk: bytes) -> bool:
    name, _, packed = chunk[8:-4].partition(b"\0")
    if not name or packed[:1] != b"\0" or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed[1:], MAX_READ)
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail
