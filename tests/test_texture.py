"""Stage 1: the losses against references, the data it sees, exact resume, and that it learns what it says (issue 5)."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from backend import artifacts
from backend.config import Config
from backend.errors import DeepHairError, InvalidArtifactError, MissingInputError
from backend.training import checkpoints, texture_trainer, train_texture
from backend.training.models.supcon import UNKNOWN, Labels, masked_cross_entropy, supcon_loss
from backend.training.models.texture_encoder import EMBEDDING, TextureEncoder, blocks_of, load_texture_encoder, new_encoder
from backend.training.texture_data import (
    WINDOWS,
    BalancedSampler,
    Batch,
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
from backend.training.texture_metrics import balanced_accuracy, by_photo, score
from backend.training.texture_predict import predict
from backend.training.texture_report import tsne

LAYERS = (1, 1, 1, 1)
ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------------------------------- a set of its own
def draw_patch(curl: int, volume: int, colour: np.ndarray, rng: np.random.Generator, side: int = 32) -> np.ndarray:
    """Strands: parallel lines whose waviness is the curl, and whose width is the volume; (side, side, 3) uint8 RGB."""
    scale = 4
    canvas = np.empty((side * scale, side * scale, 3), np.float32)
    canvas[:] = colour * 0.7
    along = np.arange(0, side * scale, 2)
    waves = (0.0, 1.0, 2.0, 4.0)[curl]
    for start in np.arange(-10, side * scale + 10, (7, 14, 28)[volume]):
        phase = rng.uniform(0, 2 * math.pi)
        across = start + rng.normal(0, 1) + (8 if waves else 0) * np.sin(2 * math.pi * waves * along / (side * scale) + phase)
        points = np.stack([across, along], axis=1).round().astype(np.int32)
        shade = tuple(float(v) for v in colour * rng.uniform(0.9, 1.3))
        cv2.polylines(canvas, [points], False, shade, (3, 6, 12)[volume], cv2.LINE_AA)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).clip(0, 255).round().astype(np.uint8)


def write_set(processed: Path, *, heads: int, photos: int = 2, patches: int = 3, side: int = 32, seed: int = 0) -> None:
    """A Stage 0 output folder as far as Stage 1 reads it, 12 heads of a split at a time. Some heads lack a label."""
    rng = np.random.default_rng(seed)
    folder = processed / "hair_patches"
    folder.mkdir(parents=True)
    rows = []
    for head in range(heads):
        curl, volume = head % 4, (head // 4) % 3
        colour = rng.uniform(30, 190, 3)
        split = ("train", "val", "test", "train", "train")[(head // 12) % 5]
        for photo in range(photos):
            identifier = f"CP{head:06d}-{photo:03d}"
            names = [f"hair_patches/{identifier}_{k:03d}.png" for k in range(patches)]
            for name in names:
                cv2.imwrite(str(processed / name), draw_patch(curl, volume, colour, rng, side)[..., ::-1])
            rows.append({"id": identifier, "group": f"g{head}", "split": split, "curl": None if head % 6 == 5 else curl,
                         "volume": None if head % 5 == 4 else volume, "phase": "after", "patches": names})  # fmt: skip
    artifacts.write_jsonl(processed / "metadata.jsonl", rows)


def write_start(weights: Path) -> None:
    """A ResNet file of torchvision's layout, in half precision, as the miniature's is."""
    (weights / "resnet50").mkdir(parents=True)
    state = new_encoder(LAYERS, dropout=0.0, seed=1).backbone.state_dict()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file({**halves, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, weights / "resnet50" / "model.safetensors")


def configured(root: Path, **texture: Any) -> Config:
    defaults = {
        "layers": LAYERS,
        "image_size": 32,
        "steps": 4,
        "batch_size": 4,
        "warmup": 1,
        "save_every": 2,
        "keep": 1,
        "precision": "fp32",
        "workers": 0,
    }
    paths = {"processed": root / "processed", "checkpoints": root / "checkpoints", "weights": root / "weights"}
    return Config.model_validate({"name": "test", "device": "cpu", "paths": paths, "texture": {**defaults, **texture}})


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four heads, half of them for validation: enough to run on."""
    root = tmp_path_factory.mktemp("few")
    write_set(root / "processed", heads=24, photos=1, patches=2)
    write_start(root / "weights")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty heads in processed/, and start weights; read by all tests, written by none."""
    root = tmp_path_factory.mktemp("texture")
    write_set(root / "processed", heads=60)
    write_start(root / "weights")
    return root


def own(shared: Path, root: Path) -> Path:
    """The same data with a checkpoint folder of one's own."""
    for name in ("processed", "weights"):
        (root / name).symlink_to(shared / name)
    return root


