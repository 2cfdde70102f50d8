"""What networks read from a result: where its hair is, how it curls, who it shows. The evaluation's measuring instruments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from backend.config import Config
from backend.imaging import patches
from backend.training.models.texture_encoder import TextureEncoder
from backend.training.texture_data import WINDOWS, hair_windows, to_unit
from backend.training.training_face import FaceAnalyzer

Picture = NDArray[np.uint8]


@torch.inference_mode()
def read_curl(encoder: TextureEncoder, pictures: Sequence[Picture], hair: Sequence[Picture], side: int) -> NDArray[np.int64]:
    """The curl class (0..3) that Stage 1 sees in each picture's hair, (N,); -1 where there is none.

    pictures: (S, S, 3) uint8 RGB; hair: (S, S) 0/255. The hair is cut out as a style picture, and its windows are looked at as Stage 1
    learnt to, at ``side`` px (``texture.image_size``).
    """
    found = np.full(len(pictures), -1, np.int64)
    visible = [number for number, mask in enumerate(hair) if mask.any()]
    for start in range(0, len(visible), 32):
        part = visible[start : start + 32]
        cuts = np.concatenate([hair_windows(patches.style_picture(pictures[number], hair[number]), side) for number in part])
        shares = encoder(to_unit(torch.from_numpy(cuts)).to(encoder.mean.device)).curl_logits.softmax(dim=1)
        found[part] = shares.view(len(part), WINDOWS, -1).mean(dim=1).argmax(dim=1).cpu().numpy()
    return found


class IdentityReader:
    """Similarities of faces by the identity network that the configuration names."""

    def __init__(self, config: Config) -> None:
        self._faces = FaceAnalyzer(config.paths.weights, config.identity_model)

    def embed(self, picture: Picture, landmarks: Sequence[Sequence[float]]) -> NDArray[np.float32]:
        """The identity in a head crop, (512,) of unit length. landmarks: five points in its pixels."""
        return self._faces.embed(picture, np.asarray(landmarks, np.float32))


def different_people_p95(embeddings: NDArray[np.float32], people: Sequence[str]) -> float | None:
    """95th percentile of the similarity of photos of different people; None without such a pair. embeddings (N, 512), people (N,)."""
    names = np.asarray(people)
    other = names[:, None] != names[None]
    similarity = embeddings @ embeddings.T
    return float(np.quantile(similarity[other], 0.95)) if other.any() else None
