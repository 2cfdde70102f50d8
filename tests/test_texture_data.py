"""Stage 1 data: tables, windows, sampling, views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backend import artifacts
from backend.errors import InvalidArtifactError, MissingInputError
from backend.training.models.supcon import UNKNOWN
from backend.training.texture_data import (
    WINDOWS,
    BalancedSampler,
    PatchImages,
    PatchTable,
    augment,
    draw_views,
    feed,
    fit_patch,
    hair_windows,
    read_patch_tables,
    to_unit,
)
from tests.texture_set import draw_patch, one_thread, world  # noqa: F401 (fixtures)


def test_tables_hold_what_stage_0_wrote(world: Path) -> None:
    tables = read_patch_tables(world / "processed")
    assert [len(tables[split]) for split in ("train", "val", "test")] == [36 * 6, 12 * 6, 12 * 6]
    heads = [set(tables[split].group_names) for split in tables]
    assert not (heads[0] & heads[1] or heads[0] & heads[2] or heads[1] & heads[2])
    assert (tables["train"].curl == UNKNOWN).sum() == 6 * 6 and (tables["train"].volume == UNKNOWN).sum() == 7 * 6


def test_what_is_judged_by_photo_is_seen_whole(world: Path) -> None:
    """Evenly spaced patches of a large split were one of each photo, and 'by photo' meant by single patch."""
    table = read_patch_tables(world / "processed")["train"]
    some = table.whole_photos(40)
    assert 30 <= len(some) <= 40 and np.array_equal(some, np.flatnonzero(np.isin(table.photo, table.photo[some])))
    photos = np.unique(table.photo[some])
    assert photos[0] == 0 and photos[-1] == len(table.photo_ids) - 1
    assert np.array_equal(table.whole_photos(len(table)), np.arange(len(table)))
    assert len(np.unique(table.photo[table.whole_photos(1)])) == 1


def test_a_head_on_both_sides_and_bad_labels_are_refused(tmp_path: Path) -> None:
    row = {"id": "a", "group": "g", "split": "train", "curl": 0, "volume": 1, "patches": ["x.png"]}
    with pytest.raises(MissingInputError, match=r"metadata.jsonl"):
        read_patch_tables(tmp_path)
    artifacts.write_jsonl(tmp_path / "metadata.jsonl", [row, {**row, "id": "b", "split": "val"}])
    with pytest.raises(InvalidArtifactError, match="head g of photo b is in split 'val' and in 'train'"):
        read_patch_tables(tmp_path)
    artifacts.write_jsonl(tmp_path / "metadata.jsonl", [{**row, "curl": 4}])
    with pytest.raises(InvalidArtifactError, match="photo a has curl 4, wanted 0 to 3 or null"):
        read_patch_tables(tmp_path)


def test_windows_of_style_pictures_teach_curl_and_not_volume(tmp_path: Path) -> None:
    """Waves are longer than patches, and Stage 2 shows the encoder style pictures; strand width cannot be seen in them."""
    rows = [
        {"id": f"p{n}", "group": f"g{n}", "split": split, "curl": n % 4, "volume": n % 3, "patches": [f"{n}_{k}.png" for k in range(5)],
         "files": {"style": f"style_vectors/{n}.png"}}
        for n, split in enumerate(["train"] * 24 + ["val"] * 4)
    ]  # fmt: skip
    artifacts.write_jsonl(tmp_path / "metadata.jsonl", rows)
    tables = read_patch_tables(tmp_path)
    train = tables["train"]
    windows = train.window >= 0
    assert windows.sum() == 24 * 2 * WINDOWS and (tables["val"].window >= 0).sum() == 4 * WINDOWS
    assert (train.volume[windows] == UNKNOWN).all() and (train.curl[windows] >= 0).all()
    assert all("style_vectors" in str(train.paths[number]) for number in np.flatnonzero(windows))
    sampler = BalancedSampler(train, batch_size=24, seed=0)
    drawn = np.concatenate([sampler.patches(step) for step in range(100)])
    assert windows[drawn].mean() == pytest.approx(0.4, abs=0.01)  # two thirds as often as patches
    np.testing.assert_allclose(np.bincount(train.curl[drawn], minlength=4) / len(drawn), 0.25, atol=0.02)


def test_windows_hold_the_hair() -> None:
    style = np.full((224, 224, 3), (90, 60, 30), np.uint8)
    style[112:, :112] = np.random.default_rng(0).integers(0, 256, (112, 112, 3))
    windows = hair_windows(style, 64)
    assert windows.shape == (WINDOWS, 64, 64, 3)
    assert np.array_equal(windows[0], fit_patch(style, 128)[64:, :64])  # the corner that is all hair comes first
    assert (hair_windows(np.full((224, 224, 3), 7, np.uint8), 32) == 7).all()
    coarse = hair_windows(style, 64, coarse=True)
    assert coarse.shape == windows.shape and coarse[0].std() < 0.8 * windows[0].std()


def skewed_table() -> PatchTable:
    """Class 1 has ten times the heads of the others, head 0 a hundred times the patches of the others; one head without labels."""
    heads = [(1, v) for v in (0, 1, 2) for _ in range(40)] + [(c, v) for c in (0, 2, 3) for v in (0, 1, 2) for _ in range(4)] + [(-1, -1)]
    numbers = [(h, *label) for h, label in enumerate(heads) for _ in range(300 if h == 0 else 3)]
    group, curl, volume = np.array(numbers, np.int64).T
    names = tuple(map(str, range(len(heads))))
    return PatchTable(tuple(Path(f"{i}.png") for i in range(len(group))), group, group, curl, volume, np.full_like(group, -1), names, names)


def test_sampling_is_balanced_over_classes_and_heads() -> None:
    table = skewed_table()
    sampler = BalancedSampler(table, batch_size=24, seed=0)
    drawn = np.concatenate([sampler.patches(step) for step in range(200)])
    assert (table.curl[drawn] >= 0).all()
    np.testing.assert_allclose(np.bincount(table.curl[drawn], minlength=4) / len(drawn), 0.25, atol=0.01)
    np.testing.assert_allclose(np.bincount(table.volume[drawn], minlength=3) / len(drawn), 1 / 3, atol=0.01)
    counts = np.bincount(table.group[drawn])[:40]  # the forty heads of curl 1, volume 0: 1/12 of 4800 draws
    assert counts[0] < 2 * counts.mean()  # not 100 times as often, though it has 100 times the patches
    batch = sampler.patches(3)
    assert len(np.unique(table.group[batch])) == len(batch)  # no head twice while there are others
    np.testing.assert_array_equal(batch, BalancedSampler(table, batch_size=24, seed=0).patches(3))
    assert not np.array_equal(batch, sampler.patches(4))


def test_decoding_ahead_changes_nothing(world: Path) -> None:
    table = read_patch_tables(world / "processed")["train"]
    sampler = BalancedSampler(table, batch_size=4, seed=0)
    kept, ahead = PatchImages(table, 32, workers=1), PatchImages(table, 32, workers=2, budget=0)
    assert kept.in_memory and not ahead.in_memory
    pairs = zip(
        feed(kept, sampler, range(3, 9), slice(0, 4), workers=0), feed(ahead, sampler, range(3, 9), slice(0, 4), workers=2), strict=True
    )
    for step, (one, other) in enumerate(pairs, 3):
        assert one.step == other.step == step
        assert torch.equal(one.images, other.images) and np.array_equal(one.patches, other.patches)


def test_views_keep_colour_and_strands() -> None:
    flat = torch.empty(4, 32, 32, 3, dtype=torch.uint8)
    flat[:] = torch.tensor([140, 90, 40], dtype=torch.uint8)
    views = draw_views(4, 0, 5)
    torch.testing.assert_close(augment(flat, views), to_unit(flat).repeat(2, 1, 1, 1), atol=1e-6, rtol=0)
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, 4, 2, 3)
    pictures = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(augment(pictures, identity), to_unit(pictures).repeat(2, 1, 1, 1), atol=1e-4, rtol=0)
    # An isotropic map: the two axes stay orthogonal and equally long, between 3/4 and 1 of the side, so curls keep their shape.
    x, y = draw_views(500, 1, 0).flatten(0, 1)[..., :2].unbind(-1)
    torch.testing.assert_close((x * y).sum(1), torch.zeros(1000), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.norm(dim=1), y.norm(dim=1))
    assert float(x.norm(dim=1).min()) >= 0.75 and float(x.norm(dim=1).max()) <= 1 + 1e-6
    rng = np.random.default_rng(0)
    strands = torch.from_numpy(np.stack([draw_patch(3, 0, np.array([120.0, 80, 50]), rng, side=64) for _ in range(8)]))
    contrast = [float((t[..., 1:] - t[..., :-1]).abs().mean()) for t in (to_unit(strands), augment(strands, draw_views(8, 0, 0)))]
    assert contrast[1] > 0.6 * contrast[0]