@pytest.fixture
def root(few: Path, tmp_path: Path) -> Path:
    return own(few, tmp_path)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ----------------------------------------------------------------------------------------------------------------------- the losses
def slow_supcon(z: Tensor, classes: list[int], groups: list[int], temperature: float) -> Tensor:
    """Equation 2 of arXiv 2004.11362, term by term."""
    rows = [i for i in range(len(classes)) if classes[i] >= 0]
    terms = []
    for i in rows:
        positives = [p for p in rows if p != i and classes[p] == classes[i]]
        if not any(groups[p] != groups[i] for p in positives):
            continue
        denominator = torch.stack([torch.exp(z[i] @ z[a] / temperature) for a in rows if a != i]).sum()
        terms.append(-torch.stack([torch.log(torch.exp(z[i] @ z[p] / temperature) / denominator) for p in positives]).mean())
    return torch.stack(terms).mean() if terms else (z * 0).sum()


def unit(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(count, 16, generator=generator, dtype=torch.float64), dim=1).float()


def value_and_gradient(loss: Any, z: Tensor) -> tuple[float, Tensor]:
    leaf = z.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return float(value.detach()), leaf.grad if leaf.grad is not None else torch.zeros_like(z)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 3)), min_size=1, max_size=10),
    st.integers(0, 1000),
    st.sampled_from([0.07, 0.1, 0.5]),
)
def test_supcon_is_the_papers_formula(rows: list[tuple[int, int]], seed: int, temperature: float) -> None:
    z, classes, groups = unit(len(rows), seed), [c for c, _ in rows], [g for _, g in rows]
    fast = value_and_gradient(lambda x: supcon_loss(x, torch.tensor(classes), torch.tensor(groups), temperature=temperature), z)
    slow = value_and_gradient(lambda x: slow_supcon(x, classes, groups, temperature), z)
    assert fast[0] == pytest.approx(slow[0], abs=1e-5)
    torch.testing.assert_close(fast[1], slow[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.5])
def test_supcon_equals_pytorch_metric_learning(temperature: float) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    classes = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1, 2] * 2)
    groups = torch.arange(10).repeat(2)  # two views of ten heads
    z = unit(20, 3)
    # The reference normalises inside, so it is compared on the sphere: our gradient goes through the same normalisation.
    ours = value_and_gradient(lambda x: supcon_loss(nn.functional.normalize(x, dim=1), classes, groups, temperature=temperature), z)
    theirs = value_and_gradient(lambda x: losses.SupConLoss(temperature=temperature)(x, classes), z)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)


def test_supcon_without_positives_is_zero_and_with_one_class_finite() -> None:
    z = unit(4, 0)
    for classes, groups in (([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 0, 1, 1], [5, 5, 6, 6]), ([-1] * 4, [0, 1, 2, 3])):
        value, gradient = value_and_gradient(
            lambda x, c=classes, g=groups: supcon_loss(x, torch.tensor(c), torch.tensor(g), temperature=0.1), z
        )
        assert value == 0 and not gradient.any()
    same = torch.full((4, 16), 0.25)
    value, gradient = value_and_gradient(
        lambda x: supcon_loss(x, torch.zeros(4, dtype=torch.long), torch.arange(4), temperature=0.01), same
    )
    assert value == pytest.approx(math.log(3), abs=1e-5) and torch.isfinite(gradient).all()


