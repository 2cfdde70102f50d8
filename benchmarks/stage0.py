"""Stage 0: how fast, how large, and how much of the hair's colour stays in the bald image?

    python benchmarks/stage0.py speed     photos per second and core, beside the literal reading of the original document and a floor
    python benchmarks/stage0.py memory    peak per worker at 4032 x 3024, and the course over 2,000 photos
    python benchmarks/stage0.py leak      colour leakage of telea, ns and two_part on 200 rendered portraits

The photos are rendered; at 4032 x 3024 they are enlarged renderings with grain. The face networks are the miniature ones. Rivals are
measured in the same run, photo by photo in turn. Times are of one thread; ``cpu`` is processor time, ``wall`` also holds the disk's and, on a
busy machine, that of others: rates and projections are of processor time.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab

from backend.config import Config, load_config
from backend.demo.khairstyle_set import _shots, _sources, face_ring, shoot
from backend.demo.miniature import build
from backend.demo.portraits import mask_rings, render, sample_hairstyle, sample_identity, sample_scene
from backend.imaging import bald, crop, masks
from backend.imaging.decode import decode_stored, encode_png, read_png
from backend.training import prepare_dataset_deephair
from backend.training.data_processing.khairstyle import index_dataset
from backend.training.data_processing.labels import Pair, read_label
from backend.training.prepare_photo import STRAY_SHARE, PhotoSettings, process, start_worker, work
from backend.training.prepare_records import files_of, photo_settings
from backend.training.training_face import DetectedFace, FaceAnalyzer, forgo_torch
from backend.training.workers import Casualty, run_in_workers

SIZES = {"1024x1024": (1024, 1024), "4032x3024": (4032, 3024)}
PHOTOS_OF_THE_SET = 451_333
FIRST_HEAD = 900_000  # identities that no shipped weight has seen
LEAK_SIDE = 256
SKIN = (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 17)  # face, ears and neck in CelebAMask-HQ's classes
HAIR = 13
BOOTSTRAP = 2000


def surroundings() -> dict[str, Any]:
    """On what the figures were taken."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "unknown")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "opencv": cv2.__version__,
            "numpy": np.__version__, "load": round(os.getloadavg()[0], 2)}  # fmt: skip


# ---- photos ----


def write_photos(root: Path, size: tuple[int, int], heads: int, views: int = 2) -> None:
    """Rendered photos of a frame size with their labels, filed as K-Hairstyle files them; the head stands in the middle."""
    side = min(size)
    for number, source in enumerate(_sources(heads, 78)):
        for shot in _shots(source, number, views, min(side, 1024), 78):
            photo, label = shoot(shot)
            frame = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)
            scale, margin = side / frame.shape[0], (size[0] - side) // 2
            if scale != 1:
                frame = cv2.resize(frame, (side, side), interpolation=cv2.INTER_CUBIC)
                frame = cv2.copyMakeBorder(frame, 0, size[1] - side, margin, size[0] - side - margin, cv2.BORDER_REPLICATE)
                grain = np.random.default_rng(number).normal(0, 4, (*frame.shape[:2], 1)).round()
                frame = np.clip(frame + grain, 0, 255).astype(np.uint8)
                photo = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
            for name in ("polygon1", "polygon2"):
                rings = json.loads(label[name])
                label[name] = json.dumps([[{"x": p["x"] * scale + margin, "y": p["y"] * scale} for p in ring] for ring in rings])
            label |= {"width": size[0], "height": size[1]}
            place = root / "images" / source.folder / f"{shot.stem}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(photo)
            words = root / "labels" / source.folder / f"{shot.stem.replace('-', '_')}.json"
            words.parent.mkdir(parents=True, exist_ok=True)
            words.write_text(json.dumps(label, ensure_ascii=False))


def build_weights(folder: Path) -> None:
    """The miniature face networks, made in a process of their own: it needs torch, whose 500 MB are not to be measured here."""
    maker = multiprocessing.get_context("spawn").Process(target=build, args=(folder,))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError(f"the miniature weights could not be made (exit code {maker.exitcode})")


