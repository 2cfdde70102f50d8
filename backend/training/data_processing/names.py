"""K-Hairstyle's file and folder names (facts/khairstyle.md 1.2 and 1.6).

    0002.mqset/<NNNN.basestyle>/<NNNN.SOURCE>/<SOURCE>-<VVV>.jpg      photo, and its label <SOURCE>_<VVV>.json

Names are compared in NFC, without case, with '-' for '_'.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import PurePath

EDITIONS = ("hqset", "mqset", "rawset")
MAX_STEM_BYTES = 200  # leaves room for '_000.png' below the 255 bytes that file systems allow
_VIEW = re.compile(r"([A-Za-z]{2,4}\d{3,8})[-_](\d{1,4})")
_NUMBERED = re.compile(r"(\d{1,5})\.(.+)", re.DOTALL)
_SOURCE = re.compile(r"[A-Za-z]{2,4}\d[\w.]*")


@dataclass(frozen=True)
class Folders:
    """What the folders above a file say; None where a level is missing."""

    edition: str | None
    basestyle: str | None
    source: str | None
    index: int | None  # the running index of '<NNNN.SOURCE>', roughly the order of capture


def nfc(text: str) -> str:
    """Unicode NFC (macOS hands out NFD names)."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def last_part(path: str) -> str:
    """The file name within a path of either slash, NFC, without outer blanks."""
    return nfc(path.replace("\\", "/").rpartition("/")[2].strip())


def stem_key(name: str) -> str:
    """The key by which photos and labels meet: the name without folders and suffix, NFC, no case, '-' for '_'."""
    stem = last_part(name)
    dot = stem.rfind(".")
    return (stem[:dot] if dot > 0 else stem).casefold().replace("_", "-")


def photo_id(stem: str) -> str:
    """A photo's id from its file's stem: '<SOURCE>-<VVV>' in capitals with a hyphen where it has that form, else the
    stem in NFC."""
    view = _VIEW.fullmatch(nfc(stem))
    return f"{view[1].upper()}-{view[2]}" if view else nfc(stem)


def source_of(identifier: str) -> str | None:
    """The source within '<SOURCE>-<VVV>'; None for names of another form."""
    view = _VIEW.fullmatch(identifier)
    return view[1].upper() if view else None


def bad_name(stem: str) -> str | None:
    """Why a stem cannot serve as an id, or None where it can."""
    try:
        size = len(nfc(stem).encode("utf-8"))
    except UnicodeEncodeError:
        return "not valid UTF-8"
    if size > MAX_STEM_BYTES:
        return f"{size} bytes, {MAX_STEM_BYTES} at most"
    return None if stem.isprintable() else "control characters"


def folders_of(path: PurePath) -> Folders:
    """Reads the numbered folders above a file; the innermost of each kind counts."""
    edition = basestyle = source = None
    index = None
    for part in path.parts[:-1]:
        numbered = _NUMBERED.fullmatch(repaired(nfc(part)))
        if numbered is None:
            continue
        if numbered[2].casefold() in EDITIONS:
            edition = numbered[2].casefold()
        elif _SOURCE.fullmatch(numbered[2]) and numbered[2].isascii():
            source, index = numbered[2], int(numbered[1])
        else:
            basestyle = numbered[2].strip()
    return Folders(edition, basestyle, source, index)


def repaired(name: str, encodings: tuple[str, ...] = ("utf-8",)) -> str:
    """Undoes the cp437 reading of Korean names, as zip tools do it to K-Hairstyle's folders; else the name itself.

    UTF-8 can hardly be met by chance; CP949 can, so it is tried only where the caller knows that the name was read as
    cp437.
    """
    if name.isascii():
        return name
    try:
        raw = name.encode("cp437")
    except UnicodeEncodeError:
        return name
    for encoding in encodings:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        if any("가" <= letter <= "힣" for letter in nfc(text)):
            return nfc(text)
    return name


def printable(path: object) -> str:
    """A path or a label's text in a form that can be written as UTF-8: what is not valid is shown as ``\\xNN``."""
    text = str(path)
    try:
        raw = text.encode("utf-8", "surrogateescape")  # a file name's own bytes
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass")  # a lone surrogate out of JSON
    return raw.decode("utf-8", "backslashreplace")