def test_missing_labels_are_masked_not_guessed() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, -5.0]])
    expected = -(torch.log_softmax(logits[0], 0)[0] + torch.log_softmax(logits[1], 0)[0]) / 2
    assert masked_cross_entropy(logits, torch.tensor([0, 0, UNKNOWN])) == pytest.approx(float(expected))
    assert masked_cross_entropy(logits, torch.full((3,), UNKNOWN)) == 0
    joint = Labels(torch.tensor([3, -1, 2]), torch.tensor([2, 0, -1]), torch.arange(3)).joint
    assert joint.tolist() == [11, UNKNOWN, UNKNOWN]


# ---------------------------------------------------------------------------------------------------------------------- the network
def test_shapes_and_pooling() -> None:
    encoder = new_encoder(LAYERS, dropout=0.2, seed=0).eval()
    images = torch.rand(2, 3, 128, 128)
    with torch.inference_mode():
        output, tokens, pooled = encoder(images), encoder.patch_tokens(images), encoder.encode(images)
    assert [tuple(t.shape) for t in output] == [(2, 2048), (2, 128), (2, 4), (2, 3)]
    torch.testing.assert_close(output.projection.norm(dim=1), torch.ones(2))
    assert tokens.shape == (2, 16, 2048)
    torch.testing.assert_close(tokens.mean(dim=1), pooled)  # at 128 px each token is one cell of the 4x4 map
    with torch.inference_mode():  # reading order: a change in the upper right corner moves token 3 most, and token 12 least
        changed = images.clone()
        changed[:, :, :20, -20:] = 0
        moved = (encoder.patch_tokens(changed) - tokens).norm(dim=2)[0]
    assert int(moved.argmax()) == 3 and moved[3] > 2 * moved[12]


def test_full_size_network_is_torchvisions_resnet50() -> None:
    from torchvision.models import resnet50

    with torch.device("meta"):
        reference, encoder = resnet50(), TextureEncoder()
    wanted = {name: value.shape for name, value in reference.state_dict().items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in encoder.backbone.state_dict().items()} == wanted
    assert blocks_of(reference.state_dict()) == (3, 4, 6, 3)


def test_features_are_torchvisions_on_normalised_images(world: Path) -> None:
    from torchvision.models.resnet import Bottleneck, ResNet

    encoder = new_encoder(LAYERS, dropout=0.0, seed=7)
    encoder.load_backbone(world / "weights/resnet50/model.safetensors")
    reference = ResNet(Bottleneck, list(LAYERS))
    reference.fc = nn.Identity()
    reference.load_state_dict(encoder.backbone.state_dict())
    images = torch.rand(2, 3, 64, 64)
    normalised = (images - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    torch.testing.assert_close(encoder.eval().encode(images), reference.eval()(normalised))


def test_start_weights_of_another_depth_are_refused(world: Path) -> None:
    with pytest.raises(InvalidArtifactError, match=r"blocks \(1, 1, 1, 1\), texture.layers asks for \(2, 1, 1, 1\)"):
        new_encoder((2, 1, 1, 1), dropout=0.0, seed=0).load_backbone(world / "weights/resnet50/model.safetensors")


def test_tensors_that_do_not_fit_are_refused_with_a_reason() -> None:
    state = new_encoder(LAYERS, dropout=0.0, seed=0).state_dict()
    assert torch.equal(TextureEncoder.from_tensors(state, LAYERS).curl_head.weight, state["curl_head.weight"])
    for change, reason in (
        ({"curl_head.weight": state["curl_head.weight"][:3]}, r"wrong shape: curl_head.weight is \(3, 2048\), wanted \(4, 2048\)"),
        ({"curl_head.bias": torch.full((4,), torch.nan)}, "not finite: curl_head.bias"),
        ({"surplus": torch.zeros(1)}, "not known here: surplus"),
    ):
        with pytest.raises(InvalidArtifactError, match=reason):
            TextureEncoder.from_tensors({**state, **change}, LAYERS)
    del state["volume_head.bias"]
    with pytest.raises(InvalidArtifactError, match=r"missing: volume_head.bias"):
        TextureEncoder.from_tensors(state, LAYERS)


def test_dropout_is_what_the_caller_draws() -> None:
    encoder = new_encoder(LAYERS, dropout=0.5, seed=0).train()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images, uniform = torch.rand(2, 3, 32, 32), torch.rand(2, 2, EMBEDDING)
    output = encoder(images, uniform)
    by_hand = output.embedding * (uniform[:, 0] >= 0.5) * 2
    torch.testing.assert_close(output.curl_logits, encoder.curl_head(by_hand))
    torch.testing.assert_close(encoder(images).volume_logits, encoder.volume_head(output.embedding))
    torch.testing.assert_close(encoder.eval()(images, uniform).curl_logits, encoder.curl_head(output.embedding))


# ------------------------------------------------------------------------------------------------------------------------- the data
def test_tables_hold_what_stage_0_wrote(world: Path) -> None:
    tables = read_patch_tables(world / "processed")
    assert [len(tables[split]) for split in ("train", "val", "test")] == [36 * 6, 12 * 6, 12 * 6]
    heads = [set(tables[split].group_names) for split in tables]
    assert not (heads[0] & heads[1] or heads[0] & heads[2] or heads[1] & heads[2])
    assert (tables["train"].curl == UNKNOWN).sum() == 6 * 6 and (tables["train"].volume == UNKNOWN).sum() == 7 * 6


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


# ---------------------------------------------------------------------------------------------------------------------- the metrics
def test_scores_of_a_hand_computed_case() -> None:
    predicted = np.eye(3)[[0, 0, 1, 1, 1, 2]]
    labels, groups = np.array([0, 0, 0, 1, 1, UNKNOWN]), np.array([0, 0, 1, 2, 2, 3])
    found = score(predicted, labels, groups, ("a", "b", "c"), seed=0)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)  # class c does not occur
    assert found["confusion"] == [[2, 1, 0], [0, 2, 0], [0, 0, 0]] and found["samples"] == 5 and found["heads"] == 3
    assert found["per_class"]["b"] == {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(0.8), "samples": 2}
    assert found["per_class"]["c"]["recall"] is None
    low, high = found["balanced_accuracy_ci"]
    assert low <= found["balanced_accuracy"] <= high
    assert score(predicted, np.full(6, UNKNOWN), groups, ("a", "b", "c"), seed=0)["balanced_accuracy"] is None
    json.dumps(found, allow_nan=False)


