"""What the evaluation reads from results, and what its gate makes of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backend import artifacts
from backend.config import GateConfig
from backend.demo import architectures, compact
from backend.errors import InvalidArtifactError
from backend.training import gate, readers
from backend.training.models.stage2_unet import HairInpaintingUNet, load_start
from backend.training.models.texture_encoder import new_encoder


@pytest.mark.parametrize(("label", "classes"), [("curl", 4), ("volume", 3)])
def test_texture_is_read_where_there_is_hair_and_nowhere_else(label: readers.Label, classes: int) -> None:
    encoder = new_encoder((1, 1, 1, 1), dropout=0.0, seed=3).eval()
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(3)]
    hair = [np.zeros((96, 96), np.uint8) for _ in range(3)]
    hair[0][20:70, 30:60] = hair[2][10:50, 10:80] = 255
    found = readers.read_texture(encoder, pictures, hair, 64, label, patch=32)
    assert found[1] == -1 and set(found[[0, 2]]) <= set(range(classes))
    one = readers.read_texture(encoder, pictures[2:], hair[2:], 64, label, patch=32)
    assert one[0] == found[2]  # whatever else is in the batch
    if label == "curl":
        behind = [np.where(mask[..., None] > 0, picture, 9).astype(np.uint8) for picture, mask in zip(pictures, hair, strict=True)]
        assert (readers.read_texture(encoder, behind, hair, 64, label) == found).all()  # the background says nothing


def test_the_percentile_is_of_different_people_only() -> None:
    same, other = np.array([1.0, 0.0]), np.array([0.6, 0.8])
    embeddings = np.stack([same, same, same, other]).astype(np.float32)
    assert readers.different_people_p95(embeddings, ["a", "a", "a", "b"]) == pytest.approx(0.6)
    assert readers.different_people_p95(embeddings[:3], ["a", "a", "a"]) is None


def _figures() -> dict[str, Any]:
    """Figures that pass the evidence profile."""
    gains = {"lpips_gain": 0.1, "lpips_gain_ci": [0.05, 0.15], "masked_psnr_gain": 3.0, "masked_psnr_gain_ci": [2.0, 4.0]}
    colour = {"hair_color_delta_e": 20.0, "hair_color_delta_e_ci": [18.0, 22.0]}
    return {
        "heads": 9, "heads_reconstruction": 8,
        "outside_max_abs_diff": 0, "lpips": 0.1, "masked_psnr": 20.0, "hair_color_delta_e": 8.0, "hair_color_delta_e_ci": [7.0, 9.0],
        "hair_length_error": 0.4, "hair_length_error_ci": [0.3, 0.5], "failure_rate": 0.02, "failure_rate_ci": [0.0, 0.05],
        "curl_agreement": 0.7, "curl_agreement_ci": [0.6, 0.8], "identity_kept": 1.0, "identity_kept_ci": [1.0, 1.0], "identity_different_people_p95": 0.2,
        "ceiling_vae": {"curl_agreement": 0.8, "curl_agreement_ci": [0.7, 0.9], "lpips": 0.04, "masked_psnr": 25.0,
                        "masked_psnr_gain": -5.0, "masked_psnr_gain_ci": [-6.0, -4.0]},
        "baselines": {
            "no_op": dict(colour),
            "shuffled_reference": {**colour, **gains, "mean_abs_change": 9.0, "curl_agreement": 0.3, "curl_agreement_ci": [0.2, 0.4],
                                   "curl_agreement_gain": 0.4, "curl_agreement_gain_ci": [0.2, 0.6]},
            "bald": {**colour, **gains, "lpips": 0.4, "masked_psnr": 11.0},
            "no_conditioning": dict(gains), "crop_paste": dict(gains),
            "colour_transfer": {"hair_length_error": 0.9, "hair_length_error_gain": 0.5, "hair_length_error_gain_ci": [0.3, 0.7]},
        },
    }  # fmt: skip


def test_the_evidence_profile_passes_good_figures() -> None:
    verdict = gate.decide(_figures(), GateConfig(profile="evidence"))
    assert verdict["passed"] and verdict["evidence"]["reasons"] == [] and not verdict["forced"]
    assert not verdict["design"]["passed"]  # 20 dB is below 25: the other profile is computed all the same


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        (("heads",), 5, "transfer pairs are of 5 heads"),
        (("heads_reconstruction",), 1, "reconstruction pairs are of 1 heads"),
        (("outside_max_abs_diff",), 1, "outside"),
        (("baselines", "shuffled_reference", "mean_abs_change"), 0.0, "ignores it"),
        (("hair_color_delta_e_ci",), [7.0, 19.0], "no_op"),
        (("baselines", "shuffled_reference", "hair_color_delta_e_ci"), [8.9, 12.0], "shuffled"),
        (("baselines", "shuffled_reference", "curl_agreement_gain_ci"), [-0.01, 0.8], "curl"),
        (("baselines", "bald", "lpips_gain_ci"), [-0.01, 0.2], "bald"),
        (("baselines", "no_conditioning", "masked_psnr_gain_ci"), [0.0, 1.0], "no_conditioning"),
        (("baselines", "crop_paste", "lpips_gain_ci"), [-0.1, 0.1], "crop_paste"),
        (("baselines", "shuffled_reference", "lpips_gain_ci"), [-0.1, 0.1], "LPIPS against shuffled_reference"),
        (("baselines", "colour_transfer", "hair_length_error_gain_ci"), [-0.05, 0.7], "length"),
        (("failure_rate_ci",), [0.11, 0.3], "no face"),
        (("lpips",), 0.35, "way from the bald image"),
        (("masked_psnr",), 13.0, "way from the bald image"),
        (("lpips",), float("nan"), "way from the bald image"),
        (("failure_rate_ci",), [float("nan")] * 2, "no face"),
        (("hair_color_delta_e_ci",), [float("nan")] * 2, "no_op"),
        (("baselines", "bald", "masked_psnr_gain_ci"), [float("nan")] * 2, "PSNR in the hair against bald"),
        (("ceiling_vae", "masked_psnr_gain_ci"), [0.1, 0.3], "given its answer"),
    ],
)
def test_each_failing_figure_is_named(place: tuple[str, ...], value: object, word: str) -> None:
    figures = copy.deepcopy(_figures())
    holder = figures
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    if place == ("failure_rate_ci",):
        figures["failure_rate"] = 0.2 if value == [0.11, 0.3] else float("nan")
    verdict = gate.decide(figures, GateConfig(profile="evidence"))["evidence"]
    assert not verdict["passed"] and any(word in reason for reason in verdict["reasons"])


def test_lost_identities_are_noted_and_close_the_gate_when_most_are_lost() -> None:
    few, many = ({**_figures(), "identity_kept": kept, "identity_kept_ci": ends} for kept, ends in ((0.8, [0.7, 0.9]), (0.3, [0.2, 0.4])))
    few, many = (gate.decide(figures, GateConfig(profile="evidence"))["evidence"] for figures in (few, many))
    assert few["passed"] and "recognised" in few["notes"][0]
    assert not many["passed"] and "recognised" in many["reasons"][0]


@pytest.mark.parametrize(("name", "word"), [("failure_rate", "failures"), ("identity_kept", "identity"), ("curl_agreement", "curl")])
def test_what_could_not_be_judged_is_noted(name: str, word: str) -> None:
    figures = _figures()
    del figures[name]
    verdict = gate.decide(figures, GateConfig(profile="evidence"))["evidence"]
    assert verdict["passed"] and any(f"{word} was not judged" in note or f"{word} were not judged" in note for note in verdict["notes"])


def test_failures_above_the_cap_that_may_be_chance_are_noted() -> None:
    figures = {**_figures(), "failure_rate": 0.15, "failure_rate_ci": [0.02, 0.3]}
    verdict = gate.decide(figures, GateConfig(profile="evidence"))["evidence"]
    assert verdict["passed"] and "15.0%" in verdict["notes"][0]


@pytest.mark.parametrize(("name", "gain", "passed"), [("lpips", -0.009, True), ("lpips", -0.02, False), ("masked_psnr", -0.4, False), ("hair_color_delta_e", -0.6, False), ("lpips", float("nan"), False)])  # fmt: skip
def test_a_model_that_is_worse_than_the_deployed_one_is_refused_by_both_profiles(name: str, gain: float, passed: bool) -> None:
    theirs = {
        "lpips": 0.08,
        "lpips_gain": 0.0,
        "masked_psnr": 21.0,
        "masked_psnr_gain": 0.0,
        "hair_color_delta_e": 7.0,
        "hair_color_delta_e_gain": 0.0,
    }
    figures = {**_figures(), "masked_psnr": 26.0, "deployed": {**theirs, f"{name}_gain": gain}}
    figures["ceiling_vae"] |= {"masked_psnr": 30.0}
    for profile in ("design", "evidence"):
        verdict = gate.decide(figures, GateConfig(profile=profile))[profile]
        assert verdict["passed"] == passed
        assert passed or "worse than the deployed model's" in verdict["reasons"][0]


def test_a_comparison_that_could_not_be_made_is_noted() -> None:
    verdict = gate.decide({**_figures(), "deployed_not_compared": "the same weights"}, GateConfig(profile="evidence"))
    assert verdict["passed"] and any("the same weights" in note for note in verdict["design"]["notes"])


def test_curl_is_not_judged_where_the_vae_removes_it() -> None:
    figures = copy.deepcopy(_figures())
    figures["baselines"]["shuffled_reference"] |= {"curl_agreement_gain": 0.0, "curl_agreement_gain_ci": [-0.2, 0.2]}
    assert not gate.decide(figures, GateConfig(profile="evidence"))["passed"]
    figures["ceiling_vae"] |= {"curl_agreement": 0.35, "curl_agreement_ci": [0.3, 0.4]}
    verdict = gate.decide(figures, GateConfig(profile="evidence"))["evidence"]
    assert verdict["passed"] and "not judged" in verdict["notes"][0]


# ---- start weights ----


def test_eight_bits_keep_weights_to_half_a_step_and_small_tensors_to_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a.weight": torch.randn(32, 16, 3, 3) * torch.logspace(-4, 2, 32).view(-1, 1, 1, 1),
        "a.bias": torch.randn(32),
        "n": torch.tensor(7),
    }
    file, target = tmp_path / "w.safetensors", tmp_path / "out.safetensors"
    artifacts.save_tensors(file, tensors, {"format": "pt"})
    full = file.stat().st_size
    assert not compact.expand(file, target) and not target.exists()
    compact.squeeze(file)
    once = file.read_bytes()
    compact.squeeze(file)
    assert file.read_bytes() == once and len(once) < full / 2
    assert compact.expand(file, target)
    found = artifacts.load_tensors(target)
    assert set(found) == set(tensors) and artifacts.read_header(target)["format"] == "pt" and int(found["n"]) == 7
    assert torch.equal(found["a.bias"], tensors["a.bias"].half())
    step = tensors["a.weight"].flatten(1).abs().amax(1) / 127
    error = (found["a.weight"].float() - tensors["a.weight"]).flatten(1).abs().amax(1)
    assert (error <= 0.51 * step + 1e-3 * tensors["a.weight"].flatten(1).abs().amax(1)).all()


def test_a_start_fills_the_network_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, target = (HairInpaintingUNet(architectures.unet(), 16) for _ in range(2))
    file = tmp_path / "start.safetensors"
    artifacts.save_tensors(file, {name: tensor.half() for name, tensor in source.state_dict().items()}, {"format": "pt"})
    load_start(target, file)
    assert all(torch.equal(a, b.half().float()) for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True))
    with pytest.raises(InvalidArtifactError, match="does not fit"):
        load_start(HairInpaintingUNet(architectures.unet(), 1), file)
    broken = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    broken["injector.style_null"][:] = torch.nan
    artifacts.save_tensors(file, broken, {"format": "pt"})
    with pytest.raises(InvalidArtifactError, match="not finite"):
        load_start(target, file)
    with pytest.raises(InvalidArtifactError, match="missing"):
        load_start(target, tmp_path / "none.safetensors")
