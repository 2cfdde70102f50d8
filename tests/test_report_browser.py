"""Stage 3's report in headless Chromium, opened as a file: readable at both widths and in both schemes. Long: a browser starts.

pip install 'deephair[browser]'      Chromium: the system's package, or 'playwright install chromium'
pytest -m long tests/test_report_browser.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import World
from tests.page_browser import chromium
from tests.test_page_browser import overflow, serious_findings

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_the_report_is_readable_and_asks_nobody(browser: Any, finished_world: World, phone: bool, scheme: str) -> None:
    """No console error, no request but for the file itself, no serious finding of axe with all folds open, nothing wider than the window;
    the verdict stands in the first screen, and every link leads somewhere."""
    report = finished_world.root / "report/index.html"
    size = {"width": 390, "height": 844} if phone else {"width": 1280, "height": 900}
    context = browser.new_context(viewport=size, color_scheme=scheme, is_mobile=phone, has_touch=phone)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("data:") else requests.append(request.url))
    page.goto(report.as_uri())
    assert page.locator(".verdict strong").bounding_box()["y"] < size["height"] / 2
    assert overflow(page) <= 0
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert overflow(page) <= 0
    assert serious_findings(page) == []
    assert page.locator("img").evaluate_all("all => all.filter(one => !one.naturalWidth || !one.alt).length") == 0
    for target in page.locator("a").evaluate_all("all => all.map(one => one.getAttribute('href'))"):
        assert page.locator(target).count() == 1 if target.startswith("#") else (report.parent / target).is_file(), target
    assert complaints == [] and requests == [report.as_uri()]
    context.close()
