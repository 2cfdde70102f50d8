"""The page without a browser: its words are complete in both languages, and it asks nobody but its own server."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from backend.app.api import STATIC
from backend.demo.gallery import LOOKS, MAX_BYTES
from backend.imaging.decode import decode_upload
from backend.training.data_processing.prompts import choices

HTML = (STATIC / "index.html").read_text()
SCRIPTS = {path.relative_to(STATIC).as_posix(): path.read_text() for path in STATIC.rglob("*.js")}
CODE = {name: text for name, text in SCRIPTS.items() if not name.startswith("words/")}


@cache
def words(language: str) -> dict[str, str]:
    """A language's words; those of a table as table.key."""
    found, table = {}, ""
    for line in SCRIPTS[f"words/{language}.js"].splitlines():
        if match := re.fullmatch(r"  (\w+): \{", line):
            table = f"{match[1]}."
        elif line == "  },":
            table = ""
        elif match := re.fullmatch(r'\s+"?([\w -]+?)"?: "(.*)",', line):
            found[table + match[1]] = match[2]
        else:
            assert line.startswith(("//", "export", "};")), line
    return found


def test_both_languages_say_the_same_things() -> None:
    assert list(words("en")) == list(words("vi"))
    assert len(words("en")) > 100
    for key, text in words("en").items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", words("vi")[key])), key
        assert text.strip() and words("vi")[key].strip(), key


def test_every_word_is_known_and_none_is_idle() -> None:
    asked = set(re.findall(r'data-i18n(?:-\w+)?="(\w+)"', HTML))
    quoted = {text for code in CODE.values() for text in re.findall(r'"(\w+)"', code)}
    made = ("pick_", "mode_")  # their ends come from the server
    known = {key for key in words("en") if "." not in key}
    assert asked <= known
    assert {key for key in known - asked - quoted if not key.startswith(made)} == set()
    for code in CODE.values():
        assert set(re.findall(r'\b(?:t|tell|hint)\("(\w+)"', code)) <= known


@pytest.mark.parametrize("language", ["en", "vi"])
def test_what_a_picker_can_offer_has_a_name(language: str) -> None:
    assert {value for values in choices().values() for value in values} <= {key.removeprefix("values.") for key in words(language)}


def test_the_gallery_is_small_named_and_readable() -> None:
    pictures = sorted((STATIC / "gallery").iterdir())
    assert {path.stem for path in pictures} == set(LOOKS) == {key[6:] for key in words("en") if key.startswith("looks.")}
    assert sum(path.stat().st_size for path in pictures) <= MAX_BYTES
    for path in pictures:
        assert decode_upload(path.read_bytes(), max_pixels=10**6).shape == (512, 512, 3)


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    assert not re.search(r"\sstyle=|<style|\son\w+=|javascript:", HTML)
    assert all(re.match(r'<script type="module" src="/static/\w+\.js">$', tag) for tag in re.findall(r"<script[^>]*>", HTML))
    for text in (HTML, *SCRIPTS.values(), *(path.read_text() for path in STATIC.glob("*.css"))):
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|\beval\(|innerHTML", text)


def test_every_file_that_is_named_is_there_and_every_file_is_named() -> None:
    used = {Path(name).name for name in re.findall(r'(?:src|href)="/static/([\w./]+)"', HTML)}
    for name, text in SCRIPTS.items():
        for imported in re.findall(r'from "(\./[\w./]+)"', text):
            path = (STATIC / name).parent / imported
            assert path.is_file(), f"{name} imports {imported}"
            used.add(path.name)
    assert {path.name for path in STATIC.rglob("*") if path.suffix in (".js", ".css", ".svg")} == used
    assert set(re.findall(r'href="#(i-\w+)"', HTML)) == set(re.findall(r'<symbol id="(i-\w+)"', HTML))