def test_interval_over_heads_is_wider_than_over_patches() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(10) < 0.7  # ten heads, each wholly right or wholly wrong, thirty patches each
    labels, heads = np.repeat(np.arange(10) % 2, 30), np.repeat(np.arange(10), 30)
    predicted = np.eye(2)[np.where(np.repeat(right, 30), labels, 1 - labels)]
    by_head, by_patch = (score(predicted, labels, g, ("a", "b"), seed=0)["balanced_accuracy_ci"] for g in (heads, np.arange(300)))
    assert by_head[1] - by_head[0] > 3 * (by_patch[1] - by_patch[0])
    assert math.isnan(float(balanced_accuracy(np.zeros((2, 2)))))


def test_photos_average_their_patches() -> None:
    values, first = by_photo(np.array([[1.0, 0], [0, 1], [0, 1], [0.5, 0.5]]), np.array([4, 4, 4, 2]))
    np.testing.assert_allclose(values, [[0.5, 0.5], [1 / 3, 2 / 3]])
    assert first.tolist() == [3, 0]


def test_tsne_keeps_clusters_apart() -> None:
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(3), 20)
    places = tsne(rng.normal(size=(60, 10)) + 8 * np.eye(10)[label], seed=0)
    distance = np.linalg.norm(places[:, None] - places[None], axis=2) + np.diag(np.full(60, np.inf))
    assert (label[distance.argmin(axis=1)] == label).all()


