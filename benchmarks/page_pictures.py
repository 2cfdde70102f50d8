"""The README's two pictures of the page, taken in headless Chromium from a running server: a rendered portrait tries on a gallery look.

    make serve                                                    in another terminal
    .venv/bin/python -m benchmarks.page_pictures [--url http://127.0.0.1:8000]

Needs the extra ``browser`` and Chromium (CONTRIBUTING.md). What the pictures show is the server's own work, whatever weights it has loaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from backend.config import REPO_ROOT
from backend.demo.portraits import render, sample_hairstyle, sample_identity, sample_scene
from backend.imaging.decode import encode_png
from tests.page_browser import chromium

PATIENCE_MS = 1_800_000
MAX_BYTES = 300_000  # of one picture; a palette is used above it
LOOK, VARIANTS = 3, 2  # the gallery's fourth picture


def portrait() -> bytes:
    """A person with a brown bob, as a PNG file."""
    rng = np.random.default_rng(3)
    hair = sample_hairstyle(rng, length="bob", curl=0, colour="natural brown", bangs="none", volume=1, parting=4, tied=False)
    scene = sample_scene(rng, garment="round", camera="mid", head=0.42, shift=0.0)
    return encode_png(render(sample_identity(900_047), hair, scene, 0.0, 640, 5).image)


def take(url: str, folder: Path) -> list[Path]:
    """Goes through the page's story and leaves page_desktop.png and page_phone.png in ``folder``."""
    desktop, phone = folder / "page_desktop.png", folder / "page_phone.png"
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 1700}, locale="en")
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.set_input_files("#target", files=[{"name": "me.png", "mimeType": "image/png", "buffer": portrait()}])
        page.locator(".look").nth(LOOK).click()
        page.wait_for_selector("#edit:not([hidden])")
        page.locator("#counts label").nth(VARIANTS - 1).click()
        page.click("#start")
        page.wait_for_selector("#actions:not([hidden])")
        page.wait_for_selector("#running", state="hidden")
        page.mouse.move(2, 2)
        page.evaluate("() => window.scrollTo(0, 0)")
        page.wait_for_timeout(800)
        page.screenshot(path=desktop, full_page=True)
        page.click("#theme")
        page.click("[data-language=vi]")
        page.set_viewport_size({"width": 390, "height": 844})
        page.evaluate("() => document.getElementById('stage').scrollIntoView()")
        page.wait_for_timeout(800)
        page.screenshot(path=phone)
        page.click("#delete")
        page.click("#delete-now")
        page.wait_for_selector("#empty:not([hidden])")
    for path in (desktop, phone):
        picture = Image.open(path).convert("RGB")
        picture.save(path, optimize=True)
        if path.stat().st_size > MAX_BYTES:
            picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=5, dither=Image.Dither.NONE).save(path, optimize=True)
    return [desktop, phone]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is")
    parser.add_argument("--folder", type=Path, default=REPO_ROOT / "docs/pictures")
    given = parser.parse_args()
    for path in take(given.url, given.folder):
        print(f"{path.stat().st_size:8d}  {path}")


if __name__ == "__main__":
    main()
