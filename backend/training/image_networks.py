"""Networks that only measure: CLIP (CLIP-I, FID_CLIP), DINOv2 (hair similarity) and Inception (FID), each from a local folder.

None of them is needed: where one is not there, its figures are left out and named as absent.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from backend import artifacts
from backend import weights as pretrained
from backend.config import EvaluateConfig
from backend.errors import InvalidArtifactError
from backend.training.models.perceptual import LpipsNet, load_alex
from backend.weights_load import load_network

Picture = NDArray[np.uint8]
FIGURES = {"lpips_alex": ("lpips_alex",), "clip_image": ("clip_i", "fid_clip"), "dino": ("dino_hair",), "fid_inception": ("fid",)}


class ImageEncoder(nn.Module):
    """A transformers vision model and its own preprocessing: pictures to vectors, (N, D) float32."""

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, CLIPVisionModelWithProjection, Dinov2Model

        model: Any = CLIPVisionModelWithProjection if kind == "clip_image" else Dinov2Model
        self.model = load_network(model, folder, "the network").eval().requires_grad_(False)
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InvalidArtifactError(f"the preprocessing in {folder} cannot be read: {error}") from error
        self.num_features = int(self.model.config.projection_dim if kind == "clip_image" else self.model.config.hidden_size)

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8 -> (B, D): CLIP's image embedding, or DINOv2's class token after the last norm."""
        pixels = self._processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
        output = self.model(pixel_values=pixels.to(self.model.device))
        return (output.image_embeds if hasattr(output, "image_embeds") else output.pooler_output).float()

    def embed(self, pictures: Sequence[Picture], batch: int = 16) -> NDArray[np.float32]:
        """(S, S, 3) uint8 RGB pictures -> (N, D) float32."""
        parts = [self(stacked(pictures[start : start + batch])).cpu().numpy() for start in range(0, len(pictures), batch)]
        return np.concatenate(parts)


class InceptionFeatures(nn.Module):
    """torch-fidelity's InceptionV3, which reproduces the network of the original FID (arXiv 1706.08500): 2048 pooled features."""

    num_features = 2048

    def __init__(self, path: Path) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        tensors = artifacts.load_tensors(path)
        try:
            with tempfile.TemporaryDirectory() as folder:  # the class takes its weights only as a file that torch.save wrote
                own = Path(folder) / "inception.pth"
                torch.save(tensors, own)
                self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(own))
        except RuntimeError as error:
            raise InvalidArtifactError(f"{path} is not torch-fidelity's InceptionV3: {error}") from error

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8 -> (B, 2048)."""
        features: torch.Tensor = self.network(images.to(next(self.network.buffers()).device))[0]
        return features


def stacked(pictures: Sequence[Picture]) -> torch.Tensor:
    """(S, S, 3) uint8 RGB pictures of one size as (B, 3, S, S) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


class FrechetSets:
    """The Frechet distance of each method's pictures to the real photos (arXiv 1706.08500), fed batch by batch."""

    def __init__(self, features: nn.Module) -> None:
        self._features = features
        self._metrics: dict[str, Any] = {}

    def add(self, real: Sequence[Picture], made: Mapping[str, Sequence[Picture]]) -> None:
        """Another batch: the real photos and each method's pictures, (S, S, 3) uint8 RGB of one size."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        known = self._features(stacked(real))
        for method, pictures in made.items():
            if method not in self._metrics:
                self._metrics[method] = FrechetInceptionDistance(feature=_AsTheyAre(known.shape[1]))
            self._metrics[method].update(known.cpu(), real=True)
            self._metrics[method].update(self._features(stacked(pictures)).cpu(), real=False)

    def distances(self) -> dict[str, float]:
        """The distance of each method; 0 for the same set, biased upward for small ones."""
        return {method: max(0.0, float(metric.compute())) for method, metric in self._metrics.items()}


class _AsTheyAre(nn.Module):
    """Features that have been computed already, so that the real photos pass the network once for all methods."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class MeasuringNetworks:
    """The optional networks that are wanted and there. ``absent``: figure -> why it is left out."""

    def __init__(self, folder: Path, settings: EvaluateConfig, device: torch.device) -> None:
        self.absent: dict[str, str] = {}
        wanted = {name: self._wanted(folder, name, settings) for name in FIGURES}
        path = pretrained.folder
        self.alex: LpipsNet | None = load_alex(folder).to(device) if wanted["lpips_alex"] else None
        self.clip = ImageEncoder(path(folder, "clip_image"), "clip_image").to(device) if wanted["clip_image"] else None
        self.dino = ImageEncoder(path(folder, "dino"), "dino").to(device) if wanted["dino"] else None
        inception = pretrained.files(folder, "fid_inception")[0]
        self.inception = InceptionFeatures(inception).to(device) if wanted["fid_inception"] else None

    def _wanted(self, folder: Path, name: str, settings: EvaluateConfig) -> bool:
        missing = pretrained.missing_files(folder, name)
        if name not in settings.networks:
            reason = "switched off by evaluate.networks"
        elif missing:
            reason = (
                f"no network: {', '.join(path.name for path in missing)} missing in {pretrained.folder(Path(), name)}/ below paths.weights"
            )
        else:
            return True
        self.absent |= dict.fromkeys(FIGURES[name], reason)
        return False
