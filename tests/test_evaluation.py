"""Stage 3's measuring: figures against hand-computed values and other libraries, pairs, baselines, and models that must not pass."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lpips as reference_lpips
import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from backend import artifacts
from backend.config import Config, EvaluateConfig
from backend.errors import InvalidArtifactError, MissingInputError
from backend.imaging import masks
from backend.training import baselines, figures, gate, image_networks, metrics, pairs
from backend.training.evaluate import Evaluator
from backend.training.models.bundle import load_bundle
from backend.training.models.perceptual import AlexNet
from backend.training.painting import PaintedStore
from backend.training.prepared import Prepared, Sample
from backend.tryon import conditioning
from backend.tryon.painter import Painter
from backend.tryon.placement import STAYS
from tests.conftest import World


def _noise(seed: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def _disc(side: int = 64, radius: int = 18) -> np.ndarray:
    y, x = np.mgrid[:side, :side]
    return np.where((x - side // 2) ** 2 + (y - side // 2) ** 2 < radius**2, 255, 0).astype(np.uint8)


# ---- figures ----


def test_ssim_and_psnr_are_torchmetrics() -> None:
    """SSIM window by window, but for those that reach over the border, which torchmetrics mirrors and the definition leaves out."""
    picture = _noise(0)
    other = np.clip(picture.astype(int) + np.random.default_rng(1).integers(-40, 41, picture.shape), 0, 255).astype(np.uint8)
    a, b = (torch.from_numpy(p).permute(2, 0, 1)[None].double() / 255 for p in (picture, other))
    _, windows = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    assert metrics.ssim(picture, other) == pytest.approx(float(windows[..., 5:-5, 5:-5].mean()), abs=1e-4)
    assert metrics.psnr(picture, other) == pytest.approx(float(peak_signal_noise_ratio(a, b, data_range=1.0)), abs=1e-4)
    assert metrics.ssim(picture, picture) == 1.0 and metrics.psnr(picture, picture) == 100.0


def test_masked_ssim_does_not_see_what_lies_a_window_away() -> None:
    picture, mask = _noise(2, 96), np.zeros((96, 96), np.uint8)
    mask[:, :40] = 255
    far, near = picture.copy(), picture.copy()
    far[:, 50:] = 0
    near[:, 30:] = 0
    assert metrics.ssim(far, picture, mask) == 1.0 > metrics.ssim(near, picture, mask)
    with pytest.raises(ValueError, match="empty mask"):
        metrics.ssim(picture, picture, np.zeros_like(mask))


def test_hair_length_by_hand_and_at_any_scale() -> None:
    hair = np.zeros((100, 100), np.uint8)
    hair[10:80, 40:60] = 255  # 98th percentile of rows 10..79 is 78
    assert metrics.hair_length(hair, (30.0, 20.0, 60.0, 60.0)) == pytest.approx((78 - 20) / 40, abs=0.02)
    twice = np.kron(hair, np.ones((2, 2), np.uint8))
    assert metrics.hair_length(twice, (60.0, 40.0, 120.0, 120.0)) == pytest.approx((78 - 20) / 40, abs=0.03)
    assert metrics.hair_length(hair, None) is None and metrics.hair_length(np.zeros_like(hair), (0.0, 0.0, 9.0, 9.0)) is None


def test_lpips_with_alexnet_is_the_lpips_librarys() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = reference_lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    layers = {
        int(n): layer for k in range(1, 6) for n, layer in getattr(theirs.net, f"slice{k}").named_children() if hasattr(layer, "weight")
    }
    convolutions = {f"features.{n}.{kind}": getattr(layer, kind) for n, layer in layers.items() for kind in ("weight", "bias")}
    heads = {name: value for name, value in theirs.state_dict().items() if name.startswith("lin") and not name.startswith("lins")}
    ours = AlexNet.from_tensors(convolutions, heads)
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(ours.lpips(a, b), theirs(a, b).flatten(), atol=1e-4)
        assert float(ours.lpips(a, a).abs().max()) == 0.0
    with pytest.raises(RuntimeError):
        AlexNet.from_tensors({**convolutions, "features.0.weight": torch.zeros(64, 3, 3, 3)}, heads)


def test_the_names_of_alexnet_are_torchvisions() -> None:
    from torchvision.models import alexnet

    with torch.device("meta"):
        names = set(alexnet().state_dict())
    assert {f"features.{n}.{kind}" for n in (0, 3, 6, 8, 10) for kind in ("weight", "bias")} <= names


# ---- sets ----


class _MeanColour(torch.nn.Module):
    """Pictures to their mean colour: features whose Frechet distance can be worked out by hand."""

    num_features = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


def test_the_frechet_distance_by_hand() -> None:
    """Fed in batches: the same set gives 0; shifted by (10, 0, 0), it gives 100, since the covariances are equal."""
    rng = np.random.default_rng(0)
    real = [np.full((4, 4, 3), rng.integers(20, 200, 3), np.uint8) for _ in range(12)]
    moved = [picture + np.array([10, 0, 0], np.uint8) for picture in real]
    sets = image_networks.FrechetSets(_MeanColour())
    for start in (0, 5):
        part = slice(start, start + 5 if start == 0 else 12)
        sets.add(real[part], {"same": real[part], "moved": moved[part]})
    found = sets.distances()
    assert found["same"] == pytest.approx(0.0, abs=1e-3) and found["moved"] == pytest.approx(100.0, rel=1e-3)


def _tiny_clip(folder: Path) -> Any:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16, projection_dim=8)  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def test_clip_and_dino_read_local_folders_and_what_is_not_there_is_named(tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    _tiny_clip(tmp_path / "clip")
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)).save_pretrained(
        tmp_path / "dinov2"
    )
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path / "dinov2")
    settings = EvaluateConfig(networks=("clip_image", "dino", "fid_inception"))
    found = image_networks.MeasuringNetworks(tmp_path, settings, torch.device("cpu"))
    assert found.clip is not None and found.dino is not None and found.alex is None and found.inception is None
    assert set(found.absent) == {"lpips_alex", "fid"}
    assert "evaluate.networks" in found.absent["lpips_alex"] and "inception_v3.safetensors" in found.absent["fid"]
    pictures = [_noise(n, 224) for n in range(3)]
    for network, width in ((found.clip, 8), (found.dino, 16)):
        vectors = network.embed(pictures, batch=2)
        assert vectors.shape == (3, width) and np.allclose(vectors, network.embed(pictures), atol=1e-5)
        assert metrics.cosine(vectors, vectors) == pytest.approx([1.0] * 3, abs=1e-5)
    sets = image_networks.FrechetSets(found.clip)
    sets.add(pictures, {"same": pictures})
    assert sets.distances()["same"] == pytest.approx(0.0, abs=1e-3)


def test_inception_is_torch_fidelitys_from_safetensors(tmp_path: Path) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as library

    with (
        mock.patch.object(library, "load_state_dict_from_url", lambda *_, **__: {}),
        mock.patch.object(library.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        theirs = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    artifacts.save_tensors(tmp_path / "inception_v3.safetensors", theirs.state_dict(), {"format": "pt"})
    ours = image_networks.InceptionFeatures(tmp_path / "inception_v3.safetensors")
    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    assert torch.equal(ours(images), theirs(images)[0])
    artifacts.save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"format": "pt"})
    with pytest.raises(InvalidArtifactError, match="InceptionV3"):
        image_networks.InceptionFeatures(tmp_path / "other.safetensors")


# ---- pairs ----


def _row(
    name: str, head: str, *, source: str = "", yaw: float | None = 0.0, face: bool = True, sha: str = "", **more: Any
) -> dict[str, Any]:
    said = {"length": {"en": "long", "raw": "x"}, "bang": {"en": None, "raw": "y"}, "sex": {"en": "female", "raw": "z"}}
    return {"id": name, "group": head, "source": source or head, "phase": "after", "yaw": yaw, "face_box": [1, 1, 9, 9] if face else None,
            "sha256": sha or name, "curl": 1, "attributes": said, **more}  # fmt: skip


def _rows() -> list[dict[str, Any]]:
    return [_row(f"{head}-{view}", head, yaw=yaw) for head in "abcdef" for view, yaw in enumerate((0.0, 20.0, -45.0))]


def test_pairs_are_fixed_by_the_seed_and_stored(tmp_path: Path) -> None:
    rows, settings = _rows(), EvaluateConfig(samples=10, samples_reconstruction=8)
    drawn = pairs.draw(rows, settings)
    assert drawn == pairs.draw(rows, settings) != pairs.draw(rows, EvaluateConfig(samples=10, samples_reconstruction=8, seed=1))
    assert len(drawn.transfer) == 10 and len(drawn.reconstruction) == 8
    assert all(
        a.reference["group"] not in (b.reference["group"], a.target["group"]) for a, b in zip(drawn.shuffled, drawn.transfer, strict=True)
    )
    file = tmp_path / "pairs.json"
    artifacts.write_json(file, pairs.stored(drawn, settings, "digest"))
    assert pairs.read(file, rows) == drawn
    with pytest.raises(InvalidArtifactError, match="does not have"):
        pairs.read(file, rows[3:])
    with pytest.raises(InvalidArtifactError, match="protocol 'standard', asked for is 'hairfusion'"):
        pairs.read(file, rows, "hairfusion")
    content = artifacts.read_json(file)
    artifacts.write_json(file, {**content, "shuffled": content["shuffled"][::-1]})
    with pytest.raises(InvalidArtifactError, match="targets of 'shuffled'"):
        pairs.read(file, rows)
    file.write_text("[]")
    with pytest.raises(InvalidArtifactError, match="no stored pairs"):
        pairs.read(file, rows)


def test_a_reference_that_is_the_target_is_caught(tmp_path: Path) -> None:
    """A second copy of a photo is never drawn as its own truth, and stored pairs that hold one are refused."""
    rows = [*_rows(), *(_row(f"{head}-copy", head, sha=f"{head}-0") for head in "abcdef")]
    drawn = pairs.draw(rows, EvaluateConfig(samples=20, samples_reconstruction=20))
    assert all(pair.target["sha256"] != pair.reference["sha256"] for pair in drawn.reconstruction)
    file = tmp_path / "pairs.json"
    content = pairs.stored(drawn, EvaluateConfig(), "digest")
    for kind, pair, word in (
        ("reconstruction", ["a-0", "a-copy"], "target itself"),
        ("reconstruction", ["a-0", "b-1"], "one hairstyle"),
        ("transfer", ["a-0", "a-1"], "one head"),
    ):
        artifacts.write_json(file, {**content, kind: [pair, *content[kind][1:]]})
        with pytest.raises(InvalidArtifactError, match=word):
            pairs.read(file, rows)


def test_too_few_heads_are_named() -> None:
    with pytest.raises(MissingInputError, match="too few for pairs"):
        pairs.draw([row for row in _rows() if row["group"] == "a"], EvaluateConfig())


def test_hairfusions_protocol_keeps_to_its_yaws_and_counts() -> None:
    drawn = pairs.draw([*_rows(), _row("g-back", "g", face=False)], EvaluateConfig(protocol="hairfusion"))
    protocol = pairs.PROTOCOLS["hairfusion"]
    assert protocol.samples == 2000 and protocol.side == 512
    assert protocol.published == {"fid": 10.82, "ssim": 0.70, "psnr": 21.15, "lpips": 0.18}
    assert len(drawn.transfer) == 2000
    shown = [row for pair in (*drawn.transfer, *drawn.reconstruction) for row in (pair.target, pair.reference)]
    assert all(row["face_box"] and abs(row["yaw"]) <= 30 for row in shown)


def test_slices_and_pose_gaps() -> None:
    a, b = _row("a", "a", yaw=10.0), _row("b", "b", yaw=-10.0, curl=None)
    assert pairs.slices_of(pairs.Pair(a, b)) == {
        "curl": "unknown",
        "length": "long",
        "bangs": "y",
        "sex": "female",
        "yaw": "0 to 15 degrees",
        "pose": "medium",
    }
    gaps = [pairs.pose_gap(pairs.Pair(_row("t", "t", yaw=yaw), _row("r", "r"))) for yaw in (15.0, -16.0, 31.0, None)]
    assert gaps == ["easy", "medium", "hard", "unknown"]


def test_slices_carry_counts_and_gains_go_pair_by_pair() -> None:
    settings = EvaluateConfig(bootstrap=100)
    values = [(0.1, 0.3), (0.2, 0.25), (0.4, 0.9)]
    records = [
        figures.Record(
            pairs.Pair(_row(str(n), head, curl=0), _row(f"r{n}", "z", curl=n % 2)), {"ours": {"lpips": ours}, "bald": {"lpips": bald}}
        )
        for n, (head, (ours, bald)) in enumerate(zip("aab", values, strict=True))
    ]
    del records[2].values["bald"]["lpips"]
    found = figures.summarise(records, settings)
    assert found["ours"]["lpips"] == pytest.approx(0.7 / 3) and "lpips_n" not in found["ours"]
    assert found["bald"]["lpips_gain"] == pytest.approx((0.2 + 0.05) / 2) and found["bald"]["lpips_gain_n"] == 2
    cut = figures.sliced(records, ["lpips"], settings)["curl"]
    assert (cut["0"]["pairs"], cut["0"]["heads"], cut["1"]["pairs"]) == (2, 2, 1)
    assert cut["0"]["lpips"] == pytest.approx(0.25)


# ---- baselines ----


def _sample(name: str, photo: np.ndarray, hair: np.ndarray, box: tuple[float, float, float, float] | None) -> Sample:
    return Sample(name, photo, hair, np.zeros_like(hair), box, None, "")


def test_colour_transfer_takes_the_colour_and_nothing_else() -> None:
    target = _sample("t", (_noise(0) // 4 + 40).astype(np.uint8), _disc(), None)
    reference = _sample("r", (_noise(1) // 3 + [120, 90, 30]).astype(np.uint8), _disc(radius=25), None)
    made = baselines.colour_transfer(target, reference, 0.0)
    wanted = metrics.hair_colour(reference.photo, reference.hair)
    assert metrics.ciede2000(metrics.hair_colour(made, target.hair), wanted) < 2.0
    assert metrics.ciede2000(metrics.hair_colour(target.photo, target.hair), wanted) > 15.0
    assert np.array_equal(made[target.hair == 0], target.photo[target.hair == 0])


def test_crop_paste_lays_face_on_face() -> None:
    """The reference is the target at half the size and moved: pasted, its hair lies where the target's is."""
    hair = np.zeros((128, 128), np.uint8)
    hair[20:60, 40:90] = 255
    small = np.zeros_like(hair)
    small[10 + 10 : 10 + 30, 5 + 20 : 5 + 45] = 255
    target = _sample("t", np.full((128, 128, 3), 90, np.uint8), np.zeros_like(hair), (40.0, 30.0, 80.0, 70.0))
    photo = np.where(small[..., None] > 0, np.array([200, 20, 10]), 10).astype(np.uint8)
    reference = _sample("r", photo, small, (25.0, 25.0, 45.0, 45.0))
    bald, region = np.full((128, 128, 3), 50, np.uint8), np.full((128, 128), 255, np.uint8)
    made, laid = baselines.crop_paste(target, reference, bald, region, 0.0)
    overlap = ((laid > 0) & (hair > 0)).sum() / ((laid > 0) | (hair > 0)).sum()
    assert overlap > 0.85
    core = masks.shrink(laid, 3) > 0
    assert np.abs(made[core].astype(int) - [200, 20, 10]).max() <= 2
    assert np.array_equal(made[100:], target.photo[100:])


