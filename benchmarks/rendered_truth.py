"""Transfer held against the truth: the target's own head, rendered anew with the reference's hairstyle. Only a rendered world has it.

    python benchmarks/rendered_truth.py                                                  the demo's transfer pairs (make demo)
    python benchmarks/rendered_truth.py --config configs/miniature.yaml --set learn --pairs 60

The report can ask of a transfer only what two photos of different people can tell: colour, curl, length. Here the whole picture is
judged, and above all what no figure of the report sees: ``uncovered``, where the old hair was and the new style has none, so that
background, clothes and neck have to be made up. Every method's picture against the truth: LPIPS of the head crop, PSNR in each part, the
distance (CIEDE2000) of the mean colours in ``uncovered`` and the share of it that still passes for hair, and the overlap of the hair's places
(intersection over union). Means with 95 % intervals over heads. ``vae``: the truth itself through the autoencoder, pasted as a result is.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.config import Config, load_config
from backend.demo import khairstyle_set
from backend.demo.khairstyle_set import Shot
from backend.demo.world import SETS
from backend.imaging import crop, masks
from backend.imaging.decode import decode_upload, write_png
from backend.machine import cores
from backend.training import baselines, figures, metrics, pairs
from backend.training.data_processing.prompts import NEUTRAL_PROMPT
from backend.training.models.bundle import load_bundle
from backend.training.models.perceptual import LpipsNet, load_perceptual
from backend.training.painting import Scene, ScenePainter, SceneReader, ThreadedMap, View
from backend.training.prepared import Prepared
from backend.tryon.painter import Painter, device_and_dtype
from backend.tryon.segmentation import HairParser

Picture = NDArray[np.uint8]
METHODS = ("ours", "shuffled_reference", "crop_paste", "bald", "no_op", "vae")
LEAST = 0.01  # share of the crop that a part must have to be judged


def shots(name: str) -> dict[str, Shot]:
    """Every photo of a rendered set by its name."""
    plan = SETS[name]
    heads, views, size, seed = (plan[key] for key in ("heads", "views", "size", "seed"))
    return {shot.stem: shot for shot in khairstyle_set.planned(heads, views, size, seed)}


def truth(job: tuple[Shot, Shot, Sequence[int], int]) -> tuple[Picture, Picture]:
    """The head crop (S, S, 3) of a photo as it were with another photo's hairstyle, and its hair (S, S) 0/255."""
    shot, reference, square, side = job
    cv2.setNumThreads(1)
    hair = khairstyle_set.hair_of(reference)
    encoded, label = khairstyle_set.shoot(replace(shot, source=replace(shot.source, hair=hair, before=None)))
    frame = decode_upload(encoded, max_pixels=10**9)
    rings = [np.array([[p["x"], p["y"]] for p in ring]) for ring in json.loads(label["polygon1"])]
    found = masks.rasterize(rings, *frame.shape[:2])
    place = crop.Square(*square)
    return crop.resize(crop.crop_square(frame, place), side), crop.resize(crop.crop_square(found, place), side)


def judged(network: LpipsNet, scene: Scene, view: View, true: Picture, hair: Picture) -> dict[str, float]:
    """The figures of one picture."""
    old, shown = scene.target.hair > 0, view.hair > 0
    parts = {"uncovered": old & (hair == 0), "hair": hair > 0, "changed": old | (hair > 0)}
    found = {"lpips": metrics.lpips(network, [view.picture], [true])[0]}
    for name, part in parts.items():
        if part.mean() >= LEAST:
            found[f"psnr_{name}"] = metrics.masked_psnr(view.picture, true, part.astype(np.uint8) * 255)
    if parts["uncovered"].mean() >= LEAST:
        part = parts["uncovered"].astype(np.uint8) * 255
        found["colour_uncovered"] = metrics.ciede2000(metrics.hair_colour(view.picture, part), metrics.hair_colour(true, part))
        found["still_hair"] = float((shown & parts["uncovered"]).sum() / parts["uncovered"].sum())
    found["iou"] = float((shown & (hair > 0)).sum() / max((shown | (hair > 0)).sum(), 1))
    return found


