"""The miniature world on disk: the K-Hairstyle set and the pretrained parts, where a configuration expects the real ones."""

from __future__ import annotations

import logging
from typing import Any

from backend import artifacts, console
from backend.config import Config
from backend.demo.khairstyle_set import BENCH, DEMO, LEARN, LEARN_LONG, write_khairstyle
from backend.demo.miniature import build
from backend.errors import UsageError

logger = logging.getLogger(__name__)

MARK = ".miniature.json"  # says which set a folder holds, so that a second call finds it and a real dataset is never written over


def build_world(config: Config, size: str = "demo") -> dict[str, Any]:
    """Writes the miniature set into ``data.images`` and ``data.labels`` and the parts into ``paths.weights``.

    Does nothing where they are already there. Raises UsageError when those folders hold anything else.
    """
    preset = {"demo": DEMO, "bench": BENCH, "learn": LEARN, "learn-long": LEARN_LONG}[size]
    wanted = {"set": size, **preset}
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
        write_khairstyle(images, labels, **preset, progress=show)
        artifacts.write_json(mark, wanted)
    if not (config.paths.weights / "face" / "yolov8n-face.onnx").is_file():
        with console.timed("building the miniature pretrained parts"):
            build(config.paths.weights)
    return {"images": str(images), "labels": str(labels), "weights": str(config.paths.weights), **wanted}
