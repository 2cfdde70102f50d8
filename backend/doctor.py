"""``deephair doctor``: what this machine lacks for ``deephair run`` with a configuration, and the command that mends it.

torch is asked in a process of its own, packages by their metadata: nothing heavy is imported here, and nothing connects.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from backend import console, weights, weights_check
from backend.config import REPO_ROOT, Config
from backend.machine import in_wsl
from backend.training.presets import PRESETS

State = Literal["ok", "warning", "missing"]

_REPORTED = 0.95  # of its nominal size is the least that a card reports of its memory: 11.76 GiB of 12 (training_memory.md, section 1.2)
_TORCH_SECONDS = 120.0  # importing torch takes a few; a machine that is busy may take longer, which is no fault of torch
_FONT_SECONDS = 20.0  # a machine's first call builds the font cache
_COUNT_SECONDS = 3.0  # after which counting files stops and says "at least"
_TORCH = """
import json, torch
card = torch.cuda.is_available()
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "card": torch.cuda.get_device_name() if card else None,
                  "gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if card else 0,
                  "bf16": card and torch.cuda.is_bf16_supported()}))
"""


@dataclass(frozen=True)
class Line:
    """One thing looked at. ``mend`` is the command, or the step, that mends a warning or a lack; empty where all is well."""

    name: str
    state: State
    says: str
    mend: str = ""


def verb(arguments: console.StageArguments) -> int:
    """Prints every line; exit code 0 when nothing is missing for ``deephair run`` with this configuration, else 1."""
    lines = examine(arguments.config, arguments.rest.config)
    missing = [line for line in lines if line.state == "missing"]
    if arguments.json:
        console.print_result({"ok": not missing, "config": arguments.config.name, "lines": [asdict(line) for line in lines]})
    else:
        for line in lines:
            sys.stdout.write(f"{line.state:8} {line.name:18} {line.says}\n")
            if line.mend and line.state != "ok":
                sys.stdout.write(f"{'':27} -> {line.mend}\n")
        sys.stdout.write(f"{len(missing)} of {len(lines)} things are missing\n" if missing else "nothing is missing for 'deephair run'\n")
    return console.FAILED if missing else console.DONE


def examine(config: Config, config_file: str | None = None) -> list[Line]:
    """All lines for this machine and configuration, in the order in which a newcomer would mend them."""
    option = f" --config {config_file}" if config_file else ""
    miniature = f"deephair demo-data{option}" if config.name in ("demo", "miniature") else ""
    torch = ask_torch()
    photos = _count(config.data.images, {".jpg", ".jpeg", ".png", ".webp"})
    return [
        python_line(),
        *library_lines(),
        *torch_lines(config, torch),
        disk_line(config, min(photos[0], config.data.limit or photos[0])),
        *mount_lines(config),
        shared_memory_line(config),
        font_line(),
        *weight_lines(config, option, miniature),
        *start_lines(config, miniature),
        *dataset_lines(config, photos, miniature),
    ]


def python_line() -> Line:
    """The interpreter against ``requires-python``."""
    wanted = SpecifierSet(_project()["requires-python"])
    version = platform.python_version()
    if version in wanted:
        return Line("python", "ok", f"{version} ({wanted} is wanted)")
    return Line("python", "missing", f"{version}, {wanted} is wanted", "make clean && make PYTHON=python3.11")


def library_lines() -> list[Line]:
    """Installed versions against pyproject's bounds: one line when all fit, one for each that does not."""
    lines, fit = [], 0
    for requirement in map(Requirement, _project()["dependencies"]):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line(requirement.name, "missing", f"not installed, {requirement.specifier} is wanted", "make"))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fit += 1
        else:
            lines.append(Line(requirement.name, "missing", f"{version}, {requirement.specifier} is wanted", "make clean && make"))
    return [Line("libraries", "ok", f"{fit} packages within the bounds of pyproject.toml"), *lines] if fit else lines


