"""Serving: what the service adds to the pipeline, how quick it answers while it paints, and the pipeline against plain diffusers.

    python benchmarks/serve.py                    all of it with the demo's bundle (make demo)
    python benchmarks/serve.py paths --compile    only the pipeline, also compiled
    python benchmarks/serve.py paths --size sdxl --steps 30 --config configs/rtx3060.yaml --compile     random networks of SDXL's size, on a card
    python benchmarks/serve.py --config configs/rtx3060.yaml --steps 30 --json

``overhead``: from the first byte of the upload to the last of the picture over HTTP, against the bare pipeline: the same bytes decoded,
tried on and encoded in this process, in turn with the jobs and at the niceness of the server's model.
``health``: /healthz while jobs run, as a multiple of an idle server's, with the model in the HTTP process and in one of its own; the two
are measured in turn. ``paths``: one head crop by diffusers' StableDiffusionXLInpaintPipeline with the same UNet, VAE, text encoders, steps
and guidance, and by ours, in turn: nothing remembered, prompt remembered, prompt and reference remembered, in few steps (LCM's sampler
without guidance; a fused LoRA costs nothing, so the path is timed whether there is one or not), with offload (on a card), compiled.
``references``: whole try-ons of one photo with a reference that is new each time and with one that is remembered. Times of a busy machine are
compared only within a run.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import http.client
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from backend.config import Config, load_config
from backend.imaging.decode import encode_png

SIDE = 1024  # px of the uploads
PROBE_S = 0.02  # between two looks at /healthz


def portrait(seed: int) -> np.ndarray:
    """A rendered person, (SIDE, SIDE, 3) uint8."""
    import cv2

    from backend.demo.portraits import render, sample_hairstyle, sample_identity, sample_scene

    rng = np.random.default_rng(seed)
    shown = render(sample_identity(seed), sample_hairstyle(rng), sample_scene(rng, camera="mid"), 8.0, 512, seed).image
    return cv2.resize(shown, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


# ---- the service ----


def serve(config: Config, place: str) -> int:
    """The server of one arm; ``place`` of the model: "thread" of the HTTP process or "process" of its own."""
    from backend.app.api import create_app
    from backend.app.engine import LocalEngine, load_tryon
    from backend.app.engine_process import ProcessEngine
    from backend.app.server import run_app

    load = ProcessEngine.start if place == "process" else (lambda config: LocalEngine(load_tryon(config)))
    return run_app(config, create_app(config, load))


@contextlib.contextmanager
def server(options: argparse.Namespace, place: str) -> Iterator[httpx.Client]:
    """A ready server in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*options.overrides, f"paths.jobs={folder}/jobs", "app.port=0", "app.queue_size=200"]
        command = [sys.executable, __file__, "server", place, "--config", options.config, *settings]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            address = next(word for word in process.stdout.readline().split() if word.startswith("http"))
            with httpx.Client(base_url=address, timeout=120) as client:
                while not is_ready(client):
                    if process.poll() is not None:
                        raise SystemExit(f"the server ended with code {process.returncode}")
                    time.sleep(0.1)
                yield client
        finally:
            process.terminate()
            process.wait()


def is_ready(client: httpx.Client) -> bool:
    """Whether a job would run; a connection that a starved server dropped as idle says no."""
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def post(client: httpx.Client, options: argparse.Namespace, photos: tuple[bytes, bytes], seed: int) -> str:
    """A job's address."""
    files = {"target": photos[0], "reference": photos[1]}
    answer = client.post("/api/v1/jobs", files=files, data={"seed": str(seed), "steps": str(options.steps)})
    return str(answer.raise_for_status().headers["location"])


