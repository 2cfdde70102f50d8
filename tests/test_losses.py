"""Losses and metrics, against values worked out by hand and against other implementations."""

import dataclasses
import warnings
from types import SimpleNamespace

import lpips as reference_lpips
import numpy as np
import pytest
import torch

from backend.errors import UsageError
from backend.training import metrics
from backend.training.models.losses import (
    gram_distance,
    gram_matrix,
    mask_aware_loss,
    texture_consistency_loss,
)
from backend.training.models.perceptual import PerceptualNet
from backend.training.models.schedule import NoiseSchedule
from backend.training.stage2_data import Batches
from backend.training.stage2_step import Stage2Step
from backend.tryon import conditioning
from benchmarks.stage2_parts import SCHEDULER, SyntheticPrompts, random_vae
from tests.stage2_set import CPU, SAMPLES, SIZE, Toy, settings


def test_mask_aware_loss_by_hand() -> None:
    """Two channels, 2 x 2: one pixel inside (error 2 and 4), one outside (error 1, 1), one excluded, one exact."""
    prediction = torch.zeros(1, 2, 2, 2)
    noise = torch.tensor([[[[2.0, 1.0], [9.0, 0.0]], [[4.0, 1.0], [9.0, 0.0]]]])
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
    excluded = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]])
    # inside: mean(4, 16) = 10, weight 1; outside: 1, weight 0.1; exact: 0, weight 1
    expected = (10.0 * 1 + 1.0 * 0.1 + 0.0) / (1 + 0.1 + 1)
    loss = mask_aware_loss(prediction, noise, mask, excluded, outside_weight=0.1)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    weighted = mask_aware_loss(prediction, noise, mask, excluded, outside_weight=0.1, sample_weight=torch.tensor([0.5]))
    assert float(weighted) == pytest.approx(expected / 2, rel=1e-6)


def test_mask_aware_loss_does_not_grow_with_the_mask_or_the_channels() -> None:
    """The earlier attempt divided a 4-channel sum by a 1-channel mask: 4 times too large."""
    for channels, size in ((1, 4), (4, 8)):
        prediction, noise = torch.zeros(2, channels, 8, 8), torch.ones(2, channels, 8, 8)
        mask = torch.zeros(2, 1, 8, 8)
        mask[..., :size] = 1
        assert float(mask_aware_loss(prediction, noise, mask, torch.zeros_like(mask), outside_weight=0.0)) == pytest.approx(1.0)


def test_an_excluded_face_has_no_gradient() -> None:
    prediction = torch.zeros(1, 4, 4, 4, requires_grad=True)
    excluded = torch.zeros(1, 1, 4, 4)
    excluded[..., :2] = 1
    mask_aware_loss(prediction, torch.ones(1, 4, 4, 4), torch.ones(1, 1, 4, 4), excluded, outside_weight=1.0).backward()
    assert prediction.grad is not None
    assert (prediction.grad[..., :2] == 0).all() and (prediction.grad[..., 2:] != 0).all()


def _schedule(kind: str, alphas: list[float]) -> NoiseSchedule:
    """A schedule of len(alphas) timesteps with these cumulative alphas."""
    ratios = [now / before for now, before in zip(alphas, [1.0, *alphas[:-1]], strict=True)]
    return NoiseSchedule({"num_train_timesteps": len(alphas), "trained_betas": [1 - r for r in ratios], "prediction_type": kind})


ALL = torch.arange(3)
KINDS = ["epsilon", "v_prediction"]


