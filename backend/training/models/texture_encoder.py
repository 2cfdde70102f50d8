"""Stage 1's network: a ResNet that reads a hair patch into one embedding, with a projection and two heads (DESIGN 4.2).

Run as a file, this is Stage 1 itself: ``python backend/training/models/texture_encoder.py --config configs/rtx3060.yaml``.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:  # run as a file: the checkout must be importable, this folder must not shadow libraries
    import importlib
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[3])
    raise SystemExit(importlib.import_module("backend.training.train_texture").main())

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet

from backend import artifacts
from backend.errors import InvalidArtifactError

FORMAT = "deephair-texture-1"
EMBEDDING, PROJECTION, TOKENS = 2048, 128, 16
CURL_CLASSES = ("straight", "wavy", "curly", "tightly curly")
VOLUME_CLASSES = ("low", "normal", "high")
HEADS = 2  # curl, volume: each has a dropout of its own

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TextureOutput(NamedTuple):
    """embedding (B, 2048); projection (B, 128), unit length; curl_logits (B, 4); volume_logits (B, 3); colour (B, 3, h, w), RGB in [0, 1]
    of each cell of the last feature map."""

    embedding: Tensor
    projection: Tensor
    curl_logits: Tensor
    volume_logits: Tensor
    colour: Tensor


class TextureEncoder(nn.Module):
    """ResNet -> 2048 -> projection of two layers (arXiv 2004.11362 section 3.1), heads for curl and volume, and one that reads colour.

    Images are (B, 3, H, W) RGB in [0, 1] on the encoder's device, of any size from 32 px; ImageNet's normalisation happens inside.
    It is an affine map of each channel, so colour reaches the features, which are all that Stage 2 learns of the reference's hair; since
    colour is no label, a linear head that must read it from every cell keeps it there.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: Sequence[int] = (3, 4, 6, 3), *, dropout: float = 0.2) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.dropout = dropout
        self.backbone = ResNet(Bottleneck, list(layers), num_classes=1)
        self.backbone.fc = nn.Identity()
        self.projection = nn.Sequential(nn.Linear(EMBEDDING, EMBEDDING), nn.ReLU(), nn.Linear(EMBEDDING, PROJECTION))
        self.curl_head = nn.Linear(EMBEDDING, len(CURL_CLASSES))
        self.volume_head = nn.Linear(EMBEDDING, len(VOLUME_CLASSES))
        self.colour_head = nn.Conv2d(EMBEDDING, 3, 1)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], layers: Sequence[int]) -> Self:
        """An encoder in eval mode, float32, on the CPU, from its own state. Raises InvalidArtifactError when it does not fit."""
        with torch.device("meta"):
            encoder = cls(layers)
        expected = encoder.state_dict()
        _refuse_mismatch(expected, tensors, f"texture encoder of layers {tuple(layers)}")
        own = {name: artifacts.aligned(_as_stored(tensors[name], like)) for name, like in expected.items()}
        encoder.load_state_dict(own, assign=True)
        encoder.mean, encoder.std = torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1), torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1)
        return encoder.eval()

    def features(self, images: Tensor) -> Tensor:
        """The last feature map, (B, 2048, ceil(H/32), ceil(W/32))."""
        net = self.backbone
        x = (images - self.mean) / self.std
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        return net.layer4(net.layer3(net.layer2(net.layer1(x))))  # type: ignore[no-any-return]

    def encode(self, images: Tensor) -> Tensor:
        """One embedding per image, (B, 2048): the mean of the last feature map."""
        return pooled(self.features(images))

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Sixteen embeddings per image, (B, 16, 2048): the last feature map pooled to 4x4, in reading order."""
        return tokens(self.features(images))

    def forward(self, images: Tensor, dropout_uniform: Tensor | None = None) -> TextureOutput:
        """All that Stage 1 trains. dropout_uniform: (B, 2, 2048) uniform in [0, 1), which decides what the heads' dropouts keep.

        The caller draws it, so that a run can be repeated exactly; without it, or in eval mode, nothing is dropped.
        """
        features = self.features(images)
        embedding = pooled(features)
        seen_by_curl = seen_by_volume = embedding
        if self.training and dropout_uniform is not None and self.dropout > 0:
            kept = (dropout_uniform >= self.dropout).to(embedding.dtype) / (1 - self.dropout)
            seen_by_curl, seen_by_volume = embedding * kept[:, 0], embedding * kept[:, 1]
        projection = functional.normalize(self.projection(embedding).float(), dim=1)
        return TextureOutput(
            embedding, projection, self.curl_head(seen_by_curl), self.volume_head(seen_by_volume), self.colour_head(features)
        )

    def load_backbone(self, path: Path) -> None:
        """Starts the ResNet from a file in torchvision's layout (``fc.*`` is ignored). Raises InvalidArtifactError when it does not fit."""
        tensors = {name: value for name, value in artifacts.load_tensors(path).items() if not name.startswith("fc.")}
        expected = self.backbone.state_dict()
        found = blocks_of(tensors)
        if found != self.layers:
            raise InvalidArtifactError(
                f"{path} holds a ResNet with blocks {found}, texture.layers asks for {self.layers}",
                hint="set texture.layers to the file's blocks, or put the weights of the wanted network there",
            )
        counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
        tensors = {**counters, **tensors}  # some exporters leave the counters out; they play no part
        _refuse_mismatch(expected, tensors, f"ResNet in {path}")
        self.backbone.load_state_dict({name: _as_stored(tensors[name], like) for name, like in expected.items()})


