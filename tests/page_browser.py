"""A headless Chromium for the page's tests: this machine's, or the one that Playwright has downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.imaging.decode import encode_png
from tests.app_standin import Live

DROP = """async (zone, {bytes, name}) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(bytes)], name, {type: "image/png"}));
  zone.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A started browser; skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'deephair[browser]'")
    with api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("needs Chromium: the system's package, or 'playwright install chromium'")
        browser = playwright.chromium.launch(
            executable_path=path, args=["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        )
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """One open page on a stand-in server, what its console said, and whom it asked."""

    page: Any
    live: Live
    words: dict[str, str]
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def drop(self, zone: str, photo: np.ndarray) -> None:
        """Drops a photo onto the zone 'target' or 'reference'."""
        self.page.locator(f".zone[data-field={zone}]").evaluate(DROP, {"bytes": list(encode_png(photo)), "name": f"{zone}.png"})

    def press(self, *keys: str) -> None:
        """Presses keys, one after the other."""
        for key in keys:
            self.page.keyboard.press(key)

    def draw(self, *places: tuple[float, float], fingers: int = 1) -> None:
        """Draws over the editor's viewport through places (shares of its width and height): with the mouse, or with fingers where the page
        is a phone's. Two fingers move away from the middle of the way, one along it and one against it."""
        box = self.page.locator("#viewport").bounding_box()
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
        if not self.page.evaluate("navigator.maxTouchPoints > 0"):
            self.page.mouse.move(*points[0])
            self.page.mouse.down()
            for point in points[1:]:
                self.page.mouse.move(*point, steps=6)
            self.page.mouse.up()
            return
        session = self.page.context.new_cdp_session(self.page)
        centre = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        mirrored = [(2 * centre[0] - x, 2 * centre[1] - y) for x, y in points]
        for number, (kind, index) in enumerate([("touchStart", 0), *(("touchMove", i) for i in range(1, len(points))), ("touchEnd", -1)]):
            touching = [points[index], mirrored[index]][:fingers] if kind != "touchEnd" else []
            touches = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(touching)]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches, "timestamp": number / 10})
        session.detach()


@contextmanager
def visit(
    browser: Any, live: Live, words: dict[str, str], *, phone: bool = False, locale: str = "en", ready: bool = True
) -> Iterator[Visit]:
    """Opens the page and, unless told otherwise, waits until it knows the server."""
    size = {"width": 390, "height": 844} if phone else {"width": 1280, "height": 900}
    context = browser.new_context(viewport=size, locale=locale, has_touch=phone, is_mobile=phone, permissions=["camera"])
    context.set_default_timeout(60_000)
    page = context.new_page()
    opened = Visit(page, live, words)
    page.on("console", lambda message: opened.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    here = f"http://127.0.0.1:{live.port}/"
    page.on("request", lambda request: None if request.url.startswith((here, "blob:", "data:")) else opened.foreign.append(request.url))
    page.goto(here)
    if ready:
        page.wait_for_selector("#weights:not(:empty)")
        page.wait_for_selector("#gallery:not([hidden])")
    try:
        yield opened
    finally:
        context.close()