def painted(config: Config, drawn: pairs.PairSet, count: int) -> Iterator[tuple[Scene, dict[str, View], ScenePainter]]:
    """The pairs with every method's picture, batch by batch."""
    prepared, each = Prepared(config.paths.processed), ThreadedMap(config.evaluate.workers)
    parser = HairParser(config.paths.weights, device=device_and_dtype(config)[0])
    reader = SceneReader(config, prepared, each)
    ours = ScenePainter(config, Painter.of_bundle(load_bundle(config.paths.bundle, config.paths.weights), config), parser, reader)
    size = config.evaluate.batch_size
    for start in range(0, min(count, len(drawn.transfer)), size):
        where = slice(start, min(start + size, count))
        scenes = reader(drawn.transfer[where])
        right = ours(scenes, [scene.pair.reference for scene in scenes], NEUTRAL_PROMPT)
        wrong = ours(scenes, [pair.reference for pair in drawn.shuffled[where]], NEUTRAL_PROMPT)
        for scene, one, other in zip(scenes, right, wrong, strict=True):
            moved = View(*baselines.crop_paste(scene.target, scene.reference, scene.head.bald, scene.head.region, config.sample.feather))
            views = {"ours": one, "shuffled_reference": other, "crop_paste": moved, "bald": ours.as_result(scene, scene.head.bald),
                     "no_op": View(scene.target.photo, scene.target.hair)}  # fmt: skip
            yield scene, views, ours


def measure(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of all methods."""
    rows = Prepared(config.paths.processed).rows(config.evaluate.split)
    drawn, known = pairs.draw(rows, config.evaluate), shots(options.set)
    side, listed = config.data.resolution, drawn.transfer[: options.pairs]
    jobs = [(known[name_of(pair.target)], known[name_of(pair.reference)], pair.target["square"], side) for pair in listed]
    network, backbone = load_perceptual(config.paths.weights)
    values: dict[str, dict[str, list[tuple[float, str]]]] = {method: defaultdict(list) for method in METHODS}
    with ProcessPoolExecutor(cores()) as pool:
        truths = pool.map(truth, jobs)
        for number, ((scene, views, painter), (true, hair)) in enumerate(zip(painted(config, drawn, len(listed)), truths, strict=True), 1):
            region = masks.changed_region(scene.head.region, scene.target.hair, hair, scene.target.face_box)
            views["vae"] = View(painter.paste(scene, painter.through_vae([true])[0], region).image, hair)
            for method, view in views.items():
                for name, value in judged(network, scene, view, true, hair).items():
                    values[method][name].append((value, scene.pair.head))
            if options.pictures:
                shown = [scene.target.photo, scene.reference.photo, scene.head.bald, *(views[m].picture for m in METHODS[:3]), true]
                write_png(options.pictures / f"{number:03d}.png", np.hstack(shown))
            sys.stderr.write(f"\r{number} of {len(listed)} pairs")
    sys.stderr.write("\n")
    found = {
        method: {
            key: value for name, each in by_name.items() for key, value in figures.mean(name, each, config.evaluate, of=len(listed)).items()
        }
        for method, by_name in values.items()
    }
    return {"pairs": len(listed), "heads": len({pair.head for pair in listed}), "lpips_backbone": backbone, "methods": found}


def name_of(row: dict[str, Any]) -> str:
    """The name that a prepared photo was shot under."""
    return Path(row["image"]).stem


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value settings")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--set", choices=sorted(SETS), default="demo", help="which rendered set the prepared photos are of")
    parser.add_argument("--pairs", type=int, default=10**6, help="of the transfer pairs, from the first on")
    parser.add_argument(
        "--pictures", type=Path, help="also lay target, reference, bald, ours, shuffled, crop_paste and truth side by side here"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    report = {"config": config.name, "bundle_sha256": artifacts.sha256_file(config.paths.bundle), **measure(config, options)}
    if options.json:
        sys.stdout.write(json.dumps(report) + "\n")
        return 0
    sys.stdout.write(f"{report['pairs']} pairs of {report['heads']} heads, LPIPS by {report['lpips_backbone']}\n")
    for method, found in report["methods"].items():
        cells = (f"{n} {v:.3g} [{found[n + '_ci'][0]:.3g}, {found[n + '_ci'][1]:.3g}]" for n, v in found.items() if n + "_ci" in found)
        sys.stdout.write(f"{method:20s} {'  '.join(cells)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
