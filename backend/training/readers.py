"""What networks read from a result: where its hair is, how it curls, who it shows. The evaluation's measuring instruments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from backend.config import Config
from backend.imaging import patches
from backend.training.models.texture_encoder import TextureEncoder
from backend.training.texture_data import fit_patch, hair_windows, to_unit
from backend.training.training_face import FaceAnalyzer

Picture = NDArray[np.uint8]
Label = Literal["curl", "volume"]
VOLUME_PATCHES = 4  # patches looked at per picture


@torch.inference_mode()
def read_texture(
    encoder: TextureEncoder, pictures: Sequence[Picture], hair: Sequence[Picture], side: int, label: Label, *, patch: int = 128
) -> NDArray[np.int64]:
    """The class that Stage 1 sees in each picture's hair, (N,): curl 0..3 or volume 0..2; -1 where there is nothing to read.

    pictures: (S, S, 3) uint8 RGB; hair: (S, S) 0/255. Cut as Stage 1 learnt it, at ``side`` px (``texture.image_size``): curl from windows
    of the style picture, volume (the width of strands) from patches (``data.patch_size`` px) alone. A picture's class is the mean over them.
    """
    found = np.full(len(pictures), -1, np.int64)
    cuts = [_cuts(picture, mask, side, label, patch) for picture, mask in zip(pictures, hair, strict=True)]
    readable = [number for number, cut in enumerate(cuts) if len(cut)]
    for start in range(0, len(readable), 32):
        part = readable[start : start + 32]
        output = encoder(to_unit(torch.from_numpy(np.concatenate([cuts[n] for n in part]))).to(encoder.mean.device))
        shares = (output.curl_logits if label == "curl" else output.volume_logits).softmax(dim=1).cpu()
        found[part] = [int(piece.mean(dim=0).argmax()) for piece in shares.split([len(cuts[n]) for n in part])]
    return found


def _cuts(picture: Picture, hair: Picture, side: int, label: Label, patch: int) -> Picture:
    if not hair.any():
        return np.zeros((0, side, side, 3), np.uint8)
    if label == "curl":
        return hair_windows(patches.style_picture(picture, hair), side)
    windows = patches.cut_patches(picture, hair, size=patch, count=VOLUME_PATCHES, min_hair=0.85)
    return np.stack([fit_patch(one.image, side) for one in windows]) if windows else np.zeros((0, side, side, 3), np.uint8)


class FaceReader:
    """Finds faces in results, and says how alike they are by the identity network that the configuration names."""

    def __init__(self, config: Config) -> None:
        self._faces = FaceAnalyzer(config.paths.weights, config.identity_model)

    def embed(self, picture: Picture, landmarks: Sequence[Sequence[float]]) -> NDArray[np.float32]:
        """The identity in a head crop, (512,) of unit length. landmarks: five points in its pixels."""
        return self._faces.embed(picture, np.asarray(landmarks, np.float32))

    def sees_face(self, picture: Picture) -> bool:
        """Whether the detector finds a face in a head crop, (S, S, 3) uint8 RGB; small crops are enlarged for it."""
        scale = max(1.0, 256 / picture.shape[0])
        enlarged = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) if scale > 1 else picture
        return bool(self._faces.detect(np.asarray(enlarged, np.uint8)))


def different_people_p95(embeddings: NDArray[np.float32], people: Sequence[str]) -> float | None:
    """95th percentile of the similarity of photos of different people; None without such a pair. embeddings (N, 512), people (N,)."""
    names = np.asarray(people)
    other = names[:, None] != names[None]
    similarity = embeddings @ embeddings.T
    return float(np.quantile(similarity[other], 0.95)) if other.any() else None
