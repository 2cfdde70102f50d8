"""The page in headless Chromium, against a server with the stand-in pipeline. Long: a browser starts, and every story waits for its jobs.

pip install 'deephair[browser]'      Chromium: the system's package, or 'playwright install chromium'
pytest -m long tests/test_page_browser.py
"""

from __future__ import annotations

import base64
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from backend.tryon.values import FaceInfo, Preview
from tests.app_standin import Live, StandIn, app_config, composite, decoded, picture, png, serving
from tests.page_browser import Visit, chromium, visit
from tests.test_page import words

pytestmark = pytest.mark.long

PHOTO, LOOK = picture(300, 360, seed=1), picture(90, 90, seed=2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[Live]:
    with serving(app_config(tmp_path), StandIn(gate=threading.Semaphore(0))) as live:
        yield live


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with serving(app_config(tmp_path)) as server:
        yield server


def serious_findings(page: Any) -> list[str]:
    """axe-core's findings of serious and critical impact on the page as it is now."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-core: pip install 'deephair[browser]'")
    page.wait_for_timeout(400)  # a colour in transition has a contrast of its own
    found = axe.Axe().run(page).response["violations"]
    return [f"{f['id']}: {n['html']} {n['failureSummary']}" for f in found if f["impact"] in ("serious", "critical") for n in f["nodes"]]


def overflow(page: Any) -> int:
    """By how many pixels the page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def text_of(page: Any, selector: str) -> str:
    return str(page.locator(selector).inner_text())


# ---- the whole story ----


@pytest.mark.parametrize("language", ["en", "vi"])
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_two_photos_brush_cancel_slide_download_delete(browser: Any, gated: Live, phone: bool, language: str) -> None:
    with visit(browser, gated, words(language), phone=phone, locale=language) as it:
        page = it.page
        assert page.locator("html").get_attribute("lang") == language
        assert text_of(page, "h1") == it.words["title"]
        assert text_of(page, "#miniature") == it.words["miniature"]
        assert serious_findings(page) == []
        assert overflow(page) <= 0
        page.click("#theme")
        assert serious_findings(page) == []

        photos_and_area(it, phone)
        page.locator("#modes label").nth(1).click()
        assert page.locator("#pick-length").is_hidden()
        page.locator(".swatch").nth(2).click()
        page.focus("#strength")
        it.press("ArrowLeft", "ArrowLeft")

        page.click("#start")
        page.wait_for_selector("#running:not([hidden])")
        gated.engine.gate.release(1)  # type: ignore[union-attr]
        page.wait_for_selector("#bar[aria-valuenow]:not([aria-valuenow='0'])")
        assert serious_findings(page) == []
        page.click("#cancel")
        page.wait_for_selector("#empty:not([hidden])")
        assert page.evaluate("sessionStorage.getItem('deephair-jobs')") == "[]"

        page.locator("#counts label").nth(1).click()
        page.click("#start")
        gated.engine.gate.release(50)  # type: ignore[union-attr]
        page.wait_for_selector("#running", state="hidden")
        one, two = gated.engine.seen[-2:]
        check_requests(one, two)

        slide(it, phone)
        page.click("[data-view=sheet]")
        assert page.locator("#sheet img").count() == 3
        assert serious_findings(page) == []
        assert overflow(page) <= 0
        page.locator(".tile").nth(1).click()
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.suggested_filename == "deephair-1.png"
        assert np.array_equal(decoded(Path(download.value.path()).read_bytes()), composite(two).image)

        jobs = page.evaluate("JSON.parse(sessionStorage.getItem('deephair-jobs'))")
        assert len(jobs) == 2
        page.click("#delete")
        assert serious_findings(page) == []
        page.click("#delete-now")
        page.wait_for_selector("#empty:not([hidden])")
        assert text_of(page, "#empty-text") == it.words["deleted"]
        assert all(gated.client.get(f"/api/v1/jobs/{job}").json()["photos_deleted"] for job in jobs)
        assert page.locator(".filled:visible").count() == 0 and page.locator("#privacy").is_hidden()
        assert it.complaints == [] and it.foreign == []


def photos_and_area(it: Visit, phone: bool) -> None:
    """Drops both photos and paints below the detected area, which is the upper half: with undo, redo, eraser, zoom and keyboard."""
    page = it.page
    it.drop("target", PHOTO)
    it.drop("reference", LOOK)
    page.wait_for_selector("#edit:not([hidden])")
    assert text_of(page, "#target-note") == it.words["oneFace"]
    page.click("#edit")
    page.wait_for_selector("#editor[open]")
    assert serious_findings(page) == []
    assert page.locator("#undo").is_disabled()
    it.draw((0.45, 0.7), (0.5, 0.85), (0.55, 0.85))
    painted = mask_pixels(page)
    page.click("#undo")
    assert mask_pixels(page) < painted
    page.click("#redo")
    assert mask_pixels(page) == painted
    page.locator("[data-tool=eraser]").click()
    it.draw((0.5, 0.3), (0.5, 0.35))
    assert mask_pixels(page) < painted
    if phone:
        before = mask_pixels(page)
        it.draw((0.45, 0.45), (0.35, 0.4), (0.2, 0.3), fingers=2)
        assert mask_pixels(page) == before, "two fingers paint nothing"
    else:
        page.mouse.wheel(0, -400)
    assert int(text_of(page, "#zoom").split()[0]) > 110
    page.click("#zoom-fit")
    assert int(text_of(page, "#zoom").split()[0]) == 100
    page.focus("#viewport")
    before = mask_pixels(page)
    it.press("b", " ", "Shift+ArrowDown", "Shift+ArrowDown", "Shift+ArrowDown", "Shift+ArrowDown", "Shift+ArrowDown", " ")
    assert mask_pixels(page) > before
    it.press("Control+z")
    assert mask_pixels(page) == before
    page.click("#editor-done")
    page.wait_for_selector(f"#target-note:has-text('{it.words['areaMarked']}')")


def mask_pixels(page: Any) -> int:
    """Tinted pixels in the editor."""
    count = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v > 0).length"
    return int(page.locator("#editor-mask").evaluate(count))


