"""The pretrained parts: fetched from a stand-in hub, resumed, refused, verified; nothing connects unasked."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils._http
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from backend import artifacts, console, lpips_heads, models_command, weights, weights_check, weights_fetch
from backend.config import Config, load_config
from backend.errors import DeepHairError, InvalidArtifactError, UsageError
from backend.training.models.perceptual import load_perceptual
from tests.hub_standin import COMMIT, Hub, serving

MINIATURE = Path(weights.__file__).parent / "demo" / "weights"
UNET = "unet/diffusion_pytorch_model.safetensors"


def _serve(hub: Hub, part: weights.Part) -> None:
    """Puts the miniature files of a part on the hub under the names that they have there."""
    assert part.hub is not None
    for name in (*part.files, *part.extras):
        if name != part.lpips_heads:
            hub.files[part.hub.repository, part.hub.names.get(name, name)] = (MINIATURE / part.folder / name).read_bytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that serves the miniature of every needed part; the published digests, which are of the real files, are left out."""
    parts = tuple(
        dataclasses.replace(part, hub=dataclasses.replace(part.hub, sha256={})) if part.hub is not None else part for part in weights.PARTS
    )
    monkeypatch.setattr(weights, "PARTS", parts)
    monkeypatch.setattr(weights, "_BY_NAME", {part.name: part for part in parts})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving() as served:
        for name in weights.needed(load_config()):
            _serve(served, weights.part(name))
        yield served


def _config(folder: Path, *overrides: str) -> Config:
    return load_config(overrides=[f"paths.weights={folder}", *overrides])


def _fetch(folder: Path, hub: Hub, *names: str) -> None:
    weights_fetch.fetch(folder, weights_fetch.ask(folder, weights_fetch.to_fetch(folder, names, rehash=True), endpoint=hub.endpoint))


def test_download_brings_all_that_a_run_needs_and_a_second_one_asks_for_nothing(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path)
    assert models_command.download(config, [], dry_run=False, as_json=True, endpoint=hub.endpoint) == console.DONE
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == sum(map(len, hub.files.values()))
    for name in weights.needed(config):
        part = weights.part(name)
        assert weights_check.look(tmp_path, part).state == "found"
        for file in part.files:
            if file != part.lpips_heads:
                assert (tmp_path / part.folder / file).read_bytes() == (MINIATURE / part.folder / file).read_bytes()
    entry = weights_check.read_record(tmp_path)[f"stable-diffusion/sd_xl_inpainting/{UNET}"]
    assert entry["commit"] == COMMIT and entry["checked_against"] == "sha256 stated by the hub"
    assert not list(tmp_path.rglob("*.part"))
    hub.requests.clear()
    assert models_command.download(config, [], dry_run=False, as_json=True, endpoint=hub.endpoint) == console.DONE
    assert hub.requests == []
    assert models_command.verify(config, [], as_json=True) == console.DONE


