"""Reference pictures that the operator offers: those of the folder ``app.gallery``, by their names in its listing."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from pathlib import Path

from backend import artifacts
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


class Offered:
    """Tells a picture of the gallery, as it was fetched from here, from a person's own. A file is read again when its time or size changes.
    Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._digests: dict[tuple[str, int, int], str] = {}  # (name, mtime in ns, size) -> sha256

    def holds(self, content: bytes) -> bool:
        """Whether these are the bytes of one of the gallery's files."""
        with self._lock:
            alike = [key for key in self._files() if key[2] == len(content)]
            return bool(alike) and hashlib.sha256(content).hexdigest() in map(self._digest, alike)

    def _files(self) -> list[tuple[str, int, int]]:
        found = []
        for name in gallery_names(self._folder):
            with contextlib.suppress(OSError):  # it may have been removed just now
                about = (self._folder / name).stat()
                found.append((name, about.st_mtime_ns, about.st_size))
        self._digests = {key: digest for key, digest in self._digests.items() if key in found}
        return found

    def _digest(self, key: tuple[str, int, int]) -> str:
        if key not in self._digests:
            with contextlib.suppress(OSError):
                self._digests[key] = artifacts.sha256_file(self._folder / key[0])
        return self._digests.get(key, "")