def pooled(features: Tensor) -> Tensor:
    """The embedding of a feature map (B, 2048, h, w): (B, 2048)."""
    return features.mean(dim=(2, 3))


def tokens(features: Tensor) -> Tensor:
    """The patch tokens of a feature map (B, 2048, h, w): (B, 16, 2048)."""
    return functional.adaptive_avg_pool2d(features, 4).flatten(2).transpose(1, 2)


def new_encoder(layers: Sequence[int], *, dropout: float, seed: int) -> TextureEncoder:
    """A freshly initialised encoder whose weights depend on ``seed`` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextureEncoder(layers, dropout=dropout)


def load_texture_encoder(path: Path) -> TextureEncoder:
    """The encoder that Stage 1 wrote, in eval mode, float32, on the CPU. Raises InvalidArtifactError for any other file."""
    header = artifacts.read_header(path)
    layers = header.get("layers")
    if header.get("format") != FORMAT or not isinstance(layers, list):
        raise InvalidArtifactError(
            f"{path} is not a texture encoder: its header says format {header.get('format')!r}, wanted {FORMAT!r}",
            hint="run 'deephair texture' to make it",
        )
    return TextureEncoder.from_tensors(artifacts.load_tensors(path), layers)


def blocks_of(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The number of bottlenecks in each of the four blocks of a state in torchvision's layout, for example (3, 4, 6, 3)."""
    seen: list[set[str]] = [set(), set(), set(), set()]
    for name in tensors:
        if match := re.match(r"layer([1-4])\.(\d+)\.", name):
            seen[int(match[1]) - 1].add(match[2])
    return tuple(map(len, seen))


def _as_stored(value: Tensor, like: Tensor) -> Tensor:
    """Half-precision files are widened; counters keep their integer type."""
    return value.to(like.dtype)


def _refuse_mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(found[name].shape)}, wanted {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    broken = [name for name in sorted(expected.keys() & found.keys()) if not bool(torch.isfinite(found[name]).all())]
    problems = [f"{label}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for label, names in (
        ("missing", missing), ("not known here", extra), ("wrong shape", shapes), ("not finite", broken),
    ) if names]  # fmt: skip
    if problems:
        raise InvalidArtifactError(f"the {what} does not fit; " + "; ".join(problems), hint="it belongs to another network or is damaged")
