"""Stage 2 on a graphics card at SDXL's full size: memory and speed of our preset beside the trainers that people use today.

    python benchmarks/stage2_gpu.py --out runs/stage2_gpu.json           about 8 minutes on an H100; random weights, nothing is downloaded
    python benchmarks/stage2_gpu.py --size miniature --out /tmp/x.json   the same code at toy size, on a CPU

Arms (one process each, so that peaks are clean): ours = preset full-12gb from cached latents at batch 1, 2 and 4, with the VAE in the
loop, with the eager optimizer, and as configs/rtx3060.yaml has it under a hard cap of 11 GiB with a checkpoint and a picture; reference =
a loop as in diffusers' SDXL examples; adafactor-hooks = transformers' Adafactor inside the backward pass with stochastic rounding;
preset-NAME = each other preset, beside its plan (full-exact with its weights in host memory). Side arms take fewer steps (BRIEF). All run
with expandable segments. The JSON is rewritten after each arm; an arm that does not fit the time is left out and named.
"""

from __future__ import annotations

if __name__ == "__main__":  # run as a file: the checkout must be importable
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

NAMES = (
    "kernel-check", "ours", "reference-vae", "ours-vae", "ours-capped", "adafactor-hooks", "ours-b2", "ours-b4", "reference-cached",
    "ours-compiled", "ours-vae-compiled", "ours-eager", "ours-profile",
    "preset-full-8gb", "preset-lora", "preset-partial", "preset-full-80gb", "preset-full-exact",
)  # fmt: skip
BRIEF = {  # of arms whose names begin so: warm-up and timed steps at most
    "preset-": (3, 10), "preset-full-exact": (1, 2), "ours-b": (5, 25), "adafactor": (3, 10), "ours-eager": (3, 15)
}  # fmt: skip
LIBRARIES = ("torch", "diffusers", "transformers", "safetensors", "triton", "bitsandbytes", "accelerate")
CHECKPOINT_GIB = 9  # free disk that the capped arm needs


def missing(size: str, arms: list[str]) -> list[str]:
    """What this machine lacks for those arms."""
    lacks = [
        f"python package {name}" for name in ("torch", "diffusers", "transformers", "safetensors") if not importlib.util.find_spec(name)
    ]
    if size == "miniature" or lacks:
        return lacks
    import torch

    if not torch.cuda.is_available():
        lacks.append("a CUDA card (without one: --size miniature)")
    if not importlib.util.find_spec("triton"):
        lacks.append("python package triton (the optimizer's kernels)")
    if any(arm.startswith("reference") for arm in arms) and not importlib.util.find_spec("bitsandbytes"):
        lacks.append("python package bitsandbytes (the reference's optimizer; or leave its arms out with --arms)")
    if "ours-capped" in arms and shutil.disk_usage(tempfile.gettempdir()).free < CHECKPOINT_GIB * 2**30:
        lacks.append(f"{CHECKPOINT_GIB} GiB of free disk in {tempfile.gettempdir()} for a checkpoint")
    return lacks


class CardMemory:
    """The card's used memory as nvidia-smi sees it, watched while a process runs."""

    def __init__(self) -> None:
        self._tool = shutil.which("nvidia-smi")
        self.before = self._used()
        self.peak = self.before

    def _used(self) -> int | None:
        if self._tool is None:
            return None
        command = [self._tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        first = answer.stdout.split("\n", maxsplit=1)[0].strip()
        return int(first) if answer.returncode == 0 and first.isdigit() else None

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Returns when the process has ended."""
        due = time.monotonic()
        while process.poll() is None:
            if time.monotonic() >= due:  # seldom: each query holds the driver for a moment, and reserved memory does not shrink
                self.peak = max(self.peak or 0, self._used() or 0)
                due = time.monotonic() + 2.0
            time.sleep(0.1)

    def gib(self) -> float | None:
        """What the process added at its peak; with the CUDA context."""
        return None if self.peak is None or self.before is None else round((self.peak - self.before) / 1024, 3)


def steps_of(name: str, options: argparse.Namespace) -> tuple[int, int]:
    """Warm-up and timed steps of an arm: as asked, fewer for a side arm."""
    brief = [BRIEF[start] for start in BRIEF if name.startswith(start)]
    warmup, steps = brief[-1] if brief else (options.warmup, options.steps)
    return min(warmup, options.warmup), min(steps, options.steps)


def run_arm(name: str, options: argparse.Namespace, arithmetic: str, allocator: str, limit: float) -> dict[str, Any]:
    """Runs one arm in a process of its own and returns what it reports, or how it failed."""
    warmup, steps = steps_of(name, options)
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [
            sys.executable, __file__, "--arm", name, "--out", str(answer), "--size", options.size, "--warmup", str(warmup),
            "--steps", str(steps), "--seconds", str(options.seconds), "--cap", str(options.cap), "--arithmetic", arithmetic,
        ]  # fmt: skip
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **({"PYTORCH_ALLOC_CONF": allocator} if allocator else {})}
        began, card = time.monotonic(), CardMemory()
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
            stopper = threading.Timer(limit, process.kill)
            stopper.start()
            card.watch(process)
            stopper.cancel()
        result: dict[str, Any] = json.loads(answer.read_text()) if answer.is_file() else {}
        if process.returncode and "failed" not in result:
            tail = log.read_text(errors="replace").splitlines()[-12:]
            result["failed"] = f"exit code {process.returncode}: " + "\n".join(tail)
    return {**result, "nvidia_smi_gib": card.gib(), "seconds": round(time.monotonic() - began, 1)}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One arm in this process."""
    import torch

    from benchmarks.stage2_arms import ARMS, quiet_failure
    from benchmarks.stage2_meter import Setting
    from benchmarks.stage2_parts import SIZES

    device = torch.device("cuda" if torch.cuda.is_available() and options.size == "full" else "cpu")
    setting = Setting(SIZES[options.size], device, options.warmup, options.steps, options.seconds, options.cap, options.arithmetic)
    with quiet_failure() as result:
        result.update(ARMS[name](setting))
    return result


def surroundings() -> dict[str, Any]:
    """On what the figures were taken."""
    import torch

    versions = {name: importlib.metadata.version(name) for name in LIBRARIES if importlib.util.find_spec(name)}
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"card": card, "python": platform.python_version(), "cpu_count": os.cpu_count(), **versions}