def test_min_snr_by_hand() -> None:
    epsilon, velocity = (_schedule(kind, [0.9, 0.5, 0.1]) for kind in KINDS)  # SNR 9, 1, 1/9
    assert epsilon.min_snr_weight(ALL, 5.0).tolist() == pytest.approx([5 / 9, 1.0, 1.0], rel=1e-5)
    assert velocity.min_snr_weight(ALL, 5.0).tolist() == pytest.approx([5 / 10, 1 / 2, (1 / 9) / (10 / 9)], rel=1e-5)
    assert epsilon.min_snr_weight(ALL, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert _schedule("v_prediction", [0.5, 0.0]).min_snr_weight(torch.tensor([1]), 5.0).isfinite().all()  # zero terminal SNR


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_x0_inverts_the_noising(kind: str) -> None:
    x0, noise, schedule = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5), _schedule(kind, [0.9, 0.5, 0.05])
    noisy = schedule.add_noise(x0, noise, ALL)
    assert torch.allclose(schedule.predicted_x0(noisy, schedule.target(x0, noise, ALL), ALL), x0, atol=1e-5)


def test_noising_and_targets_by_hand() -> None:
    x0, noise, first = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0), torch.tensor([0])
    epsilon, velocity = (_schedule(kind, [0.64, 0.0]) for kind in KINDS)
    assert float(epsilon.add_noise(x0, noise, first)) == pytest.approx(0.8 * 2 + 0.6 * 3)
    assert float(epsilon.target(x0, noise, first)) == 3.0
    assert float(velocity.target(x0, noise, first)) == pytest.approx(0.8 * 3 - 0.6 * 2)
    assert float(velocity.target(x0, noise, torch.tensor([1]))) == -2.0  # pure noise: only the picture is left to predict


def test_a_prediction_type_that_is_not_trained_is_refused() -> None:
    with pytest.raises(UsageError, match="sample"):
        NoiseSchedule({"prediction_type": "sample"})


def test_gram_matrix_by_hand() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]])  # two channels, two pixels
    weight = torch.tensor([[[[1.0, 0.0]]]])  # the second pixel does not count
    assert gram_matrix(features, weight)[0].tolist() == [[0.5, 1.5], [1.5, 4.5]]  # outer((1,3)) / (1 pixel * 2 channels)


def test_gram_distance_by_hand_and_whatever_the_scale_of_the_features() -> None:
    wanted = [torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]]]), torch.full((1, 1, 1, 1), 2.0)]
    found = [torch.tensor([[[[2.0, 9.0]], [[3.0, 9.0]]]]), torch.full((1, 1, 1, 1), 1.0)]
    mask = torch.tensor([[[[1.0, 0.0]]]])
    # first layer: outer((2, 3)) - outer((1, 3)) = ((3, 3), (3, 0)), 27 of 16 + 36 + 36 + 81 and 1 + 9 + 9 + 81; second: (1 - 4)^2 of 1 + 16
    expected = (27 / (169 + 100) + 9 / 17) / 2
    assert float(gram_distance(found, wanted, mask)) == pytest.approx(expected)
    for scale in (1e-3, 1e3):
        assert float(gram_distance([scale * f for f in found], [scale * w for w in wanted], mask)) == pytest.approx(expected)


def _network(seed: int = 0) -> PerceptualNet:
    generator = torch.Generator().manual_seed(seed)
    network = PerceptualNet((4, 4, 6, 8, 8))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    for head in network.heads:
        head.data.abs_()
    return network


def test_texture_loss_is_zero_for_equal_pictures_and_its_gradient_reaches_the_picture() -> None:
    network, mask = _network(), torch.ones(1, 1, 32, 32)
    target = torch.rand(1, 3, 32, 32) * 2 - 1
    assert float(texture_consistency_loss(network, target, target, mask)) == 0.0
    image = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    loss = texture_consistency_loss(network, image, target, mask)
    loss.backward()
    assert float(loss) > 0
    assert image.grad is not None and float(image.grad.abs().max()) > 0