# ---- models that must not pass ----


class _StandIn:
    """Paints without a UNet: ``paint`` is given the requests and returns pictures. VAE and encoder are the world's own."""

    def __init__(self, config: Config, paint: Any) -> None:
        bundle = load_bundle(config.paths.bundle)
        vae = conditioning.load_vae(conditioning.inpainting_folder(config.paths.weights), device=torch.device("cpu"), dtype=torch.float32)
        self.texture_encoder = bundle.texture_encoder
        self.sampler = SimpleNamespace(vae=vae, model=bundle.model, placement=STAYS)
        self._paint = paint

    def paint(self, requests: Any, *, steps: int, guidance: float) -> torch.Tensor:
        return conditioning.to_tensor([self._paint(request) for request in requests])


def _bald(request: Any) -> np.ndarray:
    return request.head.bald


def _one_for_all(request: Any) -> np.ndarray:
    """The same brown stripes whatever the reference is."""
    stripes = np.where(np.arange(request.head.bald.shape[1]) // 3 % 2, 70, 110)[None, :, None] * np.array([1.0, 0.6, 0.4])
    return np.where(request.head.region[..., None] > 0, stripes, request.head.bald).astype(np.uint8)


@pytest.mark.long  # make test must stay well below its eight minutes
def test_models_without_skill_are_refused_and_figures_do_not_depend_on_the_threads(finished_world: World) -> None:
    config = finished_world.config(evaluate__workers=1)
    ignoring = _StandIn(config, _one_for_all)
    found = Evaluator(config, ignoring).run(lambda: _StandIn(config, _bald))  # the second as if it were in production
    verdict = gate.decide(found.figures, config.gate)
    against = " ".join(verdict["evidence"]["reasons"])
    assert not verdict["evidence"]["passed"] and "against shuffled_reference" in against and "the model ignores it" in against
    assert found.figures["baselines"]["shuffled_reference"]["mean_abs_change"] == 0.0
    assert {"lpips_gain", "masked_psnr_gain", "hair_color_delta_e_gain"} <= set(found.figures["deployed"])
    assert found.figures["outside_max_abs_diff"] == 0 and 0.0 <= found.figures["failure_rate"] <= 1.0

    other = finished_world.config(evaluate__workers=3)
    again = Evaluator(other, ignoring).run(lambda: _StandIn(config, _bald))
    assert json.dumps(again.figures, sort_keys=True) == json.dumps(found.figures, sort_keys=True)
    assert again.pairs == found.pairs

    bald = Evaluator(other, _StandIn(config, _bald)).run()
    assert bald.figures["baselines"]["bald"]["lpips_gain_ci"] == [0.0, 0.0]
    reasons = " ".join(gate.decide(bald.figures, config.gate)["evidence"]["reasons"])
    assert "no hair is painted" in reasons
    assert "reconstruction LPIPS against bald" in reasons and "way from the bald image" in reasons
    assert len(bald.transfer.first) == config.evaluate.pictures and bald.reconstruction.worst


SMALL = {"evaluate__samples": 2, "evaluate__samples_reconstruction": 2, "evaluate__steps": 1, "evaluate__pictures": 1}


@pytest.mark.long
def test_two_runs_of_a_trained_model_give_identical_figures(finished_world: World) -> None:
    """Through the UNet itself, read back from its file each time: another number of workers changes no bit, other batches the last digits."""

    def measured(**changes: object) -> dict[str, Any]:
        config = finished_world.config(**SMALL, **changes)
        return Evaluator(config, Painter.of_bundle(load_bundle(config.paths.bundle), config)).run().figures

    once = measured(evaluate__workers=1)
    assert json.dumps(measured(evaluate__workers=3), sort_keys=True) == json.dumps(once, sort_keys=True)
    alone = measured(evaluate__batch_size=1)
    assert alone["pairs_sha256"] == once["pairs_sha256"]
    for name in ("lpips", "masked_psnr", "hair_color_delta_e"):
        assert alone[name] == pytest.approx(once[name], rel=1e-3)


def test_a_model_that_paints_no_picture_fails_every_time(finished_world: World) -> None:
    config = finished_world.config(**SMALL)
    model = _StandIn(config, _bald)
    model.paint = lambda requests, **_: torch.full((len(requests), 3, 128, 128), torch.nan)  # type: ignore[method-assign]
    found = Evaluator(config, model).run()
    assert found.figures["failure_rate"] == 1.0 and found.figures["identity_kept"] == 0.0
    assert all(result.view.failed == "flat_output" for result in found.transfer.first) and found.transfer.failed
    reasons = gate.decide(found.figures, config.gate)["evidence"]["reasons"]
    assert any("100.0% of the results are no picture" in reason for reason in reasons)
    assert any("whatever the reference" in reason for reason in reasons)


@pytest.mark.long  # make test must stay well below its eight minutes
def test_hairfusions_protocol_runs_by_its_name_and_says_why_it_is_not_comparable(finished_world: World) -> None:
    few = dataclasses.replace(pairs.PROTOCOLS["hairfusion"], samples=3)
    with mock.patch.dict(pairs.PROTOCOLS, hairfusion=few):
        config = finished_world.config(**SMALL, evaluate__protocol="hairfusion")
        found = Evaluator(config, _StandIn(config, _one_for_all)).run().figures
    assert (found["protocol_name"], found["picture_side"], found["samples"]) == ("hairfusion", 512, 3)
    assert found["published"]["psnr"] == 21.15 and "fid" in found["absent"]
    why = " ".join(found["published"]["not_comparable"])
    assert "prepared at 128 px" in why and "'miniature'" in why


def test_a_measurement_that_was_stopped_goes_on_and_gives_the_same_figures(finished_world: World, tmp_path: Path) -> None:
    """Hours on a real card: what was painted is not painted again, and what is painted after the stop is what it would have been."""
    config = finished_world.config()
    stores = {"ours": PaintedStore(tmp_path / "ours")}
    asked: list[list[str]] = []

    class Counting(_StandIn):
        def paint(self, requests: Any, *, steps: int, guidance: float) -> torch.Tensor:
            if len(asked) == stop_at:
                raise KeyboardInterrupt
            asked.append([request.prompt for request in requests])
            return super().paint(requests, steps=steps, guidance=guidance)

    stop_at = -1
    whole = Evaluator(config, Counting(config, _one_for_all)).run()
    batches = len(asked)
    asked.clear()
    stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        Evaluator(config, Counting(config, _one_for_all), stores).run()
    stop_at = -1
    again = Evaluator(config, Counting(config, _one_for_all), stores).run()
    assert batches > 3 and len(asked) == batches, "two before the stop, and the rest after it"
    assert again.figures == whole.figures and again.records == whole.records
    asked.clear()
    assert Evaluator(config, Counting(config, _one_for_all), stores).run().figures == whole.figures and not asked
    next((tmp_path / "ours").glob("*.png")).unlink()
    assert Evaluator(config, Counting(config, _one_for_all), stores).run().figures == whole.figures
    assert len(asked) == 1 and len(asked[0]) > 1, "the whole batch of the one that was lost"
    stores["ours"].clear()
    assert not (tmp_path / "ours").exists()


def test_a_region_that_leaves_hair_out_is_caught(finished_world: World) -> None:
    config = finished_world.config()
    evaluator = Evaluator(config, _StandIn(config, _bald))
    real = conditioning.head_input

    def without(photo: Any, hair: Any, *rest: Any, **named: Any) -> conditioning.HeadInput:
        found = real(photo, hair, *rest, **named)
        return conditioning.HeadInput(np.where(hair > 0, 0, found.region).astype(np.uint8), found.bald, found.structure)

    with mock.patch.object(conditioning, "head_input", without), pytest.raises(InvalidArtifactError, match="leaves out"):
        evaluator.run()


def test_stored_pairs_are_evaluated_again(finished_world: World) -> None:
    """The report's own pairs.json, given back by name, makes the same pairs."""
    report = finished_world.root / "report"
    config = finished_world.config(evaluate__pairs=report / "pairs.json")
    rows = Prepared(config.paths.processed).rows(config.evaluate.split)
    stored = artifacts.read_json(report / "pairs.json")
    assert pairs.read(report / "pairs.json", rows) == pairs.draw(rows, config.evaluate)
    samples = artifacts.read_json(report / "samples.json")
    assert [[s["target"], s["reference"]] for s in samples["transfer"]] == stored["transfer"]
    whole = artifacts.read_json(report / "summary.json")
    assert gate.decide(whole["evaluation"], config.gate) == whole["gate"]  # the verdict is what its figures say
    summary = whole["evaluation"]
    mean = np.mean([s["figures"]["ours"]["hair_color_delta_e"] for s in samples["transfer"]])
    assert summary["hair_color_delta_e"] == pytest.approx(mean)
    assert {"lpips_alex", "clip_i", "dino_hair", "fid", "fid_clip"} <= set(summary["absent"])