def test_a_dry_run_names_files_and_sizes_and_fetches_nothing(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models_command.download(_config(tmp_path), ["face_parser"], dry_run=True, as_json=False, endpoint=hub.endpoint) == console.DONE
    said = capsys.readouterr().out
    assert "model.safetensors" in said and "3 files" in said and "would be fetched" in said
    assert {method for method, _, _ in hub.requests} == {"HEAD"} and not list(tmp_path.iterdir())


def test_a_cut_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what came of an unfinished chunk is asked for again
    hub.cut[UNET] = 1_000_000
    _fetch(tmp_path, hub, "inpainting")
    assert hub.gets(UNET) == ["", f"bytes={15 * (1 << 16)}-"]
    path = tmp_path / "stable-diffusion/sd_xl_inpainting" / UNET
    assert path.read_bytes() == hub.files["diffusers/stable-diffusion-xl-1.0-inpainting-0.1", UNET]


def test_a_killed_download_goes_on_in_the_next_run_and_never_joins_two_versions(hub: Hub, tmp_path: Path) -> None:
    files = weights_fetch.to_fetch(tmp_path, ["inpainting"], rehash=False)
    wanted = next(file for file in weights_fetch.ask(tmp_path, files, endpoint=hub.endpoint) if file.name == UNET)
    wanted.path.parent.mkdir(parents=True)
    content = hub.files["diffusers/stable-diffusion-xl-1.0-inpainting-0.1", UNET]
    wanted.partial.write_bytes(content[:70_000])
    of_another_version = wanted.path.with_name(f".{wanted.path.name}.{'f' * 12}.part")
    of_another_version.write_bytes(b"older")
    weights_fetch.fetch(tmp_path, [wanted])
    assert hub.gets(UNET) == ["bytes=70000-"]
    assert wanted.path.read_bytes() == content and not of_another_version.exists()


# a large file is held against its sha256, a small one against git's blob id
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_changed_bytes_are_refused_and_leave_nothing_behind(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.garbled.add(f"/{name}")
    with pytest.raises(InvalidArtifactError, match="removed") as caught:
        _fetch(tmp_path, hub, "face_parser")
    assert caught.value.code == "wrong_checksum"
    left = {path.name for path in (tmp_path / "face-parsing").iterdir()}
    assert left == {"config.json", "model.safetensors", "preprocessor_config.json"} - {name}  # the others are kept
    hub.garbled.clear()
    hub.requests.clear()
    _fetch(tmp_path, hub, "face_parser")
    assert {path for _, path, _ in hub.requests if path.endswith(f"/{name}")}
    assert all(path.endswith(f"/{name}") for _, path, _ in hub.requests)


def test_a_partial_file_with_wrong_bytes_is_found_by_the_digest(hub: Hub, tmp_path: Path) -> None:
    files = weights_fetch.to_fetch(tmp_path, ["face_parser"], rehash=False)
    wanted = weights_fetch.ask(tmp_path, files, endpoint=hub.endpoint)
    file = next(file for file in wanted if file.name == "model.safetensors")
    file.path.parent.mkdir(parents=True)
    file.partial.write_bytes(bytes(50_000))
    with pytest.raises(InvalidArtifactError, match="sha256"):
        weights_fetch.fetch(tmp_path, wanted)
    assert not file.partial.exists() and not file.path.exists()


def test_a_file_other_than_the_published_one_is_refused_before_a_byte_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving() as served:
        _serve(served, weights.part("adaface"))
        with pytest.raises(InvalidArtifactError, match="another file than the published one"):
            _fetch(tmp_path, served, "adaface")
        assert {method for method, _, _ in served.requests} == {"HEAD"} and not list(tmp_path.iterdir())


def test_a_repository_without_the_file_and_a_hub_that_is_down_are_told_apart(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del hub.files["jonathandinu/face-parsing", "model.safetensors"]
    with pytest.raises(DeepHairError, match="is not there") as caught:
        _fetch(tmp_path, hub, "face_parser")
    assert caught.value.code == "not_found"
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)  # the waiting between its five attempts
    with pytest.raises(DeepHairError, match="goes on where it was") as caught:
        weights_fetch.ask(tmp_path, weights_fetch.to_fetch(tmp_path, ["face_parser"], rehash=False), endpoint="http://127.0.0.1:9")
    assert caught.value.code == "not_reachable"


def test_too_little_disk_is_said_before_anything_is_fetched(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = weights_fetch.ask(tmp_path, weights_fetch.to_fetch(tmp_path, ["face_parser"], rehash=False), endpoint=hub.endpoint)
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(weights_fetch.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DeepHairError, match="are needed") as caught:
        weights_fetch.fetch(tmp_path, wanted)
    assert caught.value.code == "disk_full" and not hub.gets("model.safetensors")


def test_what_is_made_by_hand_says_how(tmp_path: Path) -> None:
    with pytest.raises(DeepHairError, match=r"docs/evaluation\.md"):
        weights_fetch.to_fetch(tmp_path, ["fid_inception"], rehash=False)
    with pytest.raises(UsageError, match="no pretrained part 'unet'"):
        weights_fetch.to_fetch(tmp_path, ["unet"], rehash=False)


def test_needed_follows_the_configuration() -> None:
    assert "adaface" in weights.needed(load_config()) and "insightface" not in weights.needed(load_config())
    other = weights.needed(load_config(overrides=["identity_model=insightface", "sample.controlnet_scale=0.5"]))
    assert "adaface" not in other and {"insightface", "controlnet"} <= set(other)


# ---- list and verify ----


def test_list_and_verify_tell_missing_from_wrong(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path)
    _fetch(tmp_path, hub, "face_parser", "adaface", "resnet")
    flipped = tmp_path / "face-parsing/model.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    cut = tmp_path / "resnet50/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    states = {row["name"]: row["state"] for row in weights_check.rows(tmp_path, weights.needed(config))}
    assert states["resnet"] == "wrong" and states["inpainting"] == "missing" and states["adaface"] == "found"
    assert states["face_parser"] == "found"  # its form is whole: one bit shows in its digest alone
    assert models_command.verify(config, ["adaface"], as_json=False) == console.DONE
    assert models_command.verify(config, [], as_json=True) == console.FAILED
    said = {row["name"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["parts"]}
    assert said["face_parser"]["state"] == "wrong" and "sha256" in said["face_parser"]["detail"]
    assert said["resnet"]["state"] == "wrong" and said["adaface"]["state"] == "found" and said["inpainting"]["state"] == "missing"
    # what verify tells to do mends both
    models_command.download(config, ["face_parser", "resnet"], dry_run=False, as_json=True, endpoint=hub.endpoint)
    assert models_command.verify(config, ["face_parser", "resnet"], as_json=True) == console.DONE


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("model.safetensors", b"", "empty"),
        ("model.safetensors", b"\x80\x02}q\x00." * 20, "not a whole safetensors"),  # a pickle under another name
        ("model.safetensors", b"\xff" * 64, "not a whole safetensors"),
        ("model.safetensors", (64).to_bytes(8, "little") + b"[" * 64, "not a whole safetensors"),
        ("config.json", b"<html>504</html>", "not JSON"),
    ],
)
def test_files_of_another_form_are_wrong_at_a_look(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    (tmp_path / "face-parsing").mkdir()
    (tmp_path / "face-parsing" / name).write_bytes(content)
    seen = weights_check.look(tmp_path, weights.part("face_parser"))
    assert seen.state == "wrong" and fault in seen.faults[name]


def test_a_file_put_there_by_hand_is_held_against_the_published_digest(tmp_path: Path) -> None:
    (tmp_path / "face").mkdir()
    (tmp_path / "face/adaface_ir_18.onnx").write_bytes(b"something else")
    assert "expected 6b6a3577" in weights_check.look(tmp_path, weights.part("adaface"), each=lambda: None).faults["adaface_ir_18.onnx"]
    # the miniature has a card that says what it is
    assert weights_check.look(MINIATURE, weights.part("adaface"), each=lambda: None).state == "found"


# ---- the command line: what may connect ----


def _cli(hub: Hub, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    command = [sys.executable, "-m", "backend.cli", "models", *words, f"paths.weights={folder}"]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**clean, "HF_ENDPOINT": hub.endpoint, "NO_PROXY": "*", **environment}
    )


def test_only_download_connects_to_the_mirror_and_offline_is_obeyed(tmp_path: Path) -> None:
    with serving() as served:
        _serve(served, weights.part("face_parser"))
        for words in (["list"], ["verify", "face_parser"]):
            _cli(served, tmp_path, *words)
        refused = _cli(served, tmp_path, "download", "face_parser", HF_HUB_OFFLINE="1")
        assert refused.returncode == 1 and "HF_HUB_OFFLINE" in refused.stderr and "Traceback" not in refused.stderr
        planned = _cli(served, tmp_path, "download", "face_parser", "--dry-run", TRANSFORMERS_OFFLINE="1")
        assert planned.returncode == 0 and "face-parsing/model.safetensors" in planned.stdout and "about 0.3 GB" in planned.stdout
        assert served.requests == [] and not list(tmp_path.iterdir())
        done = _cli(served, tmp_path, "download", "face_parser")
        assert done.returncode == 0, done.stderr
        assert "MB/s" in done.stderr or "took" in done.stderr  # progress as plain lines
    assert weights_check.look(tmp_path, weights.part("face_parser"), each=lambda: None).hashed == weights.part("face_parser").files


# ---- what is said of the world outside agrees with the libraries that are installed ----


def test_the_face_networks_are_uniface_s_own_with_its_digests() -> None:
    from uniface import constants
    from uniface.model_store import _mirror_url

    for name, kind in (
        ("face_detector", constants.YOLOv8FaceWeights.YOLOV8N),
        ("adaface", constants.AdaFaceWeights.IR_18),
        ("insightface", constants.ArcFaceWeights.RESNET),
    ):
        part, info = weights.part(name), constants.MODEL_REGISTRY[kind]
        assert part.hub is not None
        (file,) = part.files
        assert part.hub.sha256[file] == info.sha256 and info.url.endswith(file)
        mirrored = _mirror_url(kind, info.url)
        assert mirrored.startswith(f"https://huggingface.co/{part.hub.repository}/resolve/")
        assert mirrored.endswith(f"/{part.hub.names.get(file, file)}")


def test_the_lpips_heads_are_read_without_unpickling_and_equal_what_torch_reads(tmp_path: Path) -> None:
    path = lpips_heads.packaged_file()
    heads = lpips_heads.read_heads(path)
    reference = torch.load(path, map_location="cpu", weights_only=True)
    assert list(reference) == sorted(heads)
    assert all(np.array_equal(heads[name], reference[name].numpy()) for name in reference)
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "new.pth")
    with pytest.raises(InvalidArtifactError, match="sha256"):
        lpips_heads.read_heads(tmp_path / "new.pth")


def test_the_written_heads_load_beside_torchvision_s_vgg16(tmp_path: Path) -> None:
    """VGG16 in timm's published layout (torchvision's names) with drawn values, the heads as 'models download' writes them."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    convolutions = {f"features.{name}": tensor for name, tensor in vgg16().features.state_dict().items()}
    artifacts.save_tensors(tmp_path / "vgg16/model.safetensors", convolutions, {})
    assert weights_fetch.write_lpips_heads(tmp_path, ["perceptual"]) and not weights_fetch.write_lpips_heads(tmp_path, ["perceptual"])
    network, name = load_perceptual(tmp_path)
    assert name == "vgg16"
    for head, values in zip(network.heads, load_file(tmp_path / "vgg16/lpips_heads.safetensors").values(), strict=True):
        assert torch.equal(head, values)