def test_the_texture_loss_reaches_the_unet_through_the_decoder_and_low_timesteps_alone() -> None:
    """Through the product's own step: predicted x0, a square of it decoded, Gram matrices beside the photo's own pixels."""
    toy = Toy(settings(preset="full-exact", batch_size=2, texture_every=1, texture_max_timestep=300))
    vae = random_vae(SIZE, CPU, torch.float32)
    step = Stage2Step(toy.config, toy.model, toy.optimizer, NoiseSchedule(SCHEDULER), vae=vae, perceptual=_network())

    def loss_at(timesteps: list[int]) -> torch.Tensor | None:
        batch = dataclasses.replace(toy.batches.batch("train", np.arange(2), 0), timesteps=torch.tensor(timesteps))
        return step._texture_loss(batch, *step.predict(batch))

    assert loss_at([300, 999]) is None
    loss = loss_at([299, 999])
    assert loss is not None
    loss.backward()
    gradients = {name: p.grad for name, p in toy.model.unet.named_parameters()}
    for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "conv_out.weight"):
        gradient = gradients[name]
        assert gradient is not None and float(gradient.abs().max()) > 0, name
    assert all(p.grad is None for p in vae.parameters())


def test_the_texture_loss_of_one_sample_at_a_time_is_that_of_all_together() -> None:
    """Half of the memory at batch 2: where blocks are recomputed, so is the decoder, sample by sample."""
    found = []
    for recompute in ("false", "true"):
        toy = Toy(settings(preset="full-exact", batch_size=2, texture_every=1, gradient_checkpointing=recompute))
        vae = random_vae(SIZE, CPU, torch.float32)
        step = Stage2Step(toy.config, toy.model, toy.optimizer, NoiseSchedule(SCHEDULER), vae=vae, perceptual=_network())
        batch = dataclasses.replace(toy.batches.batch("train", np.arange(2), 0), timesteps=torch.tensor([100, 200]))
        loss = step._texture_loss(batch, *step.predict(batch))
        assert loss is not None
        loss.backward()
        gradient = toy.model.unet.get_parameter("conv_out.weight").grad
        assert gradient is not None
        found.append((float(loss.detach()), gradient))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-6 * float(found[0][1].abs().max()))


def test_the_texture_squares_lie_where_the_hair_is_and_hold_the_photos_own_pixels() -> None:
    toy = Toy(settings(preset="full-exact", batch_size=4, texture_every=3, texture_crop=4))
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 64, 64, 3), dtype=np.uint8)
    hair = np.zeros((64, 64), np.uint8)
    hair[24:, 32:] = 255
    pictures = SimpleNamespace(get=lambda index: (pixels[index], hair))
    split = dataclasses.replace(toy.batches._splits["train"], pictures=pictures)
    batches = Batches(toy.config.train, {"train": split}, SyntheticPrompts(SIZE), timesteps=1000, device=CPU)
    assert batches.batch("train", np.arange(4), 4).textures is None and batches.batch("train", np.arange(4), 3, timestep=5).textures is None

    seen = set()
    for step in range(0, 60, 3):
        whole = batches.batch("train", np.array([5, 2, 7, 0]), step)
        textures = whole.textures
        assert textures is not None
        for row, (index, (top, left)) in enumerate(zip([5, 2, 7, 0], textures.corners, strict=True)):
            window = np.s_[8 * top : 8 * top + 32, 8 * left : 8 * left + 32]
            assert (hair[window] > 0).mean() >= 0.75
            assert np.array_equal(textures.hair[row, 0].numpy() > 0, hair[window] > 0)
            assert torch.equal(textures.picture[row], conditioning.to_tensor([pixels[index][window]])[0])
            seen.add((top, left))
        part = whole.split(2)[1].textures
        assert part is not None and part.corners == textures.corners[2:] and torch.equal(part.picture, textures.picture[2:])
        mine = batches.batch("train", np.array([5, 2, 7, 0]), step, rows=slice(2, 4)).textures
        assert mine is not None and mine.corners == textures.corners[2:]  # whatever the number of processes
    assert len(seen) > 2


