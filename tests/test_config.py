"""Configuration: typed, refused with the nearest name, resolved where its writer stands."""

from pathlib import Path

import pytest

from backend.config import REPO_ROOT, Config, known_keys, load_config
from backend.errors import UsageError

OUTSIDE_KEYS = "data.images data.labels data.resolution paths.processed paths.checkpoints paths.models paths.report train.preset gate.profile app.host app.port"


@pytest.mark.parametrize("name", ["demo", "rtx3060", "h100"])
def test_shipped_configurations_load(name: str) -> None:
    assert load_config(REPO_ROOT / "configs" / f"{name}.yaml").name == name


def test_the_default_file_says_what_the_code_says() -> None:
    """rtx3060.yaml is the default twice, in YAML and in config.py; they must not drift apart."""
    assert load_config().resolved() == Config().resolved()


def test_keys_that_outside_checks_use_exist() -> None:
    assert set(OUTSIDE_KEYS.split()) <= set(known_keys())


def test_gate_profiles_decide_as_the_design_says() -> None:
    assert load_config().gate.profile == "design"
    assert load_config(REPO_ROOT / "configs/demo.yaml").gate.profile == "evidence"


@pytest.mark.parametrize(
    ("override", "nearest"),
    [("trian.lr=1", "train.lr"), ("train.steps_=3", "train.steps"), ("gate.profil=design", "gate.profile"), ("lr=1", "train.lr")],
)
def test_unknown_keys_are_refused_with_the_nearest(override: str, nearest: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(overrides=[override])
    assert f"did you mean '{nearest}'" in str(caught.value)


def test_unknown_key_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  stepps: 3\n")
    with pytest.raises(UsageError, match=r"did you mean 'train.steps'"):
        load_config(file)


def test_the_last_override_wins_and_numbers_are_read() -> None:
    config = load_config(overrides=["train.lr=1e-6", "train.lr=3e-6", "data.split=[0.5,0.25,0.25]"])
    assert config.train.lr == pytest.approx(3e-6)
    assert config.data.split == (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.resolution=1001"],
        ["data.split=[0.5,0.2,0.2]"],
        ["data.resolution=128"],  # the texture crop of 32 latents does not fit 16
        ["train.warmup=10", "train.steps=10"],
        ["train.steps=many"],
        ["app.port=70000"],
        ["gate.profile=lenient"],
        ["train.lr"],
    ],
)
def test_invalid_values_are_refused(overrides: list[str]) -> None:
    with pytest.raises(UsageError):
        load_config(overrides=overrides)


def test_relative_paths_mean_what_their_writer_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(overrides=["paths.processed=mine"])
    assert config.paths.processed == tmp_path / "mine"
    assert config.paths.checkpoints == REPO_ROOT / "backend/training/checkpoints"


def test_digest_follows_settings_and_not_paths() -> None:
    base = load_config()
    assert base.digest("train") == load_config(overrides=["paths.models=/elsewhere", "data.workers=3"]).digest("train")
    assert base.digest("data") == load_config(overrides=["data.workers=3", "data.images=/elsewhere"]).digest("data")
    assert base.digest("train") != load_config(overrides=["train.lr=1e-6"]).digest("train")


@pytest.mark.parametrize("content", ["- a\n- b\n", "train: [", "\x00"])
def test_broken_files_are_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"broken\.yaml"):
        load_config(file)


def test_an_empty_value_is_an_empty_text() -> None:
    demo = REPO_ROOT / "configs/demo.yaml"
    assert load_config(demo, ["gate.force=why"]).gate.force == "why"
    assert load_config(demo, ["gate.force="]).gate.force == ""
