"""Reference pictures that the operator offers: those of the folder ``app.gallery``, by their names in its listing."""

from __future__ import annotations

from pathlib import Path

from backend.imaging.decode import sniff

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def gallery_names(folder: Path) -> list[str]:
    """The pictures' file names, sorted; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def gallery_title(name: str) -> str:
    """A file name as words: ``long-wavy_black.jpg`` is "long wavy black"."""
    return " ".join(Path(name).stem.replace("-", " ").replace("_", " ").split())


def gallery_picture(folder: Path, name: str) -> tuple[bytes, str] | None:
    """A picture's bytes and media type; None where the listing has no such name, or the file is no picture.

    The name is compared with the listing and never becomes part of a path unless it stands there.
    """
    found = next((known for known in gallery_names(folder) if known == name), None)
    if found is None:
        return None
    content = (folder / found).read_bytes()
    kind = sniff(content)
    return None if kind is None else (content, f"image/{kind.lower()}")
