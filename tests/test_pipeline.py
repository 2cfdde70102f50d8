"""All stages on the miniature world: contracts of the outputs, reruns, resumption, the deployed bundle and the try-on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from backend import artifacts, cli
from backend.errors import InvalidArtifactError, MissingInputError, UsageError
from backend.imaging.decode import read_png
from backend.training import checkpoints, export_model, prepare_dataset_deephair, train_stage2
from backend.training.data_processing.prompts import NEUTRAL_PROMPT
from backend.training.models.bundle import load_bundle
from backend.training.prepared import Prepared
from tests.conftest import World, tree

DEEPHAIR = [sys.executable, "-m", "backend.cli"]


def _rows(world: World) -> list[dict]:
    return artifacts.read_jsonl(world.root / "processed/metadata.jsonl")


# ---- Stage 0 ----


def test_the_stored_pictures_are_parts_of_the_cropped_photo(finished_world: World) -> None:
    """where(alpha, hair_only, bald) is the head crop of the photo on disk, byte for byte, for every accepted photo."""
    from backend.imaging import crop
    from backend.imaging.decode import decode_stored

    config = finished_world.config()
    rows = _rows(finished_world)
    assert len(rows) >= 30
    for row in rows:
        sample = Prepared(config.paths.processed).sample(row)
        frame = decode_stored((config.data.images / row["image"]).read_bytes(), max_pixels=10**8)
        square = crop.Square(*row["square"])
        assert np.array_equal(sample.photo, crop.resize(crop.crop_square(frame, square), config.data.resolution)), row["id"]


def test_every_output_of_the_contract_is_there(finished_world: World) -> None:
    processed = finished_world.root / "processed"
    keys = ["id", "source", "group", "split", "image", "sha256", "size", "files", "hair_rings", "face_blur_rings", "face_box", "landmarks", "identity_valid", "yaw", "vertical", "front", "phase", "attributes", "curl", "volume", "prompt", "patches"]  # fmt: skip
    rows = _rows(finished_world)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    for row in rows:
        assert set(keys) <= set(row)
        assert read_png(processed / f"bald_images/{row['id']}.png").shape == (128, 128, 3)
        alone = read_png(processed / f"hair_only_images/{row['id']}.png")
        assert alone.shape == (128, 128, 4) and set(np.unique(alone[..., 3])) == {0, 255}
        assert read_png(processed / f"style_vectors/{row['id']}.png").shape == (224, 224, 3)
        for name in row["patches"]:
            assert read_png(processed / name).shape == (128, 128, 3)
        file = processed / f"identity_embeddings/{row['id']}.npy"
        assert file.is_file() == row["identity_valid"]
        if row["identity_valid"]:
            embedding = np.load(file, allow_pickle=False)
            assert embedding.dtype == np.float32 and embedding.shape == (512,)
            assert float(np.linalg.norm(embedding)) == pytest.approx(1.0, abs=1e-5)
    assert any(row["face_box"] is None for row in rows), "back views are kept"
    encoded = {artifacts.read_header(path)["prompt"] for path in (processed / "prompt_embeddings").glob("*.safetensors")}
    seen = {row["prompt"] for row in rows if row["split"] != "test"}  # of a short run not even all of these are drawn
    assert {"", NEUTRAL_PROMPT} < encoded <= seen | {"", NEUTRAL_PROMPT}


def test_counts_balance_and_dirt_is_named(finished_world: World) -> None:
    processed = finished_world.root / "processed"
    report = artifacts.read_json(processed / "report.json")
    quarantine = artifacts.read_jsonl(processed / "quarantine.jsonl")
    assert report["accepted"] == len(_rows(finished_world))
    assert report["quarantined"] == len(quarantine)
    assert report["accepted"] + report["quarantined"] == report["inputs"]
    reasons = {row["reason"] for row in quarantine}
    assert {"truncated", "no_hair_polygon", "duplicate_label", "orphan_label"} <= reasons
    assert "<img" in (processed / "report.html").read_text()


def test_a_head_lies_in_one_split_and_ab_sources_are_one_head(finished_world: World) -> None:
    rows = _rows(finished_world)
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["group"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert len({row["source"] for row in rows}) == len(splits) + 1  # one head is filed twice


def test_labels_come_from_the_structured_fields(finished_world: World) -> None:
    rows = _rows(finished_world)
    assert {row["curl"] for row in rows if row["phase"] == "after"} == {0, 1, 2, 3}
    assert {row["volume"] for row in rows} >= {0, 1, 2}
    assert all(row["curl"] is None for row in rows if row["phase"] == "before"), "labels describe the style after the cut"
    assert any(row["phase"] == "before" for row in rows)


def test_a_rerun_of_everything_changes_no_byte(finished_world: World) -> None:
    """In place: nothing may be written, so the other tests do not notice."""
    world = finished_world
    before = {name: tree(world.root / name) for name in ("processed", "checkpoints", "models", "report")}
    stamps = {path: path.stat().st_mtime_ns for path in world.root.rglob("*") if path.is_file() and path.name != ".lock"}
    assert cli.main(["run", *world.arguments()]) == 3  # done, with quarantined inputs
    assert {name: tree(world.root / name) for name in before} == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_stage_0_killed_and_resumed_gives_the_same_tree(raw_world: World, finished_world: World, tmp_path: Path) -> None:
    world = raw_world.copy(tmp_path / "killed")
    process = subprocess.Popen([*DEEPHAIR, "prepare", *world.arguments()], stderr=subprocess.DEVNULL, start_new_session=True)
    records = world.root / "processed" / prepare_dataset_deephair.RECORDS
    while process.poll() is None and len(list(records.rglob("*.json"))) < 8:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(records.rglob("*.json")))
    assert 8 <= done < len(_rows(finished_world))
    prepare_dataset_deephair.prepare(world.config())
    ignore = ("prompt_embeddings", "/latents/", "_result.json", "config.json")
    assert tree(world.root / "processed", ignore=ignore) == tree(finished_world.root / "processed", ignore=ignore)


# ---- Stage 2 ----


def _weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return artifacts.load_tensors(folder / f"{name}.safetensors")


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(finished_world: World, tmp_path: Path) -> None:
    """SIGKILL from outside once the first checkpoint stands, then the same command again: bit-equal weights and optimizer state.
    The presets full-12gb and lora, stopped at six points each: tests/test_resume.py."""
    undisturbed, killed = (finished_world.copy(tmp_path / name, "processed") for name in ("undisturbed", "killed"))
    for world in (undisturbed, killed):
        (world.root / "checkpoints").mkdir()
        os.link(finished_world.root / "checkpoints/texture_encoder.safetensors", world.root / "checkpoints/texture_encoder.safetensors")
    # both in processes of their own: another number of threads would add in another order
    alone = [*DEEPHAIR, "train", *undisturbed.arguments()]
    assert subprocess.run(alone, stderr=subprocess.DEVNULL, check=False).returncode == 0
    command = [*DEEPHAIR, "train", *killed.arguments()]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    first = killed.root / "checkpoints/stage2_step_3.state"
    while process.poll() is None and not first.is_dir():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first.is_dir() and not (killed.root / "checkpoints/stage2_step_6.state").is_dir()
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    for name in ("stage2_step_6", "stage2_step_6.state/optimizer", "deep_hair_v1_latest"):
        assert _equal(*(_weights(world.root / "checkpoints", name) for world in (undisturbed, killed))), name
    losses = [train_stage2.results.read(world.config(), "train")["loss_last"] for world in (undisturbed, killed)]
    assert losses[0] == losses[1]


def test_every_trained_part_moves_and_the_log_holds_every_step(finished_world: World) -> None:
    folder = finished_world.root / "checkpoints"
    first, last = (_weights(folder, f"stage2_step_{step}") for step in (3, 6))
    for part in ("unet.conv_in.weight", "injector.style_projection.0.weight", "injector.identity_projection.0.weight"):
        assert part in last
    assert not torch.equal(first["unet.conv_in.weight"], last["unet.conv_in.weight"])
    assert not torch.equal(first["injector.style_projection.0.weight"], last["injector.style_projection.0.weight"])
    rows = [json.loads(line) for line in (folder / "stage2_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert any("loss_texture" in row for row in rows)
    assert all(row["memory_gib"] > 0 for row in rows)
    assert list((folder / "previews").glob("step_*.png")) and list((folder / "tensorboard/stage2").glob("events.*"))


def test_a_checkpoint_of_other_settings_is_refused(finished_world: World, tmp_path: Path) -> None:
    world = finished_world.copy(tmp_path / "other", "processed", "checkpoints")
    with pytest.raises(UsageError, match=r"train\.lr"):
        train_stage2.train(world.config(train__lr=0.1))


def test_a_non_finite_loss_stops_before_the_step(finished_world: World, tmp_path: Path) -> None:
    from backend.errors import DeepHairError

    world = finished_world.copy(tmp_path / "nan", "processed", "checkpoints")
    folder = world.root / "checkpoints"
    for name in ("stage2_step_6", "deep_hair_v1_latest"):
        (folder / f"{name}.safetensors").unlink()
    with pytest.raises(DeepHairError, match="nothing of this step was applied"):
        _poisoned(world)
    found = checkpoints.newest(folder, "stage2")
    assert found is not None and found.position["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in found.weights.values())


def _poisoned(world: World) -> None:
    """Goes on from step 3 with a style projection that overflows."""
    from backend.training.stage2_run import Stage2Run

    config = world.config()
    run = Stage2Run(config, train_stage2.run_digest(config))
    run.resume()
    with torch.no_grad():
        run.model.injector.style_null.fill_(torch.inf)
        run.model.injector.identity_null.fill_(torch.inf)
    run.train()


def test_missing_inputs_are_named(raw_world: World, tmp_path: Path) -> None:
    empty = raw_world.copy(tmp_path / "empty")
    with pytest.raises(MissingInputError, match="no prepared data"):
        train_stage2.train(empty.config())
    with pytest.raises(MissingInputError, match=r"no photos at .*nowhere"):
        prepare_dataset_deephair.prepare(empty.config(data__images=tmp_path / "nowhere"))


# ---- Stage 3 ----

SUMMARY_KEYS = {
    "stages": {"prepare": ("seconds", "inputs", "accepted", "quarantined"), "texture": ("seconds", "curl_balanced_accuracy", "volume_balanced_accuracy"),
               "train": ("seconds", "steps", "loss_first", "loss_last"), "export": ("seconds",)},
    "evaluation": ["protocol", "samples", "samples_reconstruction", "lpips", "lpips_ci", "lpips_backbone", "masked_psnr", "masked_psnr_ci", "hair_color_delta_e", "hair_color_delta_e_ci", "outside_max_abs_diff", "baselines"],
    "gate": ["profile", "passed", "forced", "design", "evidence", "thresholds"],
}  # fmt: skip


def test_the_summary_has_every_key_of_the_contract(finished_world: World) -> None:
    summary = artifacts.read_json(finished_world.root / "report/summary.json")
    for stage, keys in SUMMARY_KEYS["stages"].items():
        assert set(keys) <= set(summary["stages"][stage])
        assert all(summary["stages"][stage][key] is not None for key in keys if "accuracy" not in key)
    assert set(SUMMARY_KEYS["evaluation"]) <= set(summary["evaluation"])
    assert {"no_op", "shuffled_reference"} <= set(summary["evaluation"]["baselines"])
    assert set(SUMMARY_KEYS["gate"]) <= set(summary["gate"])
    assert summary["evaluation"]["outside_max_abs_diff"] == 0
    assert summary["environment"]["weights"]["inpainting"].startswith("miniature")
    for profile in ("design", "evidence"):
        assert summary["gate"][profile]["passed"] == (not summary["gate"][profile]["reasons"])
    page = (finished_world.root / "report/index.html").read_text()
    assert page.count("<img") > 10 and "http://" not in page and "https://" not in page and "<script" not in page


def test_the_deployed_bundle_is_whole_and_says_what_it_is(finished_world: World) -> None:
    summary = artifacts.read_json(finished_world.root / "report/summary.json")
    path = finished_world.root / "models/deep_hair_v1.safetensors"
    bundle = load_bundle(path)
    assert bundle.sha256 == summary["deployed"]["sha256"]
    assert bundle.header["gate"]["forced"] is True and bundle.header["gate"]["force_reason"]
    assert bundle.header["step"] == 6 and bundle.header["miniature"] is True
    assert {"base", "config_digest", "data_digest", "metrics", "git_commit", "licences", "format"} <= set(bundle.header)
    assert cli.main(["verify", str(path)]) == 0


def _breakages() -> dict[str, object]:
    def nan(tensors: dict, header: dict) -> None:
        tensors["unet.conv_in.weight"][0, 0, 0, 0] = torch.nan

    def missing_injector(tensors: dict, header: dict) -> None:
        for name in [name for name in tensors if name.startswith("injector.")]:
            del tensors[name]

    def extra(tensors: dict, header: dict) -> None:
        tensors["unet.surprise"] = torch.zeros(1)

    def four_channels(tensors: dict, header: dict) -> None:
        header["unet_config"]["in_channels"] = 4

    def wrong_shape(tensors: dict, header: dict) -> None:
        tensors["unet.conv_in.weight"] = tensors["unet.conv_in.weight"][:, :4].contiguous()

    def swapped(tensors: dict, header: dict) -> None:
        a, b = "injector.style_projection.1.weight", "injector.style_projection.1.bias"
        tensors[a], tensors[b] = tensors[b].clone(), tensors[a].clone()

    def other_format(tensors: dict, header: dict) -> None:
        header["format"] = "deephair-bundle-99"

    def no_metrics(tensors: dict, header: dict) -> None:
        del header["metrics"]

    return {"not finite": nan, "missing": missing_injector, "do not belong": extra, "4 input channels": four_channels, "has shape": wrong_shape,
            "do not match the hash": swapped, "99": other_format, "lacks metrics": no_metrics}  # fmt: skip


@pytest.mark.parametrize("message", list(_breakages()))
def test_broken_bundles_are_refused_each_with_its_reason(finished_world: World, tmp_path: Path, message: str) -> None:
    path = finished_world.root / "models/deep_hair_v1.safetensors"
    tensors, header = artifacts.load_tensors(path), artifacts.read_header(path)
    _breakages()[message](tensors, header)  # type: ignore[operator]
    broken = tmp_path / "broken.safetensors"
    artifacts.save_tensors(broken, tensors, header)
    with pytest.raises(InvalidArtifactError, match=message):
        load_bundle(broken)


def test_files_that_are_no_bundle_are_refused_each_with_its_reason(finished_world: World, tmp_path: Path) -> None:
    whole = (finished_world.root / "models/deep_hair_v1.safetensors").read_bytes()
    path = tmp_path / "no_bundle.safetensors"
    torch.save({"unet.conv_in.weight": torch.zeros(2)}, path)
    pickled = path.read_bytes()
    reasons = {pickled: "is a pickle", b"": "not a whole", whole[:-5]: "not a whole", whole[: len(whole) // 2]: "not a whole"}
    for content, reason in reasons.items():
        path.write_bytes(content)
        with pytest.raises(InvalidArtifactError, match=reason):
            load_bundle(path)
        assert cli.main(["verify", str(path)]) == 1


@pytest.mark.long
def test_a_closed_gate_deploys_nothing_and_keeps_what_was_there(finished_world: World, tmp_path: Path) -> None:
    world = finished_world.copy(tmp_path / "closed", "processed", "checkpoints", "models")
    old = (world.root / "models/deep_hair_v1.safetensors").read_bytes()
    done = subprocess.run(
        [*DEEPHAIR, "export", *world.arguments(gate__force="", gate__profile="design")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "refused" in done.stderr and "masked PSNR" in done.stderr
    assert (world.root / "models/deep_hair_v1.safetensors").read_bytes() == old
    summary = artifacts.read_json(world.root / "report/summary.json")
    assert summary["deployed"] is None and not summary["gate"]["passed"] and not summary["gate"]["forced"]
    forced = subprocess.run(
        [*DEEPHAIR, "export", "--force", "a test", *world.arguments(gate__force="")], capture_output=True, text=True, check=False
    )
    assert forced.returncode == 0, forced.stderr
    assert load_bundle(world.root / "models/deep_hair_v1.safetensors").header["gate"]["force_reason"] == "a test"
    assert (world.root / "models/deep_hair_v1.previous.safetensors").read_bytes() == old


def test_documented_scripts_are_the_verbs(finished_world: World, tmp_path: Path) -> None:
    """Each script of the original document runs as a file, from another folder, on finished work."""
    from backend.config import REPO_ROOT

    world = finished_world.copy(tmp_path / "scripts", "processed", "checkpoints", "models", "report")
    scripts = ("prepare_dataset_deephair.py", "models/texture_encoder.py", "train_stage2.py", "export_model.py")
    for script in scripts:
        command = [sys.executable, str(REPO_ROOT / "backend/training" / script), *world.arguments()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})
        assert done.returncode == (3 if script.startswith("prepare") else 0), done.stderr


@pytest.mark.parametrize("script", ["prepare_dataset_deephair.py", "models/texture_encoder.py", "train_stage2.py", "export_model.py"])
def test_without_the_dataset_the_scripts_say_what_is_missing(script: str, tmp_path: Path) -> None:
    from backend.config import REPO_ROOT

    paths = [f"paths.{name}={tmp_path / name}" for name in ("processed", "checkpoints", "models", "report", "weights")]
    data = [f"data.images={tmp_path / 'images'}", f"data.labels={tmp_path / 'labels'}"]
    done = subprocess.run(
        [sys.executable, str(REPO_ROOT / "backend/training" / script), *paths, *data], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr and "->" in done.stderr


def test_a_checkpoint_is_not_measured_on_a_set_that_it_was_not_trained_on(finished_world: World, tmp_path: Path) -> None:
    """With another split, heads that it has learnt could stand among those that are to be new to it."""
    world = finished_world.copy(tmp_path / "world", "processed", "checkpoints")
    metadata = world.root / "processed" / "metadata.jsonl"
    rows = artifacts.read_jsonl(metadata)
    first = next(row["group"] for row in rows if row["split"] == "train")
    artifacts.write_jsonl(metadata, [{**row, "split": "test"} if row["group"] == first else row for row in rows])
    with pytest.raises(InvalidArtifactError, match="trained on another prepared set"):
        export_model.export(world.config())
    assert not world.config().paths.bundle.exists() and not (world.root / "report" / "summary.json").exists()