def ask_torch() -> dict[str, Any]:
    """What torch says of itself and the card, from a process of its own.

    ``{"error": ...}`` where it cannot be imported, ``{"silent": seconds}`` where it has not answered in that time.
    """
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, check=False, timeout=_TORCH_SECONDS)
        return (
            dict(json.loads(done.stdout)) if done.returncode == 0 else {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        )
    except subprocess.TimeoutExpired:
        return {"silent": _TORCH_SECONDS}
    except ValueError as error:
        return {"error": str(error)}


def torch_lines(config: Config, torch: dict[str, Any]) -> Iterator[Line]:
    """torch works, CUDA works, and the card's memory allows ``train.preset``."""
    if "error" in torch:
        yield Line("torch", "missing", f"cannot be imported: {torch['error']}", "make clean && make")
        return
    if "silent" in torch:
        says = f"has not answered within {torch['silent']:.0f} s; nothing is known of it and of the card"
        yield Line("torch", "warning", says, "the machine is busy or its disk slow: call doctor again when it is not")
        return
    yield Line("torch", "ok", f"{torch['version']}, built for {'CUDA ' + torch['cuda'] if torch['cuda'] else 'the CPU only'}")
    if config.device == "cpu":
        yield Line("card", "ok", "not wanted: device=cpu")
    elif not torch["card"]:
        driver = shutil.which("nvidia-smi") is not None
        mend = (
            "make clean && make, with the CUDA build of torch"
            if driver and not torch["cuda"]
            else "update the NVIDIA driver (nvidia-smi shows it), then start the machine anew"
            if driver
            else "install the NVIDIA driver (under WSL: in Windows), or set device=cpu for the miniature"
        )
        says = "no card that torch can use" + (
            "; training SDXL on the CPU is not practical" if config.device == "auto" else ", device=cuda wants one"
        )
        yield Line("card", "missing" if config.device == "cuda" else "warning", says, mend)
    else:
        yield _card_line(config.train.preset, torch)
        yield compiler_line()


def _card_line(preset: str, torch: dict[str, Any]) -> Line:
    least = {name: _REPORTED * chosen.card_gib for name, chosen in sorted(PRESETS.items(), key=lambda item: item[1].card_gib)}
    allowed = [name for name, gib in least.items() if torch["gib"] >= gib]
    says = f"{torch['card']}, {torch['gib']:.1f} GiB: allows {', '.join(allowed) or 'no preset'}"
    if preset not in allowed:
        says += f"; train.preset={preset} wants {least[preset]:.1f} GiB"
        smaller = PRESETS[preset].smaller
        while smaller is not None and smaller not in allowed:
            smaller = PRESETS[smaller].smaller
        return Line("card", "missing", says, f"train.preset={smaller}" if smaller else "a card with 8 GB or more")
    if not torch["bf16"]:
        return Line("card", "warning", f"{says}; no bfloat16", "expect slow training: a card of the RTX 30 series or newer has it")
    return Line("card", "ok", says)


def compiler_line() -> Line:
    """What Triton builds its part of the driver with: a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    lacking = [name for name, there in (("C compiler", compiler), ("headers of Python", headers.is_file())) if not there]
    if lacking:
        says = f"no {' and no '.join(lacking)}: Triton cannot build the optimizer's kernels, without which training is slower"
        return Line("compiler", "warning", says, "sudo apt install gcc python3-dev")
    return Line("compiler", "ok", f"{compiler}, with Python's headers")


def disk_line(config: Config, photos: int) -> Line:
    """Free disk where Stage 0 writes, against what it estimates for the photos still to do; it refuses to start where that is too little."""
    from backend.training.prepare_dataset_deephair import RESERVE, bytes_per_photo

    place = next(parent for parent in (config.paths.processed, *config.paths.processed.parents) if parent.exists())
    if not os.access(place, os.W_OK):
        return Line("disk", "missing", f"{place} is not writable", f"chmod u+w {place}, or point paths.processed elsewhere")
    free = shutil.disk_usage(place).free
    to_do = max(photos - _count(config.paths.processed / "bald_images", {".png"})[0], 0)
    wanted = to_do * bytes_per_photo(config) + RESERVE
    says = f"{free / 1e9:.1f} GB free at {config.paths.processed}, about {wanted / 1e9:.1f} GB wanted for {to_do:,} photos to do"
    if free < wanted:
        return Line("disk", "missing", says, "make room, point paths.processed at another disk, or take fewer photos with data.limit")
    return Line("disk", "ok", says)


def mount_lines(config: Config) -> Iterator[Line]:
    """Under WSL, folders on a Windows drive: every file operation goes through a network protocol there."""
    if not in_wsl():
        return
    folders = {"data.images": config.data.images, "data.labels": config.data.labels}
    folders |= {f"paths.{name}": getattr(config.paths, name) for name in ("processed", "checkpoints", "weights")}
    slow = {key: path for key, path in folders.items() if re.match(r"/mnt/[a-z](/|$)", str(path))}
    for key, path in slow.items():
        yield Line(
            "windows drive",
            "warning",
            f"{key} is {path}: many times slower than WSL's own disk",
            f"move it below {Path.home()} and set {key}",
        )
    if not slow:
        yield Line("windows drive", "ok", "WSL, and no folder on a Windows drive")


def shared_memory_line(config: Config) -> Line:
    """The shared memory through which data workers hand over their batches; containers have 64 MB of it by default."""
    path = Path("/dev/shm")  # noqa: S108 - it is looked at, nothing is written
    if not path.is_dir():
        return Line("shared memory", "warning", f"no {path}", "texture.workers=0")
    size = shutil.disk_usage(path).total
    if size < 1 << 30 and config.texture.workers:
        return Line("shared memory", "warning", f"{path} has {size / 1e6:.0f} MB", "docker run --shm-size 2g, or texture.workers=0")
    return Line("shared memory", "ok", f"{path} has {size / 1e9:.1f} GB")


def font_line() -> Line:
    """Whether a browser on this machine can show the Korean of the labels in the reports; DeepHair itself draws no text."""
    lister = shutil.which("fc-list")
    if lister is None:
        return Line("fonts", "ok", "no fontconfig, so no browser here: open the reports on another machine")
    try:
        found = subprocess.run(
            [lister, ":lang=ko", "family"], capture_output=True, text=True, check=False, timeout=_FONT_SECONDS
        ).stdout.strip()
    except subprocess.TimeoutExpired:
        return Line("fonts", "warning", f"fc-list has not answered within {_FONT_SECONDS:.0f} s", "fc-cache -f")
    if found:
        return Line("fonts", "ok", f"{found.splitlines()[0]} has the Korean letters of the reports")
    says = "none has Korean letters: a browser on this machine shows boxes for them in the reports"
    return Line("fonts", "warning", says, "sudo apt install fonts-noto-cjk")


def weight_lines(config: Config, option: str, miniature: str) -> Iterator[Line]:
    """Each needed part found, missing or wrong, by a look at its form; and the optional networks that the evaluation would use."""
    folder = config.paths.weights
    record = weights_check.read_record(folder)
    for name in (*weights.needed(config), *config.evaluate.networks):
        part = weights.part(name)
        seen = weights_check.look(folder, part, record)
        mend = miniature or (f"deephair models download {name}{option}" if part.hub is not None else part.by_hand)
        if seen.state == "found":
            yield Line(f"{name}", "ok", f"found in {folder / part.folder}")
        elif seen.state == "missing" and name in config.evaluate.networks:
            yield Line(f"{name}", "warning", f"not there; the evaluation leaves its figures out ({part.source})", mend)
        else:
            yield Line(f"{name}", "missing", f"{seen.state} in {folder / part.folder}: {seen.detail}", mend)


def start_lines(config: Config, miniature: str) -> Iterator[Line]:
    """The checkpoint that Stage 2 goes on from, where the configuration names one."""
    if config.train.start is not None:
        there = config.train.start.is_file()
        says = f"{config.train.start}" + ("" if there else " is not there")
        yield Line(
            "train.start", "ok" if there else "missing", says, "" if there else miniature or "train.start=  (empty: from the base model)"
        )


def dataset_lines(config: Config, photos: tuple[int, bool], miniature: str) -> Iterator[Line]:
    """Photos and labels counted by name, none of them read."""
    mend = miniature or "docs/data.md says how K-Hairstyle is obtained and laid out; 'make demo' runs without it"
    labels = _count(config.data.labels, {".json"})
    for name, path, (count, whole) in (("photos", config.data.images, photos), ("labels", config.data.labels, labels)):
        text = f"{'' if whole else 'at least '}{count:,} in {path}"
        yield Line(name, "ok" if count else "missing", text if count else f"none in {path}", "" if count else mend)


def _count(folder: Path, suffixes: set[str], clock: Callable[[], float] = time.monotonic) -> tuple[int, bool]:
    """Files below ``folder`` with one of these suffixes, and whether all were counted before the time was up."""
    count, end = 0, clock() + _COUNT_SECONDS
    for _, _, names in os.walk(folder):
        count += sum(os.path.splitext(name)[1].lower() in suffixes for name in names)  # noqa: PTH122 - half a million names
        if clock() > end:
            return count, False
    return count, True


def _project() -> dict[str, Any]:
    """pyproject's project table; an installed package without its checkout has the same in its metadata."""
    file = REPO_ROOT / "pyproject.toml"
    if file.is_file():
        return dict(tomllib.loads(file.read_text(encoding="utf-8"))["project"])
    metadata = importlib.metadata.metadata("deephair")
    wanted = [text for text in importlib.metadata.requires("deephair") or [] if "extra ==" not in text]
    return {"requires-python": metadata["Requires-Python"], "dependencies": wanted}
