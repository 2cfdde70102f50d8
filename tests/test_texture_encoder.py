"""The texture encoder: shapes, start weights, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from backend.errors import InvalidArtifactError
from backend.training.models.texture_encoder import EMBEDDING, TextureEncoder, blocks_of, new_encoder
from tests.texture_set import LAYERS, one_thread, world  # noqa: F401 (fixtures)


def test_shapes_and_pooling() -> None:
    encoder = new_encoder(LAYERS, dropout=0.2, seed=0).eval()
    images = torch.rand(2, 3, 128, 128)
    with torch.inference_mode():
        output, tokens, pooled = encoder(images), encoder.patch_tokens(images), encoder.encode(images)
    assert [tuple(t.shape) for t in output] == [(2, 2048), (2, 128), (2, 4), (2, 3), (2, 3, 4, 4)]
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
