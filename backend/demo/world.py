"""The miniature world on disk: the K-Hairstyle set and the pretrained parts, where a configuration expects the real ones."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from backend import artifacts, console
from backend.config import Config
from backend.demo.khairstyle_set import BENCH, DEMO, LEARN, LEARN_LONG, write_khairstyle
from backend.demo.miniature import TRAINED, build
from backend.demo.training_data import renderer_version
from backend.errors import UsageError

logger = logging.getLogger(__name__)

MARK = ".miniature.json"  # says which set or weights a folder holds, so that a second call finds them and real ones are never written over
SETS = {"demo": DEMO, "bench": BENCH, "learn": LEARN, "learn-long": LEARN_LONG}


def set_mark(size: str) -> dict[str, Any]:
    """What the mark of a set says: another size, or another version of the renderer, makes other pictures."""
    return {"set": size, **SETS[size], "renderer": renderer_version()}


def weights_mark() -> dict[str, Any]:
    """What the mark of the pretrained parts says: a newer checkout with other parts builds them anew."""
    digest = hashlib.sha256()
    for path in sorted(path for path in TRAINED.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(TRAINED).as_posix()} {artifacts.sha256_file(path)}\n".encode())
    return {"weights": digest.hexdigest()}


def build_world(config: Config, size: str = "demo") -> dict[str, Any]:
    """Writes the miniature set into ``data.images`` and ``data.labels`` and the parts into ``paths.weights``.

    Does nothing where this version's are already there; parts without a mark were put there by somebody else and stay. Raises
    UsageError when the set's folders hold anything else.
    """
    wanted = set_mark(size)
    images, labels = config.data.images, config.data.labels
    mark = images / MARK
    if not (mark.is_file() and artifacts.read_json(mark) == wanted):
        for folder in (images, labels):
            if folder.is_dir() and any(path.name != MARK for path in folder.iterdir()) and not mark.is_file():
                raise UsageError(
                    f"{folder} holds other files; the miniature set is not written over them",
                    hint="choose empty folders with data.images=... and data.labels=..., or use --config configs/demo.yaml",
                )
        progress: list[console.Progress] = []

        def show(done: int, total: int) -> None:
            if not progress:
                progress.append(console.Progress("portraits", total, unit="photo"))
            progress[0].update(done - progress[0].done)

        images.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(mark, {"set": "unfinished"})
        write_khairstyle(images, labels, **SETS[size], progress=show)
        artifacts.write_json(mark, wanted)
    built, parts = config.paths.weights / MARK, weights_mark()
    present = (config.paths.weights / "face" / "yolov8n-face.onnx").is_file()
    if not present or (built.is_file() and artifacts.read_json(built) != parts):
        with console.timed("building the miniature pretrained parts"):
            build(config.paths.weights)
            artifacts.write_json(built, parts)
    return {"images": str(images), "labels": str(labels), "weights": str(config.paths.weights), **wanted}
