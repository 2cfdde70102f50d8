"""Stage 1 training: exact resume, several processes, and that it learns what it says (issue 5)."""

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
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from backend import artifacts
from backend.config import Config
from backend.errors import DeepHairError, MissingInputError
from backend.training import checkpoints, texture_trainer, train_texture
from backend.training.models.supcon import Labels
from backend.training.models.texture_encoder import load_texture_encoder, new_encoder
from backend.training.processes import Processes, join_processes
from backend.training.texture_data import (
    BalancedSampler,
    Batch,
    PatchImages,
    feed,
    read_patch_tables,
    to_unit,
)
from backend.training.texture_predict import predict
from tests.texture_set import LAYERS, ROOT, configured, few, one_thread, own, root, world, write_set, write_start  # noqa: F401 (fixtures)


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


def test_an_average_of_the_weights_is_what_is_kept_and_a_stopped_run_goes_on_with_both(
    root: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = texture_trainer.Trainer.step, []

    def watching(self: texture_trainer.Trainer, batch: Batch, labels: Labels) -> dict[str, float]:
        if not seen:
            seen.append({name: value.clone() for name, value in self.encoder.state_dict().items()})
        losses = step(self, batch, labels)
        seen.append({name: value.clone() for name, value in self.encoder.state_dict().items()})
        return losses

    (tmp_path / "alone").mkdir()
    alone = own(few, tmp_path / "alone")
    monkeypatch.setattr(texture_trainer.Trainer, "step", watching)
    train_texture.train_texture(configured(alone, ema=0.25, patience=0))
    name = "backbone.layer1.0.conv1.weight"
    expected = seen[0][name]
    for number, live in enumerate(seen[1:]):
        decay = min(0.25, (number + 1) / (number + 10))  # 1/10, 2/11, 3/12, then 0.25
        expected = decay * expected + (1 - decay) * live[name]
    kept = artifacts.load_tensors(alone / "checkpoints" / train_texture.RESULT)
    assert torch.allclose(kept[name], expected, rtol=0, atol=1e-7) and not torch.allclose(kept[name], seen[-1][name], rtol=0, atol=1e-7)

    def dying(self: texture_trainer.Trainer, batch: Batch, labels: Labels) -> dict[str, float]:
        if batch.step == 3:
            raise Killed
        return step(self, batch, labels)

    monkeypatch.setattr(texture_trainer.Trainer, "step", dying)
    with pytest.raises(Killed):
        train_texture.train_texture(configured(root, ema=0.25, patience=0))
    monkeypatch.undo()
    train_texture.train_texture(configured(root, ema=0.25, patience=0))
    assert_same(root / "checkpoints", alone / "checkpoints")


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


def two_process_step(rank: int, port: int, root: Path, out: Path, steps: int) -> None:
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")  # fmt: skip
    take_steps(join_processes("cpu"), root, out if rank == 0 else None, steps)


def take_steps(world: Processes, root: Path, out: Path | None, steps: int) -> None:
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
@pytest.mark.parametrize("steps", [1, 3])
def test_two_processes_equal_one(world: Path, tmp_path: Path, steps: int) -> None:
    """Changes of the weights always; the gradients before the first update, since later a unit next to its threshold may fall to the other side.

    Tensor by tensor and against its size: AdamW divides by the gradient, so that a rounding where that is nearly 0 shows in a single weight.
    """
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(two_process_step, (port, world, tmp_path / "two", steps), nprocs=2)
    take_steps(Processes(torch.device("cpu")), world, tmp_path / "one", steps)
    one, two = artifacts.load_tensors(tmp_path / "one"), artifacts.load_tensors(tmp_path / "two")
    start = new_encoder(LAYERS, dropout=0.2, seed=3).state_dict()
    changes = {name: (one[name] - start[name], two[name] - start[name]) for name in start}
    gradients = {name: (one[name], two[name]) for name in one if name not in start} if steps == 1 else {}
    for name, (ours, theirs) in (changes | gradients).items():
        off, size = (float(value.double().norm()) for value in (theirs - ours, ours))
        assert off <= 2e-3 * size, f"{name}: {off} of {size}"
    assert max(float(change.abs().max()) for name, (change, _) in changes.items() if one[name].is_floating_point()) > 1e-5  # it did move


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
    """Some minutes: the whole of Stage 1 from random weights learns what it should, keeps the colour, and learns nothing from noise."""
    write_set(tmp_path / "processed", heads=600, photos=1, patches=2)
    write_start(tmp_path / "weights")
    config = configured(tmp_path, steps=400, batch_size=24, lr=3e-4, warmup=10, save_every=400, patience=0)
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
        assert control[f"{split}volume_balanced_accuracy"] < min(0.5, result[f"{split}volume_balanced_accuracy"])


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
    trainer = texture_trainer.Trainer(config, new_encoder(LAYERS, dropout=0.2, seed=0), Processes(torch.device("cpu")))
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


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", None])
def test_a_cpu_computes_in_bf16_where_it_has_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, world: Path, capability: str | None
) -> None:
    """Only when asked for; the losses then are float32's but for rounding, and the weights stay float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {} if capability is None else {capability: True})
    table = read_patch_tables(world / "processed")["train"]
    losses = {}
    for precision in ("fp32", "bf16"):
        config = configured(world, precision=precision, batch_size=8).texture
        trainer = texture_trainer.Trainer(config, new_encoder(LAYERS, dropout=0.2, seed=0), Processes(torch.device("cpu")))
        assert trainer.bf16 == (precision == "bf16" and capability is not None)
        batch = next(
            feed(PatchImages(table, 32, workers=0), BalancedSampler(table, batch_size=8, seed=0), range(1), slice(0, 8), workers=0)
        )
        losses[precision] = trainer.step(batch, texture_trainer.labels_of(table, batch.patches))["loss"]
        assert {parameter.dtype for parameter in trainer.names} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
    assert (losses["bf16"] == losses["fp32"]) == (capability is None)