def test_noise_offset_shifts_each_channel_of_each_sample_by_a_number_of_its_own() -> None:
    plain, shifted = (Toy(settings(noise_offset=o, batch_size=4)).batches.batch("train", np.arange(4), 7).noise for o in (0.0, 0.5))
    offset = (shifted - plain).flatten(2)
    assert torch.allclose(offset, offset[..., :1].expand_as(offset), atol=1e-6)
    assert len(offset[..., 0].unique()) == 16 and 0.1 < float(offset[..., 0].std()) < 1.0


def test_lpips_is_the_lpips_librarys() -> None:
    """Same weights, same pictures: VGG16 at full width through our code and through the reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = reference_lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    slices = [getattr(theirs.net, f"slice{k}") for k in range(1, 6)]
    layers = {int(name): layer for part in slices for name, layer in part.named_children() if hasattr(layer, "weight")}
    convolutions = {f"features.{n}.{kind}": getattr(layer, kind) for n, layer in layers.items() for kind in ("weight", "bias")}
    heads = {name: value for name, value in theirs.state_dict().items() if name.startswith("lin") and not name.startswith("lins")}
    ours = PerceptualNet.from_tensors(convolutions, heads)
    a, b = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(ours.lpips(a, b), theirs(a, b).flatten(), atol=1e-4)
        assert float(ours.lpips(a, a).abs().max()) == 0.0


def test_masked_psnr_by_hand() -> None:
    truth = np.zeros((4, 4, 3), np.uint8)
    picture = truth.copy()
    picture[:2] = 51  # a fifth of the range, inside the mask: MSE 0.04 -> 13.98 dB
    mask = np.zeros((4, 4), np.uint8)
    mask[:2] = 255
    assert metrics.masked_psnr(picture, truth, mask) == pytest.approx(13.979, abs=1e-3)
    assert metrics.masked_psnr(picture, truth, 255 - mask) == 100.0
    with pytest.raises(ValueError, match="empty mask"):
        metrics.masked_psnr(picture, truth, np.zeros_like(mask))


def test_ciede2000_is_sharmas() -> None:
    """Three rows of Sharma, Wu and Dalal's test table."""
    for one, other, expected in (
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
        ((6.7747, -0.2908, -2.4247), (5.8714, -0.0985, -2.2286), 0.6377),
    ):
        assert metrics.ciede2000(np.array(one), np.array(other)) == pytest.approx(expected, abs=1e-4)


def test_hair_colour_ignores_what_is_not_hair() -> None:
    picture = np.full((64, 64, 3), (0, 255, 0), np.uint8)
    hair = np.zeros((64, 64), np.uint8)
    hair[10:40, 10:50] = 255
    picture[hair > 0] = (119, 119, 119)
    assert metrics.hair_colour(picture, hair) == pytest.approx([50.03, 0.0, 0.0], abs=0.05)
    with pytest.raises(ValueError):
        metrics.hair_colour(picture, np.zeros_like(hair))


def test_outside_difference_sees_one_changed_byte() -> None:
    original, mask = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.float32)
    mask[0, 0] = 0.01
    changed = original.copy()
    changed[0, 0] = 200
    assert metrics.outside_max_abs_diff(changed, original, mask) == 0
    changed[5, 5, 1] = 3
    assert metrics.outside_max_abs_diff(changed, original, mask) == 3


def test_bootstrap_resamples_heads_not_photos() -> None:
    """Ten photos each of four heads: the interval is that of four values, far wider than that of forty."""
    values = [float(head) for head in range(4) for _ in range(10)]
    heads = [str(head) for head in range(4) for _ in range(10)]
    mean, (low, high) = metrics.mean_with_interval(values, heads, draws=2000, seed=0)
    assert mean == 1.5
    assert high - low > 1.5
    _, (low_photos, high_photos) = metrics.mean_with_interval(values, [str(n) for n in range(40)], draws=2000, seed=0)
    assert high_photos - low_photos < 0.8
    assert metrics.mean_with_interval(values, heads, draws=2000, seed=0) == (mean, [low, high])