def check_requests(one: Any, two: Any) -> None:
    assert (one.seed, two.seed) == (0, 1)
    assert np.array_equal(one.target, PHOTO) and np.array_equal(two.reference, LOOK)
    assert (one.mode, one.color, one.length, one.strength) == ("colour", "natural brown", None, 0.9)
    assert one.mask.shape == PHOTO.shape[:2] and np.array_equal(one.mask, two.mask)
    marked = one.mask > 0
    assert marked[:100, :100].all(), "the detected area was kept"
    assert marked[270:, 120:180].any() and not marked[270:, :40].any(), "what was painted was added, and nothing else"
    assert not marked[100:130, 145:155].all(), "what was erased is out"


def slide(it: Visit, phone: bool) -> None:
    page = it.page
    handle = page.locator(".handle")
    handle.focus()
    for key, value in (("Home", "0"), ("End", "100"), ("ArrowLeft", "98")):
        it.press(key)
        assert handle.get_attribute("aria-valuenow") == value
    box = page.locator("#slider").bounding_box()
    place = (box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.5)
    if phone:
        page.touchscreen.tap(*place)
    else:
        page.mouse.move(box["x"] + box["width"] * 0.6, place[1])
        page.mouse.down()
        page.mouse.move(*place, steps=4)
        page.mouse.up()
    assert abs(int(handle.get_attribute("aria-valuenow")) - 25) <= 1


# ---- by other ways ----


def test_paste_gallery_and_camera(browser: Any, live: Live) -> None:
    with visit(browser, live, words("en")) as it:
        page = it.page
        paste = """async (bytes) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(bytes)], "p.png", {type: "image/png"}));
          document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer, cancelable: true}));
        }"""
        page.evaluate(paste, list(png(120, 140, seed=4)))
        page.wait_for_selector("#edit:not([hidden])")
        page.locator(".look").nth(1).click()
        assert page.locator(".look[aria-pressed=true]").count() == 1
        page.click("#start")
        page.wait_for_selector("#actions:not([hidden])")
        assert live.engine.seen[-1].target.shape == (140, 120, 3)
        assert live.engine.seen[-1].reference.shape == (512, 512, 3)
        assert live.engine.seen[-1].mask is None, "an area that nobody edited is the server's to choose"

        page.locator(".zone[data-field=target] .remove").click()
        page.locator(".zone[data-field=target] .camera").click()
        page.wait_for_selector("#camera-shoot:enabled")
        assert serious_findings(page) == []
        page.click("#camera-shoot")
        page.wait_for_selector("#edit:not([hidden])")
        page.click("#start")
        page.wait_for_selector(".tile >> nth=1")
        page.wait_for_selector("#running", state="hidden")
        assert live.engine.seen[-1].target.shape[2] == 3 and live.engine.seen[-1].target.shape[:2] != (140, 120)
        assert it.complaints == []


