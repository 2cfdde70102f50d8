"""ICC profiles made by hand for tests (ICC.1:2022), and what Display P3 is in sRGB by its published matrices, without a colour library."""

from __future__ import annotations

import struct

import numpy as np

P3_IN_SRGB = np.array([[1.22494018, -0.22494018, 0.0], [-0.04205695, 1.04205695, 0.0], [-0.01963755, -0.07863605, 1.0982736]])  # linear


def display_p3() -> bytes:
    """Display P3 as Apple's cameras write it: a matrix of the D50-adapted primaries and sRGB's curve as a parametric one."""
    columns = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
    curve = b"para\0\0\0\0\0\3\0\0" + b"".join(map(_fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    tags = {
        name: b"XYZ \0\0\0\0" + b"".join(map(_fixed, column)) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    }
    return profile_of(b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def grey(gamma: float) -> bytes:
    """Grey with a power curve."""
    return profile_of(b"GRAY", b"XYZ ", {b"kTRC": b"curv\0\0\0\0\0\0\0\1" + struct.pack(">H", round(gamma * 256)) + b"\0\0"})


def cmyk(cyan: tuple[int, int, int]) -> bytes:
    """CMYK whose full cyan is this 8-bit Lab (L 0..255 for 0..100, a and b about 128); bare paper is white, all else black. A table of two points a side."""
    black, white = (0, 128, 128), (255, 128, 128)
    corners = [white if corner == (0, 0, 0, 0) else cyan if corner == (1, 0, 0, 0) else black for corner in np.ndindex(2, 2, 2, 2)]
    unity = bytes(range(256))
    matrix = b"".join(map(_fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0\4\3\2\0" + matrix + unity * 4 + bytes(np.array(corners, np.uint8)) + unity * 3
    return profile_of(b"CMYK", b"Lab ", {b"A2B0": table}, kind=b"prtr")


def profile_of(space: bytes, between: bytes, tags: dict[bytes, bytes], *, kind: bytes = b"mntr") -> bytes:
    """A profile of version 4 with these tags."""
    tags = {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(_fixed, (0.9642, 1.0, 0.8249)))} | tags
    table, content = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    size = 128 + len(table) + len(content)
    date = struct.pack(">6H", 2022, 1, 1, 0, 0, 0)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x04300000, kind, space, between) + date + b"acsp" + bytes(28)
    head += b"".join(map(_fixed, (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + table + content


def with_ballast(profile: bytes, size: int) -> bytes:
    """The same profile, still valid, ``size`` bytes long."""
    return struct.pack(">I", size) + profile[4:].ljust(size - 4, b"\0")


def p3_as_srgb(pixels: np.ndarray) -> np.ndarray:
    """Display P3 numbers (..., 3) uint8 as sRGB ones, clipped to what sRGB has."""
    values = pixels / 255.0
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ P3_IN_SRGB.T, 0, 1)
    return (np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055) * 255).round().astype(np.uint8)


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))
