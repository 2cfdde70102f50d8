"""Trains the miniature weights: ``python -m backend.demo.train_weights [--parts detector,parser,...] [--out FOLDER]``.

Everything is rendered and drawn from a fixed seed. A part that has its card in the output folder is finished; an interrupted one
goes on from its last checkpoint. ``--length short`` is made for two CPU cores and about three hours, ``long`` for a graphics card.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend import artifacts
from backend.demo import compact, miniature
from backend.demo.train_loop import OutOfTime, Workplace
from backend.demo.training_data import HELD_OUT_HEADS, TRAIN_HEADS, Photos, renderer_version
from backend.training import results

logger = logging.getLogger(__name__)
HELD_OUT_PHOTOS = 128


@dataclass(frozen=True)
class Trainer:
    """Where a part's training function is, ``module:function``, and the function of ``scores`` that judges it (empty: it does so itself)."""

    function: str
    judge: str


def main(arguments: list[str] | None = None) -> int:
    """Trains the parts that were asked for and are not finished; returns 0 when all of them are."""
    import torch

    parser = _parser()
    options = parser.parse_args(arguments)
    if options.go_on_from is not None and (others := set(options.parts.split(",")) - set(GO_ON)):
        parser.error(f"--from is for {', '.join(GO_ON)}; name them with --parts ({', '.join(sorted(others))} would start from nothing)")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")  # TF32 on a card that has it; no effect on a CPU
    deadline = time.monotonic() + 60 * options.budget_minutes
    place = Workplace(
        checkpoints=options.work / "checkpoints",
        cache=options.work / "photos",
        weights=options.out,
        seed=options.seed,
        deadline=deadline,
        workers=options.workers,
        device=torch.device(options.device),
        loaders=options.loaders,
        length=options.length,
        limit=options.steps,
        start=options.go_on_from,
        bf16=options.bf16,
    )
    try:
        for name in options.parts.split(","):
            train_part(name, place)
    except OutOfTime as stop:
        logger.warning("%s", stop)
        return 1
    return 0


def train_part(name: str, place: Workplace) -> None:
    """Trains one part, judges it on held-out heads and writes its card last, which is what makes it finished."""
    import torch

    card_path = place.weights / miniature.by_name(name).card
    if card_path.is_file():
        logger.info("%s is finished: %s", name, artifacts.read_json(card_path)["scores"])
        return
    began, commit = time.monotonic(), results.git_commit()
    trainer = TRAINERS[name]
    module, function = trainer.function.split(":")
    torch.manual_seed(place.seed)
    card = getattr(importlib.import_module(module), function)(place)
    part = miniature.by_name(name)
    if part.large:
        compact.squeeze(place.weights / part.large)
    trial = place.limit is not None and place.start is None
    held_out = (16 if trial else HELD_OUT_PHOTOS) if trainer.judge else 0
    scores = judge(name, place.weights, Photos(place.cache, "held_out", held_out, workers=place.workers)) if held_out else card["scores"]
    logger.info("%s: %s", name, scores)
    about = {"part": name, "name": "miniature", "trained": True, "seed": place.seed, "scores": scores, "renderer": renderer_version()}
    about |= {"commit": commit, "length": place.length, "device": _device_name(place)}
    if place.start is not None:
        before = artifacts.read_json(place.start / part.card)
        card["steps"] += before["steps"]
        about["goes_on_from"] = {"commit": before["commit"], "steps": before["steps"]}
    heads = {"train_heads": [TRAIN_HEADS.start, TRAIN_HEADS.stop], "held_out_heads": [HELD_OUT_HEADS.start, HELD_OUT_HEADS.stop]}
    artifacts.write_json(card_path, about | heads | card | {"minutes": round((time.monotonic() - began) / 60, 1)})


def _device_name(place: Workplace) -> str:
    import torch

    return torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "cpu"


def judge(name: str, weights: Path, photos: Photos) -> dict[str, Any]:
    """A part's scores on held-out photos, inside a complete weights folder, as the product meets it."""
    function = getattr(importlib.import_module("backend.demo.scores"), TRAINERS[name].judge)
    with tempfile.TemporaryDirectory() as folder:
        miniature.build(Path(folder) / "weights", trained=weights)
        miniature.copy_part(miniature.by_name(name), weights, Path(folder) / "weights")
        return dict(function(Path(folder) / "weights", [photos[k] for k in range(len(photos))]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the miniature weights from rendered portraits.")
    parser.add_argument("--parts", default=",".join(TRAINERS), help="comma-separated, in the order of training (default: all)")
    parser.add_argument("--out", type=Path, default=miniature.TRAINED, help="weights folder that receives the trained parts")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "deephair_train", help="checkpoints and rendered photos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="rendering processes")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the long training")
    parser.add_argument("--loaders", type=int, default=0, help="processes that draw batches ahead (0: none, for a machine of few cores)")
    parser.add_argument("--length", choices=("short", "long"), default="short")
    parser.add_argument("--steps", type=int, help="train each part this few steps, to try the script; use an --out and --work of its own")
    parser.add_argument(
        "--from",
        dest="go_on_from",
        type=Path,
        metavar="FOLDER",
        help=f"go on from the trained parts in this folder, for --steps steps and at half the rate ({', '.join(GO_ON)})",
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; faster on a card and on a CPU with instructions for it")
    parser.add_argument("--budget-minutes", type=float, default=1e6, help="stop cleanly after this long; run again to go on")
    return parser


GO_ON = ("vae", "unet")
"""Parts that can start from trained weights."""

TRAINERS: dict[str, Trainer] = {
    "detector": Trainer("backend.demo.train_detector:train", "detector"),
    "parser": Trainer("backend.demo.train_pictures:train_parser", "parser"),
    "identity": Trainer("backend.demo.train_identity:train", "identity"),
    "perceptual": Trainer("backend.demo.train_pictures:train_perceptual", "perceptual"),
    "vae": Trainer("backend.demo.train_autoencoder:train_vae", "vae"),
    "text": Trainer("backend.demo.train_diffusion:train_text", "text"),
    "unet": Trainer("backend.demo.train_diffusion:train_unet", "unet"),
    "controlnet": Trainer("backend.demo.train_diffusion:train_controlnet", "controlnet"),
    "resnet": Trainer("backend.demo.train_stages:train_resnet", ""),
    "stage2": Trainer("backend.demo.train_stages:train_stage2_start", ""),
}

if __name__ == "__main__":
    sys.exit(main())