def test_problems_are_told_where_they_arise(browser: Any, live: Live) -> None:
    with visit(browser, live, words("vi"), locale="vi") as it:
        page = it.page
        page.click("#start")
        assert text_of(page, "#hint") == it.words["needTarget"]
        page.set_input_files("#target", files=[{"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"}])
        page.wait_for_selector("#target-note.bad")
        assert text_of(page, "#target-note") == it.words["errors.not_an_image"]
        it.drop("target", PHOTO)
        page.wait_for_selector("#edit:not([hidden])")
        page.click("#start")
        assert text_of(page, "#hint") == it.words["needWish"]
        for wish, code, again in (("no face", "no_face", False), ("bug", "internal", True)):
            page.fill("#prompt", wish)
            page.click("#start")
            page.wait_for_selector("#problem:not([hidden])")
            assert text_of(page, "#problem p") == it.words[f"errors.{code}"]
            assert page.locator("#retry").is_visible() is again
            assert serious_findings(page) == []
        page.fill("#prompt", "bob")
        page.click("#retry")
        page.wait_for_selector("#actions:not([hidden])")
        assert page.locator("#problem").is_hidden()
        page.click("[data-language=en]")
        assert text_of(page, "#again") == words("en")["again"]


def test_what_the_server_does_not_offer_is_not_shown(browser: Any, live: Live) -> None:
    with visit(browser, live, words("en"), ready=False) as it:
        page = it.page
        document = live.client.get("/api/v1/openapi.json").json()
        del document["paths"]["/api/v1/gallery"]
        fields = document["paths"]["/api/v1/jobs"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
        for name in ("mask", "mode", "strength", "length", "curl", "color", "bangs"):
            del fields[name]
        page.route("**/openapi.json", lambda route: route.fulfill(json=document))
        with page.expect_response("**/openapi.json"):
            page.reload()
        it.drop("target", PHOTO)
        it.drop("reference", LOOK)
        page.wait_for_selector(f"#target-note:has-text('{it.words['oneFace']}')")
        for selector in ("#gallery", "#edit", "#pickers", "#modes", "#strength-field"):
            assert page.locator(selector).is_hidden(), selector
        page.click("#start")
        page.wait_for_selector("#actions:not([hidden])")
        assert np.array_equal(live.engine.seen[-1].reference, LOOK)


def _answer(content: dict[str, Any], route: Any) -> None:
    route.fulfill(json=content)


def test_a_few_step_server_offers_neither_strength_nor_steps(browser: Any, live: Live) -> None:
    with visit(browser, live, words("en"), ready=False) as it:
        page = it.page
        told = live.client.get("/api/v1/models").json()
        for few_step, hidden in ((None, False), ({"kind": "lcm", "sha256": "0" * 64}, True)):
            page.unroute_all()
            page.route("**/api/v1/models", functools.partial(_answer, told | {"sampling": {"few_step": few_step}}))
            with page.expect_response("**/api/v1/models"), page.expect_response("**/openapi.json"):
                page.reload()
            it.drop("target", PHOTO)
            it.drop("reference", LOOK)
            page.wait_for_selector(f"#target-note:has-text('{it.words['oneFace']}')")
            page.click("details summary")
            assert page.locator("#seed").is_visible() and page.locator("#modes").is_visible()
            for selector in ("#strength-field", "#steps-field"):
                assert page.locator(selector).is_hidden() == hidden, selector
        page.click("#start")
        page.wait_for_selector("#actions:not([hidden])")


def test_a_key_is_asked_for_once(browser: Any, tmp_path: Path) -> None:
    # the client's own look at /readyz needs no key
    with serving(app_config(tmp_path, api_key="open sesame")) as live, visit(browser, live, words("en"), ready=False) as it:
        page = it.page
        page.wait_for_selector("#key-dialog[open]")
        assert serious_findings(page) == []
        assert page.locator("#key").evaluate("e => e.closest('form').id") == "key-form"
        page.fill("#key", "open sesame")
        it.press("Enter")
        page.wait_for_selector("#gallery:not([hidden])")
        assert page.locator("#key-dialog").is_hidden()
        assert text_of(page, "#weights").startswith("Model aaaaaaaaaaaa")


class Couple(StandIn):
    """Sees two faces."""

    def preview(self, image: np.ndarray) -> Preview:
        seen = super().preview(image)
        return Preview([*seen.faces, FaceInfo((10.0, 20.0, 60.0, 80.0), 0.8, [[1.0, 2.0]] * 5)], seen.hair_mask)


def test_one_of_several_faces(browser: Any, tmp_path: Path) -> None:
    with serving(app_config(tmp_path), Couple()) as live, visit(browser, live, words("en")) as it:
        page = it.page
        it.drop("target", PHOTO)
        page.wait_for_selector("#faces:not([hidden])")
        assert text_of(page, "#target-note") == it.words["manyFaces"].replace("{count}", "2")
        assert serious_findings(page) == []
        page.locator(".face input").nth(0).focus()
        it.press("ArrowRight")
        assert page.evaluate("document.activeElement.value") == "1"
        page.click("#edit")
        page.wait_for_selector("#editor[open]")
        assert mask_pixels(page) == 0, "the hair that was found is the first person's"
        it.draw((0.5, 0.5), (0.55, 0.6))
        it.press("Escape")
        page.locator(".look").nth(0).click()
        page.click("#start")
        page.wait_for_selector("#actions:not([hidden])")
        assert live.engine.seen[-1].face == 1
        assert 0 < (live.engine.seen[-1].mask > 0).mean() < 0.2


# ---- the modules by themselves ----


def test_strokes_and_margins_are_those_of_geometry(live: Live, browser: Any) -> None:
    with visit(browser, live, words("en"), ready=False) as it:
        drawn = it.page.evaluate(
            """async () => {
              const { Mask } = await import("/static/mask.js");
              const mask = new Mask(60, 40);
              mask.stroke({x: 10, y: 8}, {x: 45, y: 30}, 6.5, 1);
              mask.stroke({x: -3, y: 39}, {x: -3, y: 39}, 9, 1);
              return { stroke: [...mask.data], grown: [...mask.grown(4).data] };
            }"""
        )
    y, x = np.mgrid[:40, :60] + 0.5
    share = np.clip(((x - 10) * 35 + (y - 8) * 22) / (35**2 + 22**2), 0, 1)
    line = np.hypot(x - 10 - share * 35, y - 8 - share * 22) <= 6.5
    stroke = line | (np.hypot(x + 3, y - 39) <= 9)
    assert np.array_equal(np.reshape(drawn["stroke"], (40, 60)), stroke)
    inside = np.argwhere(stroke)
    distance = np.min(np.hypot(*(np.argwhere(np.ones((40, 60)))[:, None] - inside).transpose(2, 0, 1)), axis=1).reshape(40, 60)
    assert np.array_equal(np.reshape(drawn["grown"], (40, 60)), distance <= 4)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (37, 23), (2000, 1500)])
def test_a_painted_mask_becomes_a_grey_png_of_the_photo_s_size(live: Live, browser: Any, width: int, height: int) -> None:
    small = Image.new("L", (50, 40))
    ImageDraw.Draw(small).ellipse((10, 5, 40, 30), fill=1)
    with visit(browser, live, words("en"), ready=False) as it:
        written = it.page.evaluate(
            """async ({data, width, height}) => {
              const { Mask } = await import("/static/mask.js");
              const { greyPng } = await import("/static/png.js");
              const mask = new Mask(50, 40, Uint8Array.from(data));
              const bytes = new Uint8Array(await (await greyPng(width, height, (y) => mask.row(y, width, height))).arrayBuffer());
              return btoa(String.fromCharCode(...bytes));
            }""",
            {"data": list(small.getdata()), "width": width, "height": height},
        )
    content = base64.b64decode(written)
    read = decoded(content)
    rows = ((np.arange(height) + 0.5) * 40 / height).astype(int)
    columns = ((np.arange(width) + 0.5) * 50 / width).astype(int)
    assert read.dtype == np.uint8
    assert np.array_equal(read, 255 * np.asarray(small)[rows][:, columns])
