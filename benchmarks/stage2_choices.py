"""What decides the settings of Stage 2: the same short run from the base weights with one thing changed at a time.

    python benchmarks/stage2_choices.py --config configs/miniature.yaml --steps 1500 --out runs/choices [--only tokens_1,masks_silhouette]

Needs the processed set and the finished Stage 1 of that configuration. Every variant is judged on the same held-out pairs with the same
seeds; the table is written after each one, and finished variants are not run again.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from backend import artifacts
from backend.config import Config, load_config
from backend.imaging import masks
from backend.training import checkpoints, train_stage2
from backend.training.candidate import rebuilt
from backend.training.evaluate import Evaluator
from backend.training.models.texture_encoder import load_texture_encoder
from backend.training.stage2_files import PREFIX, texture_encoder_path
from backend.tryon.painter import Painter

logger = logging.getLogger(__name__)

VARIANTS: dict[str, list[str]] = {
    "as_shipped": [],
    "tokens_1": ["train.style_tokens=1"],
    "reference_same": ["train.reference=same"],
    "text_drop_0.1": ["train.drop.text=0.1"],
    "style_drop_0.3": ["train.drop.style=0.3"],
    "masks_silhouette": [],
    "injection_decoupled": ["train.injection=decoupled"],
    "noise_offset_0.1": ["train.noise_offset=0.1"],
    "texture_loss": ["train.texture_every=1", "train.texture_weight=1.5", "train.texture_max_timestep=1000"],
}
SHOWN = ("hair_color_delta_e", "curl_agreement", "masked_psnr", "lpips")


@contextlib.contextmanager
def silhouette_masks() -> Iterator[None]:
    """In training the region is the hair itself with a margin, as the original design has it; serving's stays."""
    shipped = masks.edit_region

    def region(hair: Any, face_box: Any, shape: Any = None, borrowed: Any = ()) -> Any:
        return shipped(hair, face_box) if shape is None else masks.grow(hair, shape.margin * hair.shape[0])

    with mock.patch.object(masks, "edit_region", region), mock.patch("backend.training.stage2_cache.REGIONS", -1):
        yield


def run(config: Config, encoder: Path) -> dict[str, Any]:
    """Trains one variant and measures it on the configuration's evaluation split."""
    config.paths.checkpoints.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(encoder, texture_encoder_path(config))
    began = time.monotonic()
    result = train_stage2.train(config)
    seconds = time.monotonic() - began
    newest = checkpoints.newest(config.paths.checkpoints, PREFIX)
    assert newest is not None
    figures = Evaluator(config, Painter(rebuilt(newest), load_texture_encoder(texture_encoder_path(config)), config)).run().figures
    return {"seconds": round(seconds), "loss_last": result["loss_last"], "figures": figures}


def line(name: str, figures: dict[str, Any]) -> str:
    """One row of the table."""
    shuffled = figures["baselines"]["shuffled_reference"]
    cells = [f"{figures[key]:.3f} [{figures[key + '_ci'][0]:.3f}, {figures[key + '_ci'][1]:.3f}]" for key in SHOWN if key in figures]
    return f"{name:18} " + " | ".join([*cells, f"shuffled {shuffled['hair_color_delta_e']:.2f} / {shuffled.get('curl_agreement', 0):.3f}"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/miniature.yaml")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=Path("runs/choices"))
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("overrides", nargs="*", help="key=value for every variant")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    encoder = texture_encoder_path(load_config(options.config, options.overrides))
    for name in options.only.split(","):
        written = options.out / f"{name}.json"
        if not written.is_file():
            folder = options.out / name
            settings = [*options.overrides, f"train.steps={options.steps}", f"paths.checkpoints={folder}", *VARIANTS[name]]
            with silhouette_masks() if name == "masks_silhouette" else contextlib.nullcontext():
                artifacts.write_json(written, run(load_config(options.config, settings), encoder))
    print("variant            " + " | ".join(SHOWN))
    for written in sorted(options.out.glob("*.json")):
        print(line(written.stem, artifacts.read_json(written)["figures"]))


if __name__ == "__main__":
    main()
