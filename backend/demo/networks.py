"""The plain networks of the miniature world: face detector, identity, perceptual net, bottleneck ResNet (DESIGN section 6).

The small ones are ordinary convolutional nets with the inputs and outputs of the real models. They are traced by
``backend.demo.onnx_graph``, so they use only the operations listed there. B batch, C channels, h/w feature map size.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DETECTOR_SIDE = 640
DETECTOR_STRIDES = (8, 16, 32)
DFL_BINS = 16
"""Distances to a box's four sides are distributions over 0..15 strides (Generalized Focal Loss, arXiv 2006.04388)."""
DETECTOR_CHANNELS = 4 * DFL_BINS + 1 + 15
IDENTITY_SIDE = 112
IDENTITY_WIDTH = 512
VGG_WIDTHS = (8, 16, 32, 64, 64)
VGG_DEPTHS = (2, 2, 3, 3, 3)
RESNET_LAYERS = (1, 1, 1, 1)


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, batch norm, SiLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, C, h, w) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_block(channels, channels), conv_block(channels, channels))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features)


class FaceDetectorNet(nn.Module):
    """A small one-class detector in the output layout of YOLOv8-face.

    Input (B, 3, 640, 640) RGB in 0..1. Three outputs (B, 80, h, w) at strides 8, 16 and 32: 64 logits of box distances (left, top,
    right, bottom, 16 bins each), 1 class logit, 5 landmarks as (x, y, visibility logit) where position = (2 * value + cell) * stride.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_block(3, 8, 2), conv_block(8, 16, 2))
        self.stage8 = nn.Sequential(conv_block(16, 32, 2), ResidualBlock(32))
        self.stage16 = nn.Sequential(conv_block(32, 64, 2), ResidualBlock(64))
        self.stage32 = nn.Sequential(conv_block(64, 96, 2), ResidualBlock(96), ResidualBlock(96))
        self.lateral32 = nn.Conv2d(96, 48, 1)
        self.lateral16 = nn.Conv2d(64, 48, 1)
        self.lateral8 = nn.Conv2d(32, 48, 1)
        self.heads = nn.ModuleList(nn.Sequential(conv_block(48, width), nn.Conv2d(width, DETECTOR_CHANNELS, 1)) for width in (32, 48, 64))
        for head in self.heads:
            # Prior probability of a face in a cell 0.007, as RetinaNet starts (arXiv 1708.02002): an untrained detector finds nothing.
            nn.init.constant_(head[1].bias[4 * DFL_BINS], -5.0)  # type: ignore[index]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stride8 = self.stage8(self.stem(images))
        stride16 = self.stage16(stride8)
        top = self.lateral32(self.stage32(stride16))
        middle = self.lateral16(stride16) + F.interpolate(top, scale_factor=2.0, mode="nearest")
        bottom = self.lateral8(stride8) + F.interpolate(middle, scale_factor=2.0, mode="nearest")
        return self.heads[0](bottom), self.heads[1](middle), self.heads[2](top)


class IdentityNet(nn.Module):
    """Aligned face (B, 3, 112, 112), BGR in -1..1, to an embedding (B, 512) that is not normalised, as AdaFace's ONNX gives it."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 96)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *widths), widths, strict=False):
            layers += [conv_block(inputs, outputs, 2), ResidualBlock(outputs)]
        self.features = nn.Sequential(*layers)
        # The face is aligned, so a position means a feature of the face: the head keeps positions instead of averaging them.
        self.squeeze = conv_block(widths[-1], 12)
        self.embed = nn.Linear(12 * (IDENTITY_SIDE // 2 ** len(widths)) ** 2, IDENTITY_WIDTH)

    def forward(self, faces: Tensor) -> Tensor:
        return self.embed(torch.flatten(self.squeeze(self.features(faces)), 1))  # type: ignore[no-any-return]


def vgg_features(widths: tuple[int, ...] = VGG_WIDTHS, *, batch_norm: bool = False) -> nn.Sequential:
    """The thirteen convolutions of VGG16 (arXiv 1409.1556) with torchvision's numbering, at any widths of its five blocks.

    batch_norm: one after each convolution, as torchvision's ``vgg16_bn``, which has its own numbering.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for width, depth in zip(widths, VGG_DEPTHS, strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), *([nn.BatchNorm2d(width)] if batch_norm else []), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2, 2))
    features = nn.Sequential(*layers)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return features


def lpips_heads(widths: tuple[int, ...] = VGG_WIDTHS) -> dict[str, Tensor]:
    """Uniform LPIPS weights in the names of lpips v0.1: the distance is then the mean over the five layers of 1 - cosine.

    Of unit vectors a and b, sum((a - b)^2) = 2 (1 - cos), so each of the five layers weighs 0.1.
    """
    return {f"lin{k}.model.1.weight": torch.full((1, width, 1, 1), 0.1) for k, width in enumerate(widths)}


def resnet(layers: tuple[int, int, int, int] = RESNET_LAYERS) -> dict[str, Tensor]:
    """A bottleneck ResNet's tensors in torchvision's names, without the classifier; 2048 channels at the end, as ResNet50."""
    from torchvision.models.resnet import Bottleneck, ResNet

    tensors: OrderedDict[str, Tensor] = ResNet(Bottleneck, list(layers)).state_dict()
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
