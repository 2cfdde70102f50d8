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


def test_curl_is_read_where_there_is_hair_and_nowhere_else() -> None:
    encoder = new_encoder((1, 1, 1, 1), dropout=0.0, seed=3).eval()
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (96, 96, 3), dtype=np.uint8) for _ in range(3)]
    hair = [np.zeros((96, 96), np.uint8) for _ in range(3)]
    hair[0][20:70, 30:60] = hair[2][10:50, 10:80] = 255
    found = readers.read_curl(encoder, pictures, hair, 64)
    assert found[1] == -1 and set(found[[0, 2]]) <= {0, 1, 2, 3}
    behind = [np.where(mask[..., None] > 0, picture, 9).astype(np.uint8) for picture, mask in zip(pictures, hair, strict=True)]
    assert (readers.read_curl(encoder, behind, hair, 64) == found).all()  # the background says nothing


def test_the_percentile_is_of_different_people_only() -> None:
    same, other = np.array([1.0, 0.0]), np.array([0.6, 0.8])
    embeddings = np.stack([same, same, same, other]).astype(np.float32)
    assert readers.different_people_p95(embeddings, ["a", "a", "a", "b"]) == pytest.approx(0.6)
    assert readers.different_people_p95(embeddings[:3], ["a", "a", "a"]) is None


def _figures() -> dict[str, Any]:
    """Figures that pass the evidence profile."""
    gains = {"lpips_gain": 0.1, "lpips_gain_ci": [0.05, 0.15], "masked_psnr_gain": 3.0, "masked_psnr_gain_ci": [2.0, 4.0]}
    return {
        "outside_max_abs_diff": 0, "lpips": 0.1, "masked_psnr": 20.0, "hair_color_delta_e": 8.0, "hair_color_delta_e_ci": [7.0, 9.0],
        "curl_agreement": 0.7, "curl_agreement_ci": [0.6, 0.8], "identity_kept": 1.0, "identity_kept_ci": [1.0, 1.0], "identity_different_people_p95": 0.2,
        "ceiling_vae": {"curl_agreement": 0.8, "curl_agreement_ci": [0.7, 0.9]},
        "baselines": {
            "no_op": {"hair_color_delta_e": 20.0, "hair_color_delta_e_ci": [18.0, 22.0]},
            "shuffled_reference": {"hair_color_delta_e": 20.0, "hair_color_delta_e_ci": [18.0, 22.0], "curl_agreement": 0.3,
                                   "curl_agreement_ci": [0.2, 0.4]},
            "bald": dict(gains), "no_conditioning": dict(gains),
        },
    }  # fmt: skip


def test_the_evidence_profile_passes_good_figures() -> None:
    verdict = gate.decide(_figures(), GateConfig(profile="evidence"))
    assert verdict["passed"] and verdict["evidence"]["reasons"] == [] and not verdict["forced"]
    assert not verdict["design"]["passed"]  # 20 dB is below 25: the other profile is computed all the same


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        (("outside_max_abs_diff",), 1, "outside"),
        (("hair_color_delta_e_ci",), [7.0, 19.0], "no_op"),
        (("baselines", "shuffled_reference", "hair_color_delta_e_ci"), [8.9, 12.0], "shuffled"),
        (("baselines", "shuffled_reference", "curl_agreement_ci"), [0.2, 0.61], "curl"),
        (("baselines", "bald", "lpips_gain_ci"), [-0.01, 0.2], "bald"),
        (("baselines", "no_conditioning", "masked_psnr_gain_ci"), [0.0, 1.0], "no_conditioning"),
    ],
)
def test_each_failing_figure_is_named(place: tuple[str, ...], value: object, word: str) -> None:
    figures = copy.deepcopy(_figures())
    holder = figures
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    verdict = gate.decide(figures, GateConfig(profile="evidence"))["evidence"]
    assert not verdict["passed"] and any(word in reason for reason in verdict["reasons"])


def test_lost_identities_are_noted_and_close_the_gate_when_most_are_lost() -> None:
    few, many = ({**_figures(), "identity_kept": kept, "identity_kept_ci": ends} for kept, ends in ((0.8, [0.7, 0.9]), (0.3, [0.2, 0.4])))
    few, many = (gate.decide(figures, GateConfig(profile="evidence"))["evidence"] for figures in (few, many))
    assert few["passed"] and "recognised" in few["notes"][0]
    assert not many["passed"] and "recognised" in many["reasons"][0]


def test_curl_is_not_judged_where_the_vae_removes_it() -> None:
    figures = copy.deepcopy(_figures())
    figures |= {"curl_agreement": 0.3, "curl_agreement_ci": [0.2, 0.4]}
    assert not gate.decide(figures, GateConfig(profile="evidence"))["passed"]
    figures["ceiling_vae"] = {"curl_agreement": 0.35, "curl_agreement_ci": [0.3, 0.4]}
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
