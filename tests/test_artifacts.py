"""Files are whole or not there, also when the writer dies (fifty kills during saves: tests/test_resume.py)."""

import errno
import os
from pathlib import Path

import pytest
import torch

from backend import artifacts
from backend.errors import DeepHairError, InvalidArtifactError
from backend.training import checkpoints


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    artifacts.write_text(path, "old")
    with pytest.raises(RuntimeError), artifacts.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_headers_round_trip_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = artifacts.save_tensors(path, {"x": torch.arange(4.0)}, {"step": 7, "note": "plain", "nested": {"a": [1, 2]}})
    assert artifacts.sha256_file(path) == digest
    assert artifacts.read_header(path) == {"step": 7, "note": "plain", "nested": {"a": [1, 2]}}
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:-1], whole + b"x", b"\x80\x04K\x01.", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(InvalidArtifactError, match=r"a\.safetensors"):
            artifacts.read_header(path)
        with pytest.raises(InvalidArtifactError):
            artifacts.load_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_the_name_is_told_from_damage(tmp_path: Path, zipped: bool) -> None:
    """What torch.save writes, whole and cut, says that it is a pickle; a cut safetensors file whose length looks like one does not."""
    path = tmp_path / "a.safetensors"
    torch.save({"x": torch.arange(4.0)}, path, _use_new_zipfile_serialization=zipped)
    for content in (path.read_bytes(), path.read_bytes()[:50]):
        path.write_bytes(content)
        for read in (artifacts.read_header, artifacts.load_tensors):
            with pytest.raises(InvalidArtifactError, match="is a pickle"):
                read(path)
    path.write_bytes((640).to_bytes(8, "little") + b"{")  # 640 is 80 02 in bytes, as a pickle of protocol 2 begins
    with pytest.raises(InvalidArtifactError, match="is not a whole safetensors file"):
        artifacts.read_header(path)


def test_a_second_run_on_a_folder_is_refused(tmp_path: Path) -> None:
    with artifacts.folder_lock(tmp_path), pytest.raises(DeepHairError, match="another run"), artifacts.folder_lock(tmp_path):
        pass
    with artifacts.folder_lock(tmp_path):
        pass


def _save(folder: Path, step: int, value: float) -> Path:
    return checkpoints.save(
        folder,
        f"run_step_{step}",
        weights={"w": torch.full((8,), value)},
        optimizer={"w|m": torch.full((8,), -value)},
        position={"step": step},
        header={"step": step},
    )


def test_checkpoints_load_prune_and_fall_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 10):
        _save(tmp_path, step, float(step))
    assert [step for step, _ in checkpoints.steps(tmp_path, "run")] == [10, 2, 1]
    checkpoints.prune(tmp_path, "run", 2)
    assert [step for step, _ in checkpoints.steps(tmp_path, "run")] == [10, 2]
    newest = tmp_path / "run_step_10.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
    found = checkpoints.newest(tmp_path, "run")
    assert found is not None
    assert found.position["step"] == 2
    assert torch.equal(found.weights["w"], torch.full((8,), 2.0))
    assert "DAMAGED CHECKPOINT run_step_10" in caplog.text


def test_weights_without_state_are_no_checkpoint(tmp_path: Path) -> None:
    """A kill between the two writes leaves weights alone: they must not be resumed from."""
    artifacts.save_tensors(tmp_path / "run_step_5.safetensors", {"w": torch.zeros(2)}, {})
    assert checkpoints.newest(tmp_path, "run") is None


def _without_links(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "a file system without"])
def test_a_linked_checkpoint_follows_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", _without_links)
    for step in (1, 2):
        checkpoints.link(_save(tmp_path, step, float(step)), "latest")
    checkpoints.prune(tmp_path, "run", 1)
    assert checkpoints.load(tmp_path / "latest.safetensors").position["step"] == 2
    newest = (tmp_path / "run_step_2.safetensors").stat().st_ino
    assert ((tmp_path / "latest.safetensors").stat().st_ino == newest) is links
    assert not list(tmp_path.glob(f".*{artifacts.TMP_SUFFIX}"))


def test_a_second_name_is_a_copy_only_where_there_are_no_links_and_never_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.bin"
    source.write_bytes(bytes(1000))
    with pytest.raises(FileExistsError):
        artifacts.second_name(source, source)
    monkeypatch.setattr(os, "link", _without_links)
    artifacts.second_name(source, tmp_path / "copy.bin")
    assert (tmp_path / "copy.bin").read_bytes() == source.read_bytes()

    def full(_: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        artifacts.second_name(source, tmp_path / "half.bin")
    assert not (tmp_path / "half.bin").exists()


def test_nothing_in_the_project_unpickles() -> None:
    """No torch.load, pickle, or numpy pickles anywhere in the package."""
    root = Path(artifacts.__file__).parent
    forbidden = ("torch.load(", "import pickle", "pickle.load", "allow_pickle=True", "joblib", "marshal.load")
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], path
