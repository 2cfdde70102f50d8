"""The head-structure map and the ControlNet beside the UNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from backend.demo import architectures, miniature
from backend.errors import MissingInputError
from backend.imaging.structure import head_structure
from backend.tryon.steering import SteeredUNet, load_controlnet

BOX = (40.0, 40.0, 80.0, 90.0)
POINTS = np.array([[50, 58], [70, 58], [60, 70], [52, 80], [68, 80]], np.float32)


def test_the_map_shows_skull_face_and_features() -> None:
    drawn = head_structure(128, BOX, POINTS)
    assert drawn.shape == (128, 128, 3) and set(np.unique(drawn)) == {0, 255}
    assert drawn[65, 60].tolist() == [255, 255, 0]  # the middle of the face
    assert drawn[30, 60].tolist() == [255, 0, 0]  # above it only skull
    assert all(drawn[int(y), int(x), 2] == 255 for x, y in POINTS)
    assert drawn[5, 5].tolist() == [0, 0, 0]
    assert not head_structure(128, None, None).any()
    assert not head_structure(128, BOX, None)[..., 2].any()


def test_a_steered_unet_is_the_unet_plus_the_controlnets_residuals() -> None:
    torch.manual_seed(0)
    unet = architectures.unet().eval()
    control = architectures.controlnet(unet).eval()
    maps = torch.rand(2, 3, 128, 128)
    added = {"text_embeds": torch.zeros(4, 64), "time_ids": torch.zeros(4, 6)}
    latents, context = torch.randn(4, 9, 16, 16), torch.randn(4, 79, 128)
    with torch.no_grad():
        plain = unet(latents, 500, context, added_cond_kwargs=added).sample
        steered = SteeredUNet(unet, control, maps, 1.0)
        assert torch.equal(steered(latents, 500, encoder_hidden_states=context, added_cond_kwargs=added).sample, plain)  # zero convolutions
        for convolution in (*control.controlnet_down_blocks, control.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(convolution.weight, std=0.2)  # type: ignore[attr-defined]
        moved = steered(latents, 500, encoder_hidden_states=context, added_cond_kwargs=added).sample
        assert not torch.allclose(moved, plain, atol=1e-3)
        off = SteeredUNet(unet, control, maps, 0.0)(latents, 500, encoder_hidden_states=context, added_cond_kwargs=added).sample
        assert torch.allclose(off, plain, atol=1e-5)
        other = SteeredUNet(unet, control, maps.roll(1, 0), 1.0)(
            latents, 500, encoder_hidden_states=context, added_cond_kwargs=added
        ).sample
        assert not torch.allclose(other, moved, atol=1e-4)  # the map is read
    assert steered.config is unet.config and not list(steered.parameters())  # the UNet itself, registered nowhere twice


def test_a_controlnet_comes_from_the_weights_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="controlnet"):
        load_controlnet(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    miniature.create("controlnet", tmp_path)
    model = load_controlnet(tmp_path, device=torch.device("cpu"), dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())
