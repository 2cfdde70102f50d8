"""What Stage 2 keeps on disk: only what a run draws, found again by id, within the disk and the memory that there are."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from backend import artifacts
from backend.config import load_config
from backend.errors import UsageError
from backend.training import stage2_cache
from backend.training.prepared import Prepared, thinned
from backend.training.stage2_cache import CacheKey, PromptCache, Shards, fill, require_space, sample_bytes
from backend.training.stage2_run import Stage2Run
from tests.conftest import World

Row = dict[str, Any]


def _rows(sources: int, photos: int) -> list[Row]:
    return [
        {"id": f"s{s:04d}-{p:03d}", "source": f"s{s:04d}", "phase": "before" if p % 4 == 3 else "after"}
        for s in range(sources)
        for p in range(photos)
    ]


# ---- which photos ----


@pytest.mark.parametrize("count", [80, 200, 399])
def test_a_run_that_draws_fewer_photos_than_there_are_encodes_some_of_every_hairstyle(count: int) -> None:
    rows = _rows(20, 20)
    chosen = thinned(rows, count)
    assert [row["id"] for row in chosen] == sorted({row["id"] for row in chosen}), "in their order, none twice"
    styles = Counter((row["source"], row["phase"]) for row in chosen)
    assert len(styles) == 40 and min(styles.values()) >= 2, "every hairstyle, and each with a reference"
    assert 0.8 * count <= len(chosen) <= 1.3 * count


def test_a_short_trial_takes_pairs_of_evenly_spread_hairstyles() -> None:
    chosen = thinned(_rows(1000, 12), 100)
    styles = Counter(row["source"] for row in chosen)
    assert (
        len(chosen) == 100
        and set(styles.values()) == {2}
        and len(styles) == 50
        and int(min(styles)[1:]) < 20
        and int(max(styles)[1:]) > 980
    )


def test_nothing_is_left_out_where_all_is_drawn() -> None:
    rows = _rows(3, 5)
    assert thinned(rows, 15) is rows and thinned(rows, 10**6) is rows


def test_a_run_of_the_real_settings_takes_one_region_each_and_few_validation_photos() -> None:
    config = load_config(overrides=["train.steps=100", "train.warmup=10"])
    rows = {"train": _rows(50, 40), "val": _rows(200, 20)}
    run = SimpleNamespace(config=config, _samples_per_step=2)
    chosen = Stage2Run._rows(run, SimpleNamespace(rows=rows.__getitem__))  # type: ignore[arg-type]
    assert 200 <= len(chosen["train"]) <= 250 and len(chosen["val"]) == 2 * config.train.validation_samples
    assert Stage2Run._variants(run, chosen) == 1, "each is drawn once, or nearly"  # type: ignore[arg-type]
    assert Stage2Run._variants(run, {"train": rows["train"][:50]}) == 4  # type: ignore[arg-type]
    whole = Stage2Run._rows(run, SimpleNamespace(rows=lambda name: rows[name][:30]))  # type: ignore[arg-type]
    assert len(whole["train"]) == len(whole["val"]) == 30


# ---- shards ----


def _encode(asked: list[str]) -> Any:
    def encode(part: Sequence[Row]) -> Iterator[dict[str, torch.Tensor]]:
        for row in part:
            asked.append(row["id"])
            yield {
                "mean": torch.full((4, 2), float(int(row["id"][1:5]) * 1000 + int(row["id"][-3:]))),
                "mask": torch.ones(1, dtype=torch.uint8),
            }

    return encode


@pytest.mark.parametrize("resident", [True, False])
def test_samples_are_found_by_id_and_a_longer_run_adds_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    monkeypatch.setattr(stage2_cache, "SHARD", 7)
    monkeypatch.setattr(stage2_cache, "RESIDENT", 2**30 if resident else 0)
    rows, asked = _rows(4, 8), list[str]()
    fill(tmp_path, rows[::3], _encode(asked), "trial")
    assert asked == [row["id"] for row in rows[::3]]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    cache = fill(tmp_path, rows, _encode(asked), "whole")
    assert sorted(asked) == [row["id"] for row in rows], "each once"
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    wanted = [int(row["id"][1:5]) * 1000 + int(row["id"][-3:]) for row in rows]
    assert cache.take("mean", np.arange(len(rows)))[:, 0, 0].tolist() == wanted
    assert cache.take("mean", np.array([30, 2, 2]))[:, 3, 1].tolist() == [wanted[30], wanted[2], wanted[2]]
    again = Shards(tmp_path, [rows[5]["id"], rows[0]["id"]])
    assert again.take("mean", np.arange(2))[:, 0, 0].tolist() == [wanted[5], wanted[0]] and again.shape("mean") == [4, 2]


def test_a_killed_build_goes_on_at_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage2_cache, "SHARD", 5)
    rows, asked = _rows(2, 9), list[str]()

    def killed(part: Sequence[Row]) -> Iterator[dict[str, torch.Tensor]]:
        for number, tensors in enumerate(_encode(asked)(part)):
            if len(asked) > 12 and number == 2:
                raise KeyboardInterrupt
            yield tensors

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, rows, killed, "killed")
    done = set(asked[:10])
    asked.clear()
    fill(tmp_path, rows, _encode(asked), "again")
    assert not done & set(asked) and len(asked) == 8


def test_a_new_stage_1_leaves_the_latents_alone() -> None:
    config = load_config()
    keys = [CacheKey("data", "vae", "texts", texture) for texture in ("one", "other")]
    assert len({key.latents(config, 1) for key in keys}) == 1 and len({key.styles(config) for key in keys}) == 2
    assert len({keys[0].latents(config, variants) for variants in (1, 4)}) == 2


def test_what_a_photo_takes_is_known_beforehand(finished_world: World) -> None:
    config = finished_world.config()
    for folder in (finished_world.root / "processed/latents").glob("train_[0-9a-f]*"):
        files = list(folder.glob("shard_*"))
        header = artifacts.read_header(files[0])
        variants = Shards(folder, header["ids"]).shape("mask")[0]
        held = sum(tensor.nbytes for tensor in artifacts.load_tensors(files[0]).values())
        assert held == len(header["ids"]) * sample_bytes(config, variants, 4)


def test_a_disk_that_is_too_small_is_said_before_the_first_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 10**9))
    require_space(tmp_path / "latents", 9 * 10**9)
    with pytest.raises(UsageError, match=r"takes 11.0 GB .* has 10.0 GB left"):
        require_space(tmp_path / "latents", 11 * 10**9)


# ---- prompts ----


def test_prompts_are_read_without_keeping_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real set has more prompts than a process may map files: it failed at the 64,549th."""
    monkeypatch.setattr(stage2_cache, "PROMPTS_KEPT", 8)
    cache = PromptCache(tmp_path, CacheKey("", "", "texts", ""))
    for number in range(40):
        tensors = {"prompt_embeds": torch.full((77, 8), number / 64).bfloat16(), "pooled": torch.full((4,), 1.0 * number).bfloat16()}
        artifacts.save_tensors(cache.path(f"prompt {number}"), tensors, {})
    for number in (*range(40), *range(40)):
        text, pooled = cache.get(f"prompt {number}")
        assert text.dtype == torch.float32 and float(text[0, 0]) == number / 64 and float(pooled[0]) == number
        mapped = sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())
        assert mapped <= 2 * 8 + 2


# ---- rows ----


def test_rows_are_kept_without_what_nothing_needs(tmp_path: Path, finished_world: World) -> None:
    whole = artifacts.read_jsonl(finished_world.root / "processed/metadata.jsonl")
    kept = Prepared(finished_world.root / "processed").rows()
    assert [row["id"] for row in kept] == [row["id"] for row in whole]
    for row, slim in zip(whole, kept, strict=True):
        assert not {"hair_rings", "patches"} & set(slim) and set(slim["attributes"]) <= {"length", "bang", "sex"}
        assert all(row[name] == value for name, value in slim.items() if name != "attributes")
        assert all(row["attributes"][name] == value for name, value in slim["attributes"].items())
    alike = [row for row in kept if row["attributes"] == kept[0]["attributes"]]
    assert len(alike) > 1 and all(row["attributes"] is kept[0]["attributes"] for row in alike)
