"""The reference pictures that the page offers: rendered people with varied hair, written into the app's folder.

    python -m backend.demo.gallery

The pictures are committed, because the app must not import the demo; run it again when the renderer has changed. The page shows a name
from ``static/words``, under the file's stem.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from backend import artifacts
from backend.config import REPO_ROOT
from backend.demo.portraits import render, sample_hairstyle, sample_identity, sample_scene
from backend.demo.traits import Bangs, Length, Rgb

FOLDER = REPO_ROOT / "backend/app/static/gallery"
SIZE = 512  # pixels
QUALITY = 84
MAX_BYTES = 250_000  # of all pictures together


@dataclass(frozen=True)
class Look:
    """One picture: who wears which hair. ``identity`` is a seed of sample_identity that the sets of photos do not use."""

    identity: int
    length: Length
    curl: int
    colour: str
    rgb: Rgb
    bangs: Bangs
    volume: int
    parting: int
    wall: Rgb


LOOKS: dict[str, Look] = {
    "long-wavy-copper": Look(900_003, "long", 1, "red-brown", (112, 48, 28), "side_swept", 1, 3, (196, 190, 186)),
    "bob-straight-black": Look(900_011, "bob", 0, "black", (24, 21, 22), "full", 1, 0, (208, 200, 190)),
    "long-straight-ombre": Look(900_034, "long", 0, "ombre", (54, 38, 32), "none", 1, 5, (184, 194, 200)),
    "medium-curly-chestnut": Look(900_018, "medium", 2, "natural brown", (74, 44, 30), "none", 1, 4, (204, 196, 178)),
    "short-wavy-ash": Look(900_016, "women_short", 1, "ash brown", (98, 90, 80), "choppy", 1, 7, (190, 180, 184)),
    "medium-tight-black": Look(900_005, "medium", 3, "black", (28, 24, 24), "none", 1, 5, (204, 178, 158)),
    "men-straight-brown": Look(900_054, "men", 0, "natural brown", (70, 48, 36), "side_swept", 1, 7, (182, 192, 188)),
    "bob-wavy-rose": Look(900_042, "bob", 1, "pink brown", (128, 70, 76), "see_through", 1, 6, (200, 192, 198)),
}


def draw(look: Look) -> bytes:
    """The picture as a WebP file of SIZE x SIZE pixels; equal looks give equal pixels."""
    rng = np.random.default_rng([0x6A11, look.identity])
    hair = sample_hairstyle(
        rng, length=look.length, curl=look.curl, colour=look.colour, rgb=look.rgb, bangs=look.bangs, volume=look.volume,
        parting=look.parting, highlights=0.1, tied=False, undercut=False,
    )  # fmt: skip
    shade: Rgb = (round(look.wall[0] * 0.82), round(look.wall[1] * 0.82), round(look.wall[2] * 0.82))
    scene = sample_scene(
        rng, background="gradient", backdrop=(look.wall, shade), garment="round", camera="mid", head=0.44, shift=0.0, noise=0.8
    )
    portrait = render(sample_identity(look.identity), hair, scene, 0.0, SIZE, look.identity)
    file = io.BytesIO()
    Image.fromarray(portrait.image).save(file, "WEBP", quality=QUALITY, method=6)
    return file.getvalue()


def write_gallery(folder: Path = FOLDER) -> dict[str, int]:
    """Writes the pictures, removes others of the folder, and gives each file's bytes by name. Raises ValueError when they are too large."""
    pictures = {f"{name}.webp": draw(look) for name, look in LOOKS.items()}
    total = sum(map(len, pictures.values()))
    if total > MAX_BYTES:
        raise ValueError(f"the gallery has {total} bytes, at most {MAX_BYTES} are wanted; lower SIZE or QUALITY")
    for old in folder.glob("*.webp"):
        if old.name not in pictures:
            old.unlink()
    for name, content in pictures.items():
        artifacts.write_bytes(folder / name, content)
    return {name: len(content) for name, content in pictures.items()}


def main() -> None:
    """Writes the gallery and prints its sizes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sizes = write_gallery()
    for name, size in sizes.items():
        print(f"{size:7d}  {name}")  # noqa: T201
    print(f"{sum(sizes.values()):7d}  in all")  # noqa: T201


if __name__ == "__main__":
    main()