# ---------------------------------------------------------------------------------------------------------------------- the training
@pytest.fixture(scope="module")
def undisturbed(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = own(few, tmp_path_factory.mktemp("undisturbed"))
    torch.set_num_threads(1)
    train_texture.train_texture(configured(root))
    return root / "checkpoints"


def test_the_run_leaves_what_the_design_names(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert {"texture_encoder.safetensors", "stage1_metrics.json", "stage1_report.html", "stage1_step_4.safetensors"} <= names
    assert "stage1_step_2.safetensors" not in names  # keep=1
    header = artifacts.read_header(undisturbed / "texture_encoder.safetensors")
    assert header["format"] == "deephair-texture-1" and header["layers"] == [1, 1, 1, 1] and header["steps"] == 4
    page = (undisturbed / "stage1_report.html").read_text()
    assert "Worst mistakes" in page and "http" not in page.replace("http-equiv", "")
    encoder = load_texture_encoder(undisturbed / "texture_encoder.safetensors")
    assert not encoder.training and encoder.encode(torch.rand(1, 3, 32, 32)).shape == (1, 2048)


def assert_same(found: Path, wanted: Path) -> None:
    """The same encoder to the last bit, with the same header."""
    one, other = found / train_texture.RESULT, wanted / train_texture.RESULT
    tensors, expected = artifacts.load_tensors(one), artifacts.load_tensors(other)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert artifacts.read_header(one) == artifacts.read_header(other)


class Killed(Exception):
    pass


STOPS = {
    "before the first save": 4,
    "between saves": 2,
    "in a save": 2,
    "after the best, before the save": 2,
    "at the end": 0,
    "asked to stop": 1,
}


@pytest.mark.parametrize("point", [pytest.param(p, marks=() if p == "in a save" else pytest.mark.long) for p in STOPS])
def test_a_stopped_run_ends_bit_equal(point: str, root: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(root)
    step, save = texture_trainer.Trainer.step, artifacts.save_tensors
    taken = 0

    def stepping(self: texture_trainer.Trainer, batch: Batch, labels: Labels) -> dict[str, float]:
        nonlocal taken
        if (point, batch.step) in (("before the first save", 1), ("between saves", 3)):
            raise Killed
        if point == "asked to stop" and batch.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        taken += 1
        return step(self, batch, labels)

    def saving(path: Path, tensors: Any, header: Any) -> str:
        if point == "in a save" and path.name == "optimizer.safetensors" and (root / "checkpoints/stage1_step_4.safetensors").exists():
            raise Killed
        if point == "after the best, before the save" and path.name == "stage1_step_4.safetensors":
            raise Killed
        if point == "at the end" and path.name == train_texture.RESULT:
            raise Killed
        return save(path, tensors, header)

    monkeypatch.setattr(texture_trainer.Trainer, "step", stepping)
    monkeypatch.setattr(artifacts, "save_tensors", saving)
    with pytest.raises(KeyboardInterrupt if point == "asked to stop" else Killed):
        train_texture.train_texture(config)
    monkeypatch.undo()
    steps: list[int] = []

    def counting(self: texture_trainer.Trainer, batch: Batch, labels: Labels) -> dict[str, float]:
        steps.append(batch.step)
        return step(self, batch, labels)

    monkeypatch.setattr(texture_trainer.Trainer, "step", counting)
    train_texture.train_texture(config)
    assert len(steps) == STOPS[point]
    assert_same(root / "checkpoints", undisturbed)


@pytest.mark.long
def test_kill_9_in_the_middle_ends_bit_equal(root: Path, undisturbed: Path) -> None:
    settings = [f"paths.{name}={root / name}" for name in ("processed", "checkpoints", "weights")]
    config = configured(root)
    settings += [f"texture.{key}={json.dumps(value)}" for key, value in config.resolved()["texture"].items()]
    script = ("import os, sys, torch; torch.set_num_threads(1); from backend.training import train_texture, texture_trainer as t; step = t.Trainer.step\n"
              "t.Trainer.step = lambda self, batch, labels: os.kill(os.getpid(), 9) if batch.step == 3 else step(self, batch, labels)\n"
              "train_texture.main(sys.argv[1:])")  # fmt: skip
    (root / "empty.yaml").write_text("device: cpu\ntrain: {texture_every: 0}\n")
    command = [sys.executable, "-c", script, "--config", str(root / "empty.yaml"), *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -9, done.stderr
    assert (root / "checkpoints/stage1_step_2.state").is_dir() and not (root / "checkpoints" / train_texture.RESULT).exists()
    train_texture.train_texture(config)
    assert_same(root / "checkpoints", undisturbed)


def test_finished_work_is_left_alone_and_changed_settings_are_not(root: Path) -> None:
    config = configured(root, steps=2)
    first = train_texture.train_texture(config)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (root / "checkpoints").rglob("*")}
    second = train_texture.train_texture(config)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (root / "checkpoints").rglob("*")} == before
    assert second == {**first, "skipped": True}
    assert train_texture.train_texture(configured(root, steps=2, workers=1))["skipped"]  # how it is computed is not what is computed
    assert not train_texture.train_texture(configured(root, steps=2, lr=1e-4))["skipped"]


def test_a_non_finite_batch_is_named_and_changes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = texture_trainer.Trainer.losses

    def poisoned(self: texture_trainer.Trainer, batch: Batch, labels: Labels) -> dict[str, Tensor]:
        found = losses(self, batch, labels)
        return {**found, "supcon": found["supcon"] * (math.nan if batch.step == 3 else 1)}

    monkeypatch.setattr(texture_trainer.Trainer, "losses", poisoned)
    with pytest.raises(DeepHairError, match=r"before the update of step 3: .*supcon nan.* CP\d{6}-00\d_00\d\.png"):
        train_texture.train_texture(configured(root))
    assert (root / "checkpoints/stage1_step_2.state").is_dir()


def test_early_stop_keeps_the_best(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.8, 0.5])
    monkeypatch.setattr(train_texture, "headline", lambda found: next(scores))
    result = train_texture.train_texture(configured(root, save_every=1, patience=1))
    assert result["steps"] == 2 and result["chosen_step"] == 1
    assert not (root / "checkpoints" / train_texture.BEST).exists()


def two_process_step(rank: int, port: int, root: Path, out: Path) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")  # fmt: skip
    take_steps(texture_trainer.join_world("cpu"), root, out if rank == 0 else None)


def take_steps(world: texture_trainer.World, root: Path, out: Path | None, steps: int = 3) -> None:
    """Some steps with batch-norm statistics frozen: each process would otherwise normalise by its own half."""
    torch.set_num_threads(1)
    config = configured(root, batch_size=8, lr=1e-4).texture
    table = read_patch_tables(root / "processed")["train"]
    trainer = texture_trainer.Trainer(config, new_encoder(LAYERS, dropout=0.2, seed=3), world)
    trainer.model.train()
    for module in trainer.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for batch in feed(
        PatchImages(table, 32, workers=0), BalancedSampler(table, batch_size=8, seed=0), range(steps), world.rows(8), workers=0
    ):
        trainer.step(batch, texture_trainer.labels_of(table, batch.patches))
    if out is not None:
        # The last step's gradients too: AdamW would hide a wrong factor in them.
        gradients = {f"gradient of {name}": parameter.grad for parameter, name in trainer.names.items()}
        save_file({name: value.contiguous() for name, value in {**trainer.encoder.state_dict(), **gradients}.items()}, out)


@pytest.mark.long
def test_two_processes_equal_one(world: Path, tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(two_process_step, (port, world, tmp_path / "two"), nprocs=2)
    take_steps(texture_trainer.World(torch.device("cpu")), world, tmp_path / "one")
    one, two = artifacts.load_tensors(tmp_path / "one"), artifacts.load_tensors(tmp_path / "two")
    start = new_encoder(LAYERS, dropout=0.2, seed=3).state_dict()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)
    assert max(float((one[name] - start[name]).abs().max()) for name in start if one[name].is_floating_point()) > 1e-4  # it did move


def deal_anew(processed: Path) -> None:
    """Shuffles the training heads' labels among them; validation and test heads keep theirs."""
    rows = artifacts.read_jsonl(processed / "metadata.jsonl")
    labels = [(row["curl"], row["volume"]) for row in rows if row["split"] == "train"]
    order = iter(np.random.default_rng(0).permutation(len(labels)))
    for row in rows:
        if row["split"] == "train":
            row["curl"], row["volume"] = labels[next(order)]
    artifacts.write_jsonl(processed / "metadata.jsonl", rows)


@pytest.mark.long
def test_it_learns_strands_of_unseen_heads_and_keeps_their_colour(tmp_path: Path) -> None:
    """A minute or two: the whole of Stage 1 from random weights learns what it should, keeps the colour, and learns nothing from noise."""
    write_set(tmp_path / "processed", heads=600, photos=1, patches=2)
    write_start(tmp_path / "weights")
    config = configured(tmp_path, steps=150, batch_size=24, warmup=10, save_every=150, patience=0)
    result = train_texture.train_texture(config)
    for split in ("", "test_"):
        assert result[f"{split}curl_balanced_accuracy"] >= 0.5  # chance: 0.25
        assert result[f"{split}volume_balanced_accuracy"] >= 0.43  # chance: 0.33
    probe = artifacts.read_json(tmp_path / "checkpoints" / train_texture.METRICS)["metrics"]["colour_probe"]
    assert probe["pooled_delta_e"] <= 0.5 * probe["pooled_delta_e_of_mean"]
    assert probe["tokens_delta_e"] <= 0.5 * probe["tokens_delta_e_of_mean"]

    deal_anew(tmp_path / "processed")
    control = train_texture.train_texture(config)
    assert not control["skipped"]
    for split in ("", "test_"):
        assert control[f"{split}curl_balanced_accuracy"] < 0.4 < result[f"{split}curl_balanced_accuracy"]
        assert control[f"{split}volume_balanced_accuracy"] < 0.45


def test_predicting_by_itself(undisturbed: Path, few: Path, tmp_path: Path) -> None:
    config = configured(few)
    config = config.model_copy(update={"paths": config.paths.model_copy(update={"checkpoints": undisturbed})})
    side = config.texture.image_size
    patch = sorted((few / "processed/hair_patches").glob("*.png"))[0]
    large = cv2.resize(cv2.imread(str(patch)), (128, 128), interpolation=cv2.INTER_NEAREST)  # averaged back, it is the patch again
    cv2.imwrite(str(tmp_path / "patch.png"), large)
    cv2.imwrite(str(tmp_path / "long.png"), np.concatenate([large, large], axis=1))
    one, two = predict(config, [tmp_path / "patch.png", tmp_path / "long.png"])
    assert (one["patches"], two["patches"]) == (1, 2)
    encoder = load_texture_encoder(undisturbed / train_texture.RESULT)
    pixels = torch.from_numpy(cv2.imread(str(patch))[..., ::-1].copy())[None]  # type: ignore[index]
    with torch.inference_mode():
        wanted = encoder(to_unit(pixels)).curl_logits.softmax(1)[0].tolist()
    assert side == 32 and list(one["curl"]["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)
    assert list(two["curl"]["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)
    assert one["curl"]["class"] == int(np.argmax(wanted))

    head = np.zeros((256, 256, 4), np.uint8)  # a head crop as Stage 0 writes it: hair in a corner, alpha is the mask
    head[:96, :96] = (*large[0, 0].tolist(), 255)
    cv2.imwrite(str(tmp_path / "head.png"), head)
    assert predict(config, [tmp_path / "head.png"])[0]["patches"] == config.data.patches_per_photo
    cv2.imwrite(str(tmp_path / "bald.png"), head * 0)
    with pytest.raises(MissingInputError, match="no window that hair fills"):
        predict(config, [tmp_path / "bald.png"])
    with pytest.raises(MissingInputError, match="no texture encoder"):
        predict(configured(tmp_path), [patch])


def test_restored_optimizer_state_lies_in_memory_as_its_parameter() -> None:
    """Fused kernels walk a parameter and its moments side by side: a moment in another layout would be applied to other weights."""
    config = Config().texture
    trainer = texture_trainer.Trainer(config, new_encoder(LAYERS, dropout=0.2, seed=0), texture_trainer.World(torch.device("cpu")))
    trainer.encoder(torch.rand(2, 3, 32, 32)).curl_logits.square().sum().backward()
    trainer.optimizer.step()
    taken = {name: value.clone(memory_format=torch.contiguous_format) for name, value in trainer.state()["optimizer"].items()}
    checkpoints.restore_optimizer(trainer.optimizer, trainer.names, taken)
    wide = trainer.encoder.backbone.layer1[0].conv2.weight
    assert wide.is_contiguous(memory_format=torch.channels_last) and not wide.is_contiguous()
    for parameter, state in trainer.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride() and torch.equal(
            state["exp_avg"], taken[f"{trainer.names[parameter]}|exp_avg"]
        )