def configuration(root: Path, weights: Path, **changes: object) -> Config:
    """The default configuration on photos below ``root``."""
    settings = {"data.images": root / "images", "data.labels": root / "labels", "paths.processed": root / "processed",
                "paths.weights": weights, **{key.replace("__", "."): value for key, value in changes.items()}}  # fmt: skip
    return load_config(None, [f"{key}={value}" for key, value in settings.items()])


def pairs_of(config: Config) -> list[Pair]:
    """The photos of a configuration with their labels."""
    return list(index_dataset(config.data.images, config.data.labels).pairs)


# ---- speed ----


class Remembered:
    """A face analyzer that gives what it has given before: Stage 0 without the cost of the networks, and with the same outputs."""

    def __init__(self, faces: FaceAnalyzer) -> None:
        self._faces, self._found = faces, {}
        self._embedded: dict[bytes, NDArray[np.float32]] = {}

    def detect(self, image: NDArray[np.uint8]) -> list[DetectedFace]:
        return self._once(self._found, image[::64, ::64].tobytes(), lambda: self._faces.detect(image))

    def embed(self, image: NDArray[np.uint8], landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._once(self._embedded, landmarks.tobytes(), lambda: self._faces.embed(image, landmarks))

    def _once(self, known: dict[bytes, Any], key: bytes, make: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = make()
        return known[key]


def literal(pair: Pair, target: Path) -> None:
    """The original document: whole frame decoded, Telea of radius 5 on it, whole-frame PNGs with OpenCV's default compression."""
    frame = cv2.imread(str(pair.photo), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    hair = masks.rasterize(list(read_label(pair).hair_rings), *frame.shape[:2])
    cv2.imwrite(str(target / "bald.png"), cv2.inpaint(frame, hair, 5, cv2.INPAINT_TELEA))
    cv2.imwrite(str(target / "hair.png"), np.dstack([np.where(hair[..., None] > 0, frame, 0), hair]))


def floor(pair: Pair, outputs: Sequence[NDArray[np.uint8]], target: Path) -> None:
    """What no Stage 0 can do without: the photo decoded, the same outputs encoded and written."""
    decode_stored(pair.photo.read_bytes(), max_pixels=10**8)
    for number, image in enumerate(outputs):
        (target / f"{number}.png").write_bytes(encode_png(image, compression=1))


def clocked(action: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(folder: Path, heads: int) -> Iterator[dict[str, Any]]:
    """Each photo by each rival in turn; medians over photos."""
    cv2.setNumThreads(1)
    build_weights(folder / "weights")
    faces = FaceAnalyzer(folder / "weights")
    for name, size in SIZES.items():
        root = folder / name
        write_photos(root, size, heads)
        config = configuration(root, folder / "weights")
        settings, scratch = photo_settings(config), root / "scratch"
        scratch.mkdir()
        remembered: Any = Remembered(faces)
        seconds: dict[str, list[tuple[float, float]]] = {}
        sizes, files = [], []
        for pair in pairs_of(config):
            row = process(pair, settings, remembered)
            paths = [settings.processed / file for file in files_of(row)]
            outputs = [read_png(path) for path in paths if path.suffix == ".png"]
            sizes.append(sum(path.stat().st_blocks * 512 for path in paths))
            files.append(len(paths))
            for rival, action in rivals(pair, settings, faces, remembered, outputs, scratch).items():
                seconds.setdefault(rival, []).append(clocked(action))
        wall, cpu = ({rival: statistics.median(taken[clock] for taken in times) for rival, times in seconds.items()} for clock in (0, 1))
        yield {"size": name, "photos": len(sizes), "wall_s": rounded(wall), "cpu_s": rounded(cpu),
               "photos_per_s_and_core": rounded({rival: 1 / taken for rival, taken in cpu.items()}),
               "times_faster_than_literal": {clock: of(taken, "literal", "without faces") for clock, taken in (("cpu", cpu), ("wall", wall))},
               "the_same_with_faces": {clock: of(taken, "literal", "with faces") for clock, taken in (("cpu", cpu), ("wall", wall))},
               "times_the_floor": {clock: of(taken, "without faces", "floor") for clock, taken in (("cpu", cpu), ("wall", wall))},
               "times_the_floor_with_faces": {clock: of(taken, "with faces", "floor") for clock, taken in (("cpu", cpu), ("wall", wall))},
               "mib_per_photo": round(float(np.mean(sizes)) / 2**20, 2), "files_per_photo": round(float(np.mean(files)) + 1, 1),
               "projection": projection(cpu["with faces"], float(np.mean(sizes)), float(np.mean(files)) + 1)}  # fmt: skip
        shutil.rmtree(root)


def rivals(
    pair: Pair, settings: PhotoSettings, faces: FaceAnalyzer, remembered: Any, outputs: Sequence[NDArray[np.uint8]], scratch: Path
) -> dict[str, Callable[[], object]]:
    """What is measured on one photo, by name."""
    return {
        "literal": lambda: literal(pair, scratch),
        "floor": lambda: floor(pair, outputs, scratch),
        "without faces": lambda: process(pair, settings, remembered),
        "with faces": lambda: process(pair, settings, faces),
    }


def of(seconds: dict[str, float], one: str, other: str) -> float:
    """How many times as long one rival takes as the other."""
    return round(seconds[one] / seconds[other], 2)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def projection(seconds: float, size: float, files: float) -> dict[str, float]:
    """The whole released set on machines of eight such cores, one worker a core."""
    hours = PHOTOS_OF_THE_SET * seconds / 3600
    return {"core_hours": round(hours, 1), "hours_on_8_cores": round(hours / 8, 1), "hours_on_4_machines": round(hours / 32, 1),
            "disk_tib": round(PHOTOS_OF_THE_SET * size / 2**40, 2), "million_files": round(PHOTOS_OF_THE_SET * files / 1e6, 1)}  # fmt: skip


# ---- memory ----


def memory(folder: Path, photos: int) -> Iterator[dict[str, Any]]:
    """Peak of one worker at 4032 x 3024; then a whole run over ``photos`` at 512 px, in which nothing may grow."""
    build_weights(folder / "weights")
    large = folder / "large"
    write_photos(large, SIZES["4032x3024"], 3)
    config = configuration(large, folder / "weights")
    pairs = pairs_of(config) * 4
    peaks = [
        peak
        for _, peak in run_in_workers(pairs, work_and_weigh, workers=1, start=start_worker, start_args=(photo_settings(config),))
        if not isinstance(peak, Casualty)
    ]
    yield {"size": "4032x3024", "photos": len(peaks), "worker_peak_mib": round(max(peaks)), "after_first_photo_mib": round(peaks[0])}
    shutil.rmtree(large)
    yield flatness(folder, photos)


def work_and_weigh(pair: Pair) -> float:
    """One photo in a worker; returns the worker's peak resident memory so far, MiB. getrusage's maximum would be that of the parent before
    the worker's own program began."""
    row = work(pair)
    if "reason" in row:
        raise ValueError(f"{pair.photo}: {row}")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def flatness(folder: Path, photos: int) -> dict[str, Any]:
    """Resident memory of parent and workers at every eighth of a whole run of Stage 0."""
    root = folder / "many"
    write_photos(root, (512, 512), 10, 4)
    for number, pair in enumerate(pairs_of(configuration(root, folder / "weights"))):
        for copy in range(1, -(-photos // 40)):
            stem = f"CP{200_000 + number:06d}-{copy:03d}"
            label = json.loads(pair.label.read_text()) | {"filename": f"{stem}.jpg", "source": stem[:8]}
            (pair.photo.parent / f"{stem}.jpg").write_bytes(pair.photo.read_bytes())
            (pair.label.parent / f"{stem.replace('-', '_')}.json").write_text(json.dumps(label, ensure_ascii=False))
    config = configuration(root, folder / "weights", data__resolution=512, data__limit=photos)
    seen: list[tuple[int, float, float]] = []
    stop = threading.Event()

    def watch() -> None:
        records = config.paths.processed / prepare_dataset_deephair.RECORDS
        while not stop.wait(1.0):
            workers = [resident(pid) for pid in children()]
            seen.append((sum(1 for _ in records.glob("*/*.json")), resident(os.getpid()), max(workers, default=0.0)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    counts = prepare_dataset_deephair.prepare(config)
    stop.set()
    watcher.join()
    marks = [next((row for row in seen if row[0] >= photos * eighth // 8), seen[-1]) for eighth in range(1, 9)]
    shutil.rmtree(root)
    return {"size": "512x512", **counts, "photos": [row[0] for row in marks], "parent_mib": [round(row[1]) for row in marks],
            "largest_worker_mib": [round(row[2]) for row in marks]}  # fmt: skip


def children() -> list[int]:
    """The processes that this one has started."""
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def resident(pid: int) -> float:
    """Resident memory of a process in MiB, 0 when it has gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * resource.getpagesize() / 2**20


# ---- colour leakage ----


def leak(portraits: int) -> Iterator[dict[str, Any]]:
    """For each way to fill: how far the filled area is from its surroundings and from the hair, CIEDE2000; means over portraits."""
    methods: tuple[bald.Method, ...] = ("telea", "ns", "two_part")
    figures: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for number in range(portraits):
        photo, parsing, hair, box = head_crop(number)
        other = head_crop(number, other_colour=True)
        for method in methods:
            filled = bald.remove_hair(photo, hair, box, method)
            echo = colour_echo(photo, other[0], parsing, hair & other[2], filled, bald.remove_hair(other[0], other[2], other[3], method))
            figures[method].append(leakage(photo, parsing, hair, filled) | {"echo": echo})
    names = list(figures["telea"][0])
    for method in methods:
        yield {"method": method, "portraits": portraits, **{name: interval([f[name] for f in figures[method]]) for name in names}}
    for method in ("ns", "two_part"):
        both = list(zip(figures[method], figures["telea"], strict=True))
        yield {"paired": f"{method} - telea", **{name: interval([one[name] - rival[name] for one, rival in both]) for name in names}}


def head_crop(
    number: int, *, other_colour: bool = False
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8], crop.Box | None]:
    """A rendered head as Stage 0 sees it: crop, true parsing, hair mask from polygons, face box. Every fifth is seen from behind.

    ``other_colour`` gives the same photo but for the colour of its hair.
    """
    rng = np.random.default_rng([0x1EAC, number])
    identity = sample_identity(FIRST_HEAD + number)
    yaw = 180.0 if number % 5 == 4 else float(rng.uniform(-70, 70))
    scene = replace(sample_scene(rng, camera="high" if number % 3 == 2 else "mid"))
    hairstyle = sample_hairstyle(rng, curl=number % 4, tied=False)
    if other_colour:
        hairstyle = replace(hairstyle, rgb=(28, 24, 22) if sum(hairstyle.rgb) > 200 else (190, 145, 80), tip=None, highlights=0.0)
    portrait = render(identity, hairstyle, scene, yaw, 512, number)
    rings = [np.asarray(ring, np.float64) for ring in mask_rings(portrait.parsing == HAIR, 512 / 320)]
    face = face_ring(portrait)
    box = portrait.face_box or (crop.rings_box([face.astype(np.float64)]) if face is not None else None)
    square = crop.head_square(crop.rings_box(rings), box, (512, 512))
    photo = crop.resize(crop.crop_square(portrait.image, square), 512)
    parsing = cv2.resize(crop.crop_square(portrait.parsing, square), (512, 512), interpolation=cv2.INTER_NEAREST).astype(np.uint8)
    hair = masks.grow(masks.rasterize([square.scaled(ring, 512) for ring in rings], 512, 512), STRAY_SHARE * 512)
    return photo, parsing, hair, square.scaled_box(box, 512) if box else None


def colour_echo(
    photo: NDArray[np.uint8],
    other: NDArray[np.uint8],
    parsing: NDArray[np.uint8],
    hair: NDArray[np.uint8],
    filled: NDArray[np.uint8],
    other_filled: NDArray[np.uint8],
) -> float:
    """Two photos that differ in nothing but the hair's colour: difference of their bald images over the difference of their hair.

    0: nothing of the colour gets through; 1: all of it.
    """
    hole, core = hair > 0, (hair > 0) & (parsing == HAIR)
    hairs = [rgb2lab(picture[core].mean(axis=0)[None, None] / 255.0)[0, 0] for picture in (photo, other)]
    apart = deltaE_ciede2000(rgb2lab(filled[hole][None])[0], rgb2lab(other_filled[hole][None])[0])
    return float(apart.mean() / deltaE_ciede2000(hairs[0], hairs[1]))


def leakage(photo: NDArray[np.uint8], parsing: NDArray[np.uint8], hair: NDArray[np.uint8], filled: NDArray[np.uint8]) -> dict[str, float]:
    """CIEDE2000 of the filled area to the nearest visible skin or background, whichever is closer in colour, and to the hair's mean.

    ``leaking_share``: part of the filled area that is closer to the hair's colour than to any of its surroundings.
    """
    size = (LEAK_SIDE, LEAK_SIDE)
    hole = cv2.resize(hair, size, interpolation=cv2.INTER_NEAREST) > 0
    classes = cv2.resize(parsing, size, interpolation=cv2.INTER_NEAREST)
    near_hair = (
        masks.grow(np.where(hole | (classes == HAIR), 255, 0).astype(np.uint8), 3) > 0
    )  # strays and mixed pixels are no surroundings
    original = rgb2lab(cv2.medianBlur(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), 5))
    colour = rgb2lab(cv2.resize(filled, size, interpolation=cv2.INTER_AREA))[hole]
    skin = np.isin(classes, SKIN)
    apart = [deltaE_ciede2000(colour, nearest(original, known & ~near_hair)[hole]) for known in (skin, ~skin) if (known & ~near_hair).any()]
    around = np.min(apart, axis=0)
    own = original[(classes == HAIR) & hole].mean(axis=0)
    to_hair = deltaE_ciede2000(colour, np.broadcast_to(own, colour.shape))
    return {"to_surroundings": float(around.mean()), "to_hair": float(to_hair.mean()), "leaking_share": float((to_hair < around).mean())}


def nearest(values: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """At each pixel the value of the nearest known one. values: (H, W, 3)."""
    unknown = np.where(known, 0, 255).astype(np.uint8)
    _, labels = cv2.distanceTransformWithLabels(unknown, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    table = np.zeros((labels.max() + 1, 3))
    table[labels[known]] = values[known]
    return table[labels]


def interval(values: Sequence[float]) -> list[float]:
    """Mean and 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    data = np.asarray(values)
    means = data[rng.integers(len(data), size=(BOOTSTRAP, len(data)))].mean(axis=1)
    return [round(float(v), 4) for v in (data.mean(), *np.percentile(means, [2.5, 97.5]))]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "leak"))
    parser.add_argument("--heads", type=int, default=6, help="speed: heads per size, two photos each")
    parser.add_argument("--photos", type=int, default=2000, help="memory: photos of the long run")
    parser.add_argument("--portraits", type=int, default=200, help="leak: rendered portraits, each of another head")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's folder for temporary files)")
    options = parser.parse_args()
    forgo_torch()
    print(json.dumps(surroundings()))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        runs = {
            "speed": lambda: speed(folder, options.heads),
            "memory": lambda: memory(folder, options.photos),
            "leak": lambda: leak(options.portraits),
        }
        for figures in runs[options.what]():
            print(json.dumps(figures))


if __name__ == "__main__":
    main()