def ratios(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours beside the others: peak memory (smaller is better) and samples per second (larger is better)."""
    pairs = {
        "cached / reference with VAE": ("ours", "reference-vae"), "VAE in the loop, both": ("ours-vae", "reference-vae"),
        "cached, both": ("ours", "reference-cached"), "cached / Adafactor hooks": ("ours", "adafactor-hooks"),
        "batch 2 / reference with VAE": ("ours-b2", "reference-vae"), "kernels / eager optimizer": ("ours", "ours-eager"),
    }  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for label, (one, other) in pairs.items():
        a, b = arms.get(one, {}), arms.get(other, {})
        keys = ("peak_allocated_gib", "peak_reserved_gib", "nvidia_smi_gib", "samples_per_s")
        found[label] = {key: round(a[key] / b[key], 3) for key in keys if a.get(key) and b.get(key)}
    return {label: values for label, values in found.items() if values}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    heads = ("arm", "batch", "steps", "ms/step", "samples/s", "allocated", "reserved", "nvidia-smi", "plan")
    keys = ("batch", "timed_steps", "median_ms", "samples_per_s", "peak_allocated_gib", "peak_reserved_gib", "nvidia_smi_gib")
    lines = [("{:18}" + "{:>11}" * 8).format(*heads)]
    for name, arm in report["arms"].items():
        if "failed" in arm:
            lines.append(f"{name:18} FAILED {arm['failed']}")
        elif name == "ours-profile":
            lines.append(f"{name:18} {arm['device_ms_per_step']} ms on the device per step; its parts are in the JSON")
        elif name == "kernel-check":
            lines.append(f"{name:18} {'agrees' if arm.get('agrees') else arm.get('skipped', 'DOES NOT AGREE')}")
        else:
            planned = (arm.get("plan") or {}).get("allocated_gib", "")
            lines.append(
                f"{name:18}" + "".join(f"{arm.get(key) if arm.get(key) is not None else '':>11}" for key in keys) + f"{planned:>11}"
            )
            lines += [f"  {part:16} {json.dumps(arm[part])}" for part in ("save", "sample") if part in arm]
    lines += [f"not run: {', '.join(report['not_run'])}"] if report["not_run"] else []
    return "\n".join([*lines, *(f"{label:32} {values}" for label, values in report["ratios"].items())])


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """All arms in turn. Kernels that fail their check are not used: then the eager optimizer runs, and the report says so."""
    end = time.monotonic() + options.budget
    report: dict[str, Any] = {
        "size": options.size, "device": surroundings(), "allocator": "expandable_segments:True", "arithmetic": "auto",
        "arms": {}, "ratios": {}, "not_run": [],
    }  # fmt: skip
    for name in options.arms:
        left = end - time.monotonic()
        if left < options.seconds:
            report["not_run"].append(name)
            continue
        result = run_arm(name, options, report["arithmetic"], report["allocator"], left)
        if name == "kernel-check" and "failed" in result:  # perhaps not the kernels but the allocator: it is not offered everywhere
            report["allocator"], first = "", result["failed"]
            result = {**run_arm(name, options, report["arithmetic"], "", left), "failed_with_expandable_segments": first}
        if name == "kernel-check" and not result.get("agrees", "skipped" in result):
            report["arithmetic"] = "eager"
        report["arms"][name] = result
        report["ratios"] = ratios(report["arms"])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        brief = {key: value for key, value in result.items() if key not in ("plan", "rows")}
        print(f"{name}: {json.dumps(brief)}", flush=True)
    return report


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "miniature"), default="full")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=36, help="the most that an arm's steps may take, warm-up and all")
    parser.add_argument("--budget", type=float, default=500, help="the most that all arms may take, in seconds")
    parser.add_argument("--cap", type=float, default=11.0, help="GiB of the capped arm")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(NAMES))
    parser.add_argument("--out", type=Path, default=Path("runs/stage2_gpu.json"))
    parser.add_argument("--arm", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--arithmetic", choices=("auto", "triton", "eager"), default="auto", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        result = measure(options.arm, options)
        options.out.write_text(json.dumps(result))
        return 1 if "failed" in result else 0
    if unknown := sorted(set(options.arms) - set(NAMES)):
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if lacks := missing(options.size, options.arms):
        print("this machine lacks:\n  " + "\n  ".join(lacks), file=sys.stderr)
        return 2
    report = run_all(options)
    print(table(report))
    return 1 if any("failed" in arm for arm in report["arms"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
