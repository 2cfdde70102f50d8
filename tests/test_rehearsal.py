"""The way of a user with a card and the internet, from an archive of photos and an empty ``backend/models`` to a deployed model, rehearsed: the hub is
a stand-in on loopback, its repositories have the published layouts (tests/published.py), and ``configs/rtx3060.yaml`` is what runs."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest

from backend import artifacts, cli, console, models_command, weights
from backend.config import REPO_ROOT, load_config
from backend.training.data_processing import normalize_khairstyle
from backend.training.models.bundle import load_bundle
from tests import published
from tests.conftest import World
from tests.hub_standin import serving
from tests.test_normalize import put

# the device, sizes and steps; every choice of method is the preset's own
SMALLER = {
    "device": "cpu", "data.resolution": 128, "data.workers": 1, "data.patches_per_photo": 4, "data.split": "[0.5,0.2,0.3]",
    "texture.image_size": 64, "texture.batch_size": 4, "texture.steps": 2, "texture.warmup": 1, "texture.save_every": 2, "texture.workers": 0,
    "train.steps": 2, "train.warmup": 1, "train.texture_every": 2, "train.texture_max_timestep": 1000, "train.texture_crop": 8,
    "train.mask_variants": 1, "train.save_every": 2, "train.validate_every": 2, "train.validation_samples": 2, "train.preview_every": 0,
    "evaluate.samples": 2, "evaluate.samples_reconstruction": 2, "evaluate.steps": 2, "evaluate.bootstrap": 100, "evaluate.pictures": 1,
}  # fmt: skip
NOT_FETCHED = "unet/diffusion_pytorch_model.fp16.safetensors"  # the repository has it beside the one that is used


def _archives(world: World, folder: Path) -> list[str]:
    """The rendered photos and labels as the zips of the dataset are: one each, names in UTF-8 without saying so."""
    made = []
    for kind, source in (("images", world.root / "photos"), ("labels", world.root / "labels")):
        path = folder / f"{kind}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(path for path in source.rglob("*") if path.is_file()):
                put(archive, f"mqset/{kind}/{file.relative_to(source).as_posix()}", file.read_bytes())
        assert not any(re.search("[가-힣]", name) for name in zipfile.ZipFile(path).namelist())  # as every zip tool reads them
        made.append(str(path))
    return made


def _published(folder: Path) -> dict[tuple[str, str], bytes]:
    """What the hub has: (repository, path) -> bytes of every needed part in its published layout, small."""
    published.write_inpainting(folder)
    published.write_resnet(folder)
    published.write_vgg(folder)
    miniature = Path(weights.__file__).parent / "demo" / "weights"
    for name in ("face/yolov8n-face.onnx", "face/adaface_ir_18.onnx", "face-parsing/config.json", "face-parsing/model.safetensors"):
        artifacts.write_bytes(folder / name, (miniature / name).read_bytes())
    artifacts.write_json(
        folder / "face-parsing/preprocessor_config.json", {**published.PARSER_PREPROCESSING, "size": {"height": 192, "width": 192}}
    )
    files = {}
    for part in map(weights.part, weights.needed(load_config())):
        assert part.hub is not None
        for name in (*part.files, *part.extras):
            if name != part.lpips_heads:
                files[part.hub.repository, part.hub.names.get(name, name)] = (folder / part.folder / name).read_bytes()
    files[weights.part("inpainting").source, NOT_FETCHED] = b"half"
    return files


@pytest.mark.long  # the whole way in one, and the only test that runs all stages on ResNet50, VGG16 and SDXL's own layout
def test_from_archives_and_an_empty_folder_to_a_deployed_model(
    raw_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def deephair(*words: str) -> tuple[int, str, str]:
        """A command in this process, which has torch and diffusers loaded: exit code, stdout, stderr."""
        capsys.readouterr()
        return (cli.main(words), *capsys.readouterr())

    dataset = tmp_path / "khairstyle"
    sorted_in = normalize_khairstyle.main([*_archives(raw_world, tmp_path), "--out", str(dataset)])
    assert sorted_in in (console.DONE, console.REJECTED_ITEMS)

    places = {"data.images": dataset / "training/images", "data.labels": dataset / "training/labels"}
    places |= {f"paths.{name}": tmp_path / name for name in ("processed", "checkpoints", "models", "report", "weights", "jobs")}
    overrides = [f"{key}={value}" for key, value in {**SMALLER, **places}.items()]
    config = load_config(overrides=overrides)

    code, said, _ = deephair("doctor", *overrides, "--json")
    lacks = {line["name"] for line in json.loads(said)["lines"] if line["state"] == "missing"}
    assert code == console.FAILED and lacks == set(weights.needed(config)), said

    with monkeypatch.context() as patch, serving() as hub:
        # the published digests are of the real files; what the stand-in states is checked instead
        parts = tuple(
            dataclasses.replace(part, hub=dataclasses.replace(part.hub, sha256={})) if part.hub is not None else part
            for part in weights.PARTS
        )
        patch.setattr(weights, "PARTS", parts)
        patch.setattr(weights, "_BY_NAME", {part.name: part for part in parts})
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        hub.files |= _published(tmp_path / "published")
        assert models_command.download(config, [], dry_run=False, as_json=True, endpoint=hub.endpoint) == console.DONE
        assert not hub.gets(NOT_FETCHED) and len(hub.requests) > 20
    code, said, _ = deephair("models", "verify", *overrides)
    assert code == console.DONE, said
    code, said, _ = deephair("doctor", *overrides, "--json")
    assert code == console.DONE, said

    # in a process of its own, which has nothing but what now lies on disk
    command = [sys.executable, "-m", "backend.cli", "run", *overrides]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO_ROOT)
    assert refused.returncode == console.FAILED and "refused" in refused.stderr, refused.stderr
    summary = artifacts.read_json(tmp_path / "report/summary.json")
    assert summary["gate"]["profile"] == "design" and summary["deployed"] is None and summary["stages"]["train"]["steps"] == 2
    assert summary["evaluation"]["lpips_backbone"] == "vgg16" and summary["evaluation"]["outside_max_abs_diff"] == 0
    assert not summary["environment"]["weights"]["inpainting"].startswith("miniature")

    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*.safetensors")}
    code, _, log = deephair("run", "--force", "a rehearsal on random weights", *overrides)
    assert code in (console.DONE, console.REJECTED_ITEMS), log
    assert {path: path.stat().st_mtime_ns for path in trained} == trained, "finished stages are skipped"
    bundle = load_bundle(tmp_path / "models/deep_hair_v1.safetensors")
    assert bundle.header["base"]["name"] == weights.part("inpainting").source and bundle.texture_encoder.layers == (3, 4, 6, 3)
    assert published.unet_names() == {name.removeprefix("unet.") for name in bundle.model.state_dict() if name.startswith("unet.")}
    code, said, _ = deephair("verify", str(tmp_path / "models/deep_hair_v1.safetensors"))
    assert code == console.DONE and "a whole bundle" in said
