"""The perceptual networks: VGG16, which the Gram loss and LPIPS share, and AlexNet for LPIPS beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from backend import artifacts, weights
from backend.errors import InvalidArtifactError

_VGG16 = (2, 2, 3, 3, 3)  # convolutions per block; the features are the last activation of each block
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # lpips v0.1: ImageNet's statistics for inputs in [-1, 1]


class LpipsNet(nn.Module):
    """What the LPIPS backbones share (arXiv 1801.03924, v0.1): inputs in [-1, 1], features, a linear head per feature. Frozen."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(1, width, 1, 1)) for width in widths])
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The feature maps of (B, 3, H, W) in [-1, 1], one per head."""
        raise NotImplementedError

    def lpips(self, image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """LPIPS of pictures in [-1, 1], (B, 3, H, W) each -> (B,)."""
        return self.distance(self.features(image), self.features(other))

    def distance(self, maps: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
        """LPIPS of pictures whose feature maps these are -> (B,)."""
        distance = torch.zeros(maps[0].shape[0], device=maps[0].device)
        for a, b, head in zip(maps, others, self.heads, strict=True):
            difference = (_unit(a) - _unit(b)).square()
            distance = distance + (difference * head).sum(dim=1).mean(dim=(1, 2))
        return distance


class PerceptualNet(LpipsNet):
    """The convolutions of VGG16 (arXiv 1409.1556) with LPIPS' heads.

    The widths are read from the weights, so the miniature's narrow network takes the same way as the real one.
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 512)) -> None:
        super().__init__(widths)
        blocks, channels = [], 3
        for width, count in zip(widths, _VGG16, strict=True):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(blocks)
        self.requires_grad_(False)

    @classmethod
    def from_tensors(cls, convolutions: dict[str, torch.Tensor], heads: dict[str, torch.Tensor]) -> PerceptualNet:
        """Built from torchvision's VGG16 names (``features.{i}.weight``) and lpips' (``lin{k}.model.1.weight``).

        Raises KeyError or RuntimeError when they are of another network.
        """
        indices = _convolution_indices()
        widths = tuple(convolutions[f"features.{block[-1]}.weight"].shape[0] for block in indices)
        network = cls(widths)
        with torch.no_grad():
            for block, numbers in zip(network.blocks, indices, strict=True):
                convolutions_here = [layer for layer in block.children() if isinstance(layer, nn.Conv2d)]
                for convolution, number in zip(convolutions_here, numbers, strict=True):
                    assert convolution.bias is not None  # built with one, above
                    convolution.weight.copy_(convolutions[f"features.{number}.weight"])
                    convolution.bias.copy_(convolutions[f"features.{number}.bias"])
        _fill_heads(network, heads)
        return network.eval()

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The five feature maps of (B, 3, H, W) in [-1, 1]."""
        current = (image - self.mean) / self.std
        maps = []
        for number, block in enumerate(self.blocks):
            current = block(F.max_pool2d(current, 2) if number else current)
            maps.append(current)
        return maps


class AlexNet(LpipsNet):
    """torchvision's AlexNet (arXiv 1404.5997) with LPIPS' heads: the backbone that papers report."""

    def __init__(self) -> None:
        from torchvision.models import alexnet

        super().__init__((64, 192, 384, 256, 256))
        with torch.device("meta"):  # its classifier has 58 million weights that nobody wants
            convolutions = alexnet().features[:-1]  # without the last pooling
        self.convolutions = convolutions.to_empty(device="cpu")
        self.requires_grad_(False)

    @classmethod
    def from_tensors(cls, convolutions: dict[str, torch.Tensor], heads: dict[str, torch.Tensor]) -> AlexNet:
        """Built from torchvision's AlexNet names (``features.{0,3,6,8,10}.weight``) and lpips'. Raises KeyError or RuntimeError."""
        network = cls()
        prefix = "features."
        wanted = {name.removeprefix(prefix): value for name, value in convolutions.items() if name.startswith(prefix)}
        network.convolutions.load_state_dict(wanted)
        _fill_heads(network, heads)
        return network.eval()

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """The five feature maps of (B, 3, H, W) in [-1, 1]; H and W of 31 at least."""
        current = (image - self.mean) / self.std
        maps = []
        for layer in self.convolutions.children():
            current = layer(current)
            if isinstance(layer, nn.ReLU):
                maps.append(current)
        return maps


@torch.no_grad()
def _fill_heads(network: LpipsNet, tensors: dict[str, torch.Tensor]) -> None:
    for k, head in enumerate(network.heads):
        head.copy_(tensors[f"lin{k}.model.1.weight"])


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def _convolution_indices() -> list[list[int]]:
    """torchvision's numbering of VGG16's convolutions: conv and ReLU in turn, a pooling after each block."""
    indices, position = [], 0
    for count in _VGG16:
        indices.append([position + 2 * k for k in range(count)])
        position += 2 * count + 1
    return indices


def load_perceptual(folder: Path) -> tuple[PerceptualNet, str]:
    """The network below ``paths.weights`` and the name on its card (``vgg16``, or ``miniature``).

    Raises MissingInputError when a file is not there, InvalidArtifactError when the network is not VGG16-shaped.
    """
    weights.require(folder, "perceptual")
    convolutions, heads = weights.files(folder, "perceptual")
    try:
        network = PerceptualNet.from_tensors(artifacts.load_tensors(convolutions), artifacts.load_tensors(heads))
    except (KeyError, RuntimeError) as error:
        raise InvalidArtifactError(f"the perceptual network in {convolutions.parent} is not VGG16-shaped: {error}") from error
    card = convolutions.with_name("card.json")  # the miniature's says so; the real network comes without one
    return network, str(artifacts.read_json(card).get("name", "vgg16")) if card.is_file() else "vgg16"


def load_alex(folder: Path) -> AlexNet:
    """LPIPS' AlexNet below ``paths.weights``. Raises MissingInputError or InvalidArtifactError as ``load_perceptual`` does."""
    weights.require(folder, "lpips_alex")
    convolutions, heads = weights.files(folder, "lpips_alex")
    try:
        return AlexNet.from_tensors(artifacts.load_tensors(convolutions), artifacts.load_tensors(heads))
    except (KeyError, RuntimeError) as error:
        raise InvalidArtifactError(f"the network in {convolutions.parent} is not AlexNet with LPIPS' heads: {error}") from error
