"""deephair doctor: what it says of this machine is so, and each planted fault is named with what mends it."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from backend import doctor, machine, weights
from backend.config import Config, load_config
from backend.training.presets import PRESETS
from tests.conftest import World

Usage = namedtuple("Usage", "total used free")
CARD = {"version": "2.15.0", "cuda": "13.2", "card": "NVIDIA GeForce RTX 3060", "gib": 11.76, "bf16": True}


def _by_name(lines: list[doctor.Line]) -> dict[str, doctor.Line]:
    return {line.name: line for line in lines}


def _config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(overrides=[f"paths.processed={tmp_path}/processed", f"paths.weights={tmp_path}/weights", *overrides])


def test_a_whole_world_lacks_nothing_and_the_exit_code_says_so(raw_world: World) -> None:
    command = [sys.executable, "-m", "backend.cli", "doctor", "--json", *raw_world.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["ok"], done.stdout
    lines = {line["name"]: line for line in result["lines"]}
    torch = importlib.metadata.version("torch")
    assert torch in lines["torch"]["says"] and lines["card"]["says"] == "not wanted: device=cpu"
    photos = sum(path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"} for path in (raw_world.root / "photos").rglob("*"))
    assert lines["photos"]["says"].startswith(f"{photos:,} in ")
    assert all(lines[name]["state"] == "ok" for name in weights.needed(raw_world.config()))


def test_a_missing_weight_fails_with_the_command_that_brings_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "backend.cli", "doctor", f"paths.weights={tmp_path}", "--config", "configs/rtx3060.yaml"],
        capture_output=True, text=True, check=False, cwd=Path(doctor.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("missing  face_parser"))
    assert lines[at + 1].strip() == "-> deephair models download face_parser --config configs/rtx3060.yaml"


def test_a_truncated_weight_is_wrong_and_the_miniature_is_mended_by_demo_data(tmp_path: Path) -> None:
    (tmp_path / "weights/resnet50").mkdir(parents=True)
    (tmp_path / "weights/resnet50/model.safetensors").write_bytes(b"\0" * 100)
    lines = _by_name(list(doctor.weight_lines(_config(tmp_path), "", "")))
    assert lines["resnet"].state == "missing" and "wrong in" in lines["resnet"].says
    assert lines["dino"].state == "warning" and lines["dino"].mend == "deephair models download dino"
    assert lines["fid_inception"].mend.endswith("how to convert it")
    demo = _by_name(list(doctor.weight_lines(_config(tmp_path), "", "deephair demo-data")))
    assert demo["inpainting"].mend == "deephair demo-data"


def test_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 5 * 10**9, 5 * 10**9))
    assert doctor.disk_line(_config(tmp_path), photos=10).state == "ok"
    line = doctor.disk_line(_config(tmp_path), photos=451_333)
    assert line.state == "missing" and "5.0 GB free" in line.says and "paths.processed" in line.mend
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(10**12, 10**12, 0))
    assert doctor.disk_line(_config(tmp_path), photos=1).state == "missing"


def test_a_torch_that_is_too_old_or_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [line.state for line in doctor.library_lines()] == ["ok"]
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.4.1+cu121" if name == "torch" else real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    lines = _by_name(doctor.library_lines())
    assert lines["torch"].state == "missing" and lines["torch"].says == "2.4.1+cu121, >=2.11 is wanted"
    assert lines["peft"].says.startswith("not installed") and lines["peft"].mend == "make"
    assert set(lines) == {"libraries", "torch", "peft"}


def test_a_torch_that_does_not_import_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TORCH", "raise ImportError('libcudart.so.13: cannot open shared object file')")
    (line,) = doctor.torch_lines(_config(tmp_path), doctor.ask_torch())
    assert line.state == "missing" and "libcudart.so.13" in line.says


def test_a_torch_that_does_not_answer_in_time_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_TORCH", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_TORCH_SECONDS", 0.2)
    (line,) = doctor.torch_lines(_config(tmp_path), doctor.ask_torch())
    assert line.state == "warning" and "has not answered within" in line.says


@pytest.mark.parametrize(
    ("gib", "preset", "state", "mend"),
    [
        (11.76, "full-12gb", "ok", ""),
        (23.6, "full-12gb", "ok", ""),
        (79.1, "full-exact", "ok", ""),
        (23.6, "full-exact", "ok", ""),  # its weights stay in host memory
        (23.6, "full-80gb", "missing", "train.preset=full-12gb"),
        (7.8, "full-12gb", "missing", "train.preset=full-8gb"),
        (7.8, "partial", "missing", "train.preset=lora"),
        (5.8, "full-12gb", "missing", "a card with 8 GB or more"),
    ],
)
def test_the_card_s_memory_decides_the_preset(tmp_path: Path, gib: float, preset: str, state: str, mend: str) -> None:
    lines = _by_name(list(doctor.torch_lines(_config(tmp_path, f"train.preset={preset}"), {**CARD, "gib": gib})))
    assert (lines["card"].state, lines["card"].mend) == (state, mend)


def test_what_triton_builds_with_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh Ubuntu has neither, and the optimizer's kernels failed at the first backward pass."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    line = doctor.compiler_line()
    assert (
        line.state == "warning"
        and "no headers of Python" in line.says
        and "no C compiler" not in line.says
        and "gcc python3-dev" in line.mend
    )
    (tmp_path / "Python.h").touch()
    assert doctor.compiler_line().state == "ok"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "no C compiler:" in doctor.compiler_line().says and doctor.compiler_line().state == "warning"


def test_no_card_is_a_lack_only_where_one_is_demanded(tmp_path: Path) -> None:
    without: dict[str, Any] = {"version": "2.15.0", "cuda": None, "card": None, "gib": 0, "bf16": False}
    states = {
        device: _by_name(list(doctor.torch_lines(_config(tmp_path, f"device={device}"), without)))["card"].state
        for device in ("cpu", "auto", "cuda")
    }
    assert states == {"cpu": "ok", "auto": "warning", "cuda": "missing"}


def test_every_preset_of_the_configuration_is_known() -> None:
    presets = Config.model_fields["train"].annotation.model_fields["preset"].annotation.__args__  # type: ignore[union-attr]
    assert set(presets) == set(PRESETS)


def test_folders_on_a_windows_drive_are_named_under_wsl_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path, "data.images=/mnt/c/Users/me/photos", "paths.checkpoints=/mnt/data/checkpoints")
    monkeypatch.setattr(machine.platform, "release", lambda: "6.8.0-generic")
    assert list(doctor.mount_lines(config)) == []
    monkeypatch.setattr(machine.platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    (line,) = doctor.mount_lines(config)
    assert line.state == "warning" and "data.images is /mnt/c/Users/me/photos" in line.says and "set data.images" in line.mend
    (fine,) = doctor.mount_lines(_config(tmp_path))
    assert fine.state == "ok"


def test_the_shared_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(67_108_864, 0, 67_108_864))
    assert "67 MB" in doctor.shared_memory_line(_config(tmp_path)).says and doctor.shared_memory_line(_config(tmp_path)).state == "warning"
    assert doctor.shared_memory_line(_config(tmp_path, "texture.workers=0")).state == "ok"


@pytest.mark.parametrize(
    ("script", "state", "says"),
    [
        ("echo 'Noto Sans CJK KR'", "ok", "Noto Sans CJK KR has the Korean"),
        ("true", "warning", "none has Korean letters"),
        ("exec sleep 60", "warning", "has not answered"),
        (None, "ok", "no fontconfig"),
    ],
)
def test_fonts_for_the_korean_in_the_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, state: str, says: str
) -> None:
    if says == "has not answered":
        monkeypatch.setattr(doctor, "_FONT_SECONDS", 0.5)
    if script is not None:
        (tmp_path / "fc-list").write_text(f'#!/bin/sh\n[ "$1" = :lang=ko ] || exit 1\n{script}\n')
        (tmp_path / "fc-list").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    line = doctor.font_line()
    assert line.state == state and says in line.says
    assert (line.mend != "") == (state == "warning")


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.python_line().state == "ok"
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.14")
    assert doctor.python_line().state == "missing" and ">=3.11" in doctor.python_line().says


def test_no_dataset_and_no_start_checkpoint(tmp_path: Path) -> None:
    config = _config(tmp_path, f"data.images={tmp_path}/none", f"data.labels={tmp_path}/none", f"train.start={tmp_path}/gone.safetensors")
    lines = _by_name([*doctor.dataset_lines(config, (0, True), ""), *doctor.start_lines(config, "")])
    assert [lines[name].state for name in ("photos", "labels", "train.start")] == ["missing"] * 3
    assert "docs/data.md" in lines["photos"].mend


def test_counting_stops_when_its_time_is_up(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.JPG").touch()
    seconds = iter(range(0, 100, 2))
    assert doctor._count(tmp_path, {".jpg"}, clock=lambda: float(next(seconds))) == (1, False)
    assert doctor._count(tmp_path, {".jpg"}) == (5, True)


def test_torch_is_not_imported_by_the_doctor_itself() -> None:
    code = "import sys, backend.doctor\nprint(sorted(set(sys.modules) & {'torch', 'diffusers', 'transformers', 'cv2'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