def overhead(client: httpx.Client, options: argparse.Namespace, photos: tuple[bytes, bytes]) -> dict[str, Any]:
    """Jobs one after the other, each followed by the same without a server; the first of both is not counted."""
    from backend.app.engine_process import NICENESS
    from backend.imaging.decode import decode_upload
    from backend.tryon.pipeline import TryOn, TryOnRequest

    tryon, most = TryOn.load(load_config(options.config, options.overrides)), 10**9
    os.nice(NICENESS)

    def without_server(seed: int) -> float:
        start = time.perf_counter()
        target, reference = (decode_upload(photo, max_pixels=most) for photo in photos)
        encode_png(tryon.run(TryOnRequest(target, reference, seed=seed, steps=options.steps)).image)
        return time.perf_counter() - start

    bare, whole, inside = [], [], []
    for seed in range(options.jobs + 1):
        start = time.perf_counter()
        place = post(client, options, photos, seed)
        with client.stream("GET", f"{place}/events") as stream:  # ends with the job, without polling
            for _ in stream.iter_lines():
                pass
        client.get(f"{place}/result").raise_for_status()
        seconds = time.perf_counter() - start
        job = client.get(place).json()
        alone = without_server(seed)
        if seed:
            whole.append(seconds)
            bare.append(alone)
            inside.append(job["result"]["info"]["seconds"])
    added = [job - alone for job, alone in zip(whole, bare, strict=True)]
    return {
        "jobs": len(whole),
        "steps": options.steps,
        "seconds_of_a_job": round(statistics.median(whole), 3),
        "seconds_of_the_bare_pipeline": round(statistics.median(bare), 3),
        "seconds_of_the_try_on_in_it": round(statistics.median(inside), 3),
        "added_seconds": round(statistics.median(added), 3),
        "added_share": round(statistics.median(added) / statistics.median(whole), 4),
    }


def answer_times(client: httpx.Client, seconds: float) -> list[float]:
    """How long /healthz takes, in seconds, again and again, each time over a new connection."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        with contextlib.closing(http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=60)) as connection:
            connection.request("GET", "/healthz")
            connection.getresponse().read()
        times.append(time.perf_counter() - start)
        time.sleep(PROBE_S)
    return times


def health(client: httpx.Client, options: argparse.Namespace, photos: tuple[bytes, bytes]) -> dict[str, Any]:
    """Idle, then with jobs that follow each other."""
    idle = answer_times(client, options.seconds)
    stop = threading.Event()

    def keep_busy() -> None:
        seed = 0
        while not stop.is_set():
            if client.get("/metrics").text.find("deephair_jobs_waiting 0") >= 0:
                post(client, options, photos, seed)
                seed += 1
            stop.wait(0.2)

    busy_maker = threading.Thread(target=keep_busy)
    busy_maker.start()
    time.sleep(1.0)
    busy = answer_times(client, options.seconds)
    stop.set()
    busy_maker.join()
    figures = {}
    for name, quantile in (("p50", 0.5), ("p99", 0.99)):
        figures |= {
            f"{name}_idle_ms": round(1e3 * float(np.quantile(idle, quantile)), 2),
            f"{name}_busy_ms": round(1e3 * float(np.quantile(busy, quantile)), 2),
            f"{name}_ratio": round(float(np.quantile(busy, quantile) / np.quantile(idle, quantile)), 2),
        }
    return {"answers": len(busy), **figures}


def surroundings() -> dict[str, Any]:
    """What the figures hold for."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "fastapi", "uvicorn")}
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    return {"device": card or platform.processor() or platform.machine(), "cores": cores, "threads": threads, **versions}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="overhead, health, paths, references (all without one); then key=value settings")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--few", type=int, default=4, help="steps of the few-step path; what they cost, not what they look like")
    parser.add_argument("--jobs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each look at /healthz")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--size", choices=("bundle", "sdxl"), default="bundle", help="paths: the deployed bundle, or random networks of SDXL's size"
    )
    parser.add_argument(
        "--arms", type=lambda text: text.split(","), default=[""], help="paths: beside diffusers, those whose names contain one of these"
    )
    parser.add_argument("--compile", action="store_true", help="also compiled; minutes of compiling")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args()
    options.overrides = [word for word in options.what if "=" in word]
    what = [word for word in options.what if "=" not in word]
    config = load_config(options.config, options.overrides)
    if what[:1] == ["server"]:
        return serve(config, what[1])
    wanted = what or ["overhead", "health", "paths", "references"]
    report: dict[str, Any] = {"config": config.name, "steps": options.steps}
    photos = (encode_png(portrait(7)), encode_png(portrait(11))) if {"health", "overhead"} & set(wanted) else ()
    if "health" in wanted:
        report["health"] = {}
        for place in ("thread", "process"):
            with server(options, place) as client:
                report["health"][place] = health(client, options, photos)
    if "overhead" in wanted:
        with server(options, "process") as client:
            report["overhead"] = overhead(client, options, photos)
    if {"paths", "references"} & set(wanted):
        from benchmarks import serve_paths

        if "paths" in wanted:
            report["paths"] = serve_paths.paths(config, options)
        if "references" in wanted:
            report["references"] = serve_paths.references(config, options, portrait(7), portrait(11))
    report["surroundings"] = surroundings()
    sys.stdout.write(json.dumps(report, indent=None if options.json else 2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
