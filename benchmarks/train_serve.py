"""Train = serve: the transfer pairs of a report once more, as a person does them: two photos over HTTP, one picture back.

    python benchmarks/train_serve.py                                      the demo's report (make demo), every transfer pair
    python benchmarks/train_serve.py --config configs/rtx3060.yaml --pairs 50 --json

The evaluation works on prepared head crops with the label's hair; the server gets the whole original photos and finds head, face and hair by
itself. What it answers is cut out where Stage 0 cut and measured by the evaluation's own instruments, on the pairs, steps and guidance of
``{paths.report}/samples.json``. ``within``: whether the mean over HTTP lies in the report's interval.
``difference``: HTTP less report on the same pairs, with the interval over heads of the report's own kind. Photos that the server refuses (a
face blurred away, say) are counted and left out on both sides.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from backend import artifacts
from backend.config import Config, load_config
from backend.imaging import crop
from backend.imaging.decode import decode_upload
from backend.training import figures, pairs
from backend.training.measuring import Instruments
from backend.training.models.bundle import load_bundle
from backend.training.painting import Scene, SceneReader, ThreadedMap, View
from backend.training.prepared import Prepared
from backend.tryon.painter import device_and_dtype
from backend.tryon.segmentation import HairParser
from benchmarks.serve import server, surroundings

MEASURED = ("hair_color_delta_e", "hair_length_error", "curl_agreement", "volume_agreement", "clip_i", "dino_hair", "psnr_non_hair",
            "ssim_non_hair", "identity_similarity", "failure_rate")  # fmt: skip


def over_http(client: httpx.Client, config: Config, pair: pairs.Pair) -> tuple[bytes, bytes] | str:
    """The picture and its mask, or the code of what the server refused."""
    photos = {
        name: (config.data.images / row["image"]).read_bytes() for name, row in (("target", pair.target), ("reference", pair.reference))
    }
    settings = config.evaluate
    fields = {"seed": str(pairs.picture_seed(pair, settings.seed)), "steps": str(settings.steps), "guidance": str(settings.guidance)}
    place = str(client.post("/api/v1/jobs", files=photos, data=fields).raise_for_status().headers["location"])
    with client.stream("GET", f"{place}/events") as stream:  # ends with the job
        for _ in stream.iter_lines():
            pass
    job = client.get(place).json()
    if job["state"] != "succeeded":
        return str(job["error"]["code"])
    return client.get(f"{place}/result").content, client.get(f"{place}/mask").content


def as_view(config: Config, parser: HairParser, pair: pairs.Pair, result: bytes, mask: bytes) -> tuple[View, int]:
    """The answer where Stage 0 cut the head out, and the largest difference to the upload outside the mask."""
    picture, laid = decode_upload(result, max_pixels=10**9), decode_upload(mask, max_pixels=10**9)[..., 0]
    upload = decode_upload((config.data.images / pair.target["image"]).read_bytes(), max_pixels=10**9)
    outside = int(np.abs(picture.astype(int) - upload)[laid == 0].max(initial=0))
    head = crop.resize(crop.crop_square(picture, crop.Square(*pair.target["square"])), config.data.resolution)
    return View(head, parser.hair(head)), outside


def measure(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Posts and measures the pairs, and holds them against the report."""
    prepared, each = Prepared(config.paths.processed), ThreadedMap(1)
    stored = artifacts.read_json(config.paths.report / "samples.json")["transfer"]
    rows = {row["id"]: row for row in prepared.rows(config.evaluate.split)}
    known = [(pairs.Pair(rows[s["target"]], rows[s["reference"]]), s["figures"]["ours"]) for s in stored][: options.pairs]
    encoder = load_bundle(config.paths.bundle, config.paths.weights).texture_encoder
    parser = HairParser(config.paths.weights, device=device_and_dtype(config)[0])
    instruments, reader = Instruments(config, prepared, encoder, each), SceneReader(config, prepared, each)
    served: list[figures.Record] = []
    reported: list[figures.Record] = []
    refused: Counter[str] = Counter()
    outside = 0
    with server(options, "process") as client:
        for number, (pair, theirs) in enumerate(known):
            answer = over_http(client, config, pair)
            sys.stderr.write(f"\r{number + 1} of {len(known)} pairs")
            if isinstance(answer, str):
                refused[answer] += 1
                continue
            view, beyond = as_view(config, parser, pair, *answer)
            outside = max(outside, beyond)
            scenes: list[Scene] = reader([pair])
            served.append(figures.Record(pair, instruments.transfer(scenes, {"ours": [view]})[0]))
            reported.append(figures.Record(pair, {"ours": theirs}))
    sys.stderr.write("\n")
    return {
        "pairs": len(known),
        "answered": len(served),
        "refused": dict(refused),
        "outside_max_abs_diff": outside,
        "figures": compared(served, reported, artifacts.read_json(config.paths.report / "summary.json")["evaluation"], config),
    }


def compared(served: list[figures.Record], reported: list[figures.Record], evaluation: dict[str, Any], config: Config) -> dict[str, Any]:
    """Each figure over HTTP, in the report, and their difference pair by pair."""
    found = {}
    for name in MEASURED:
        both = [(s.values["ours"][name], r.values["ours"][name], s.pair.head) for s, r in zip(served, reported, strict=True)
                if name in s.values["ours"] and name in r.values["ours"]]  # fmt: skip
        if not both or name not in evaluation:
            continue
        http = figures.mean("http", [(a, head) for a, _, head in both], config.evaluate, of=len(both))
        change = figures.mean("difference", [(a - b, head) for a, b, head in both], config.evaluate, of=len(both))
        low, high = evaluation[f"{name}_ci"]
        found[name] = {"report": evaluation[name], "report_ci": [low, high], **http, **change, "pairs": len(both),
                       "within": bool(low <= http["http"] <= high)}  # fmt: skip
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value settings")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--pairs", type=int, default=10**6, help="of the report's, from the first on")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.overrides)
    report = {"config": config.name, **measure(config, options), "surroundings": surroundings()}
    sys.stdout.write(json.dumps(report, indent=None if options.json else 2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
