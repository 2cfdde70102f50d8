"""Hair masks of photos without labels: SegFormer face parsing (DESIGN 5.3)."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from backend import weights as pretrained
from backend.errors import InvalidArtifactError
from backend.weights_load import load_network

SKIN = ("skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear", "ear_r", "mouth", "u_lip", "l_lip", "neck")
"""What is not clothes, background or hair, by CelebAMask-HQ's names."""


class HairParser:
    """Finds hair in a head crop. The class ids come from the model's own id2label, never from a constant."""

    def __init__(self, weights: Path, *, device: torch.device) -> None:
        from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

        pretrained.require(weights, "face_parser")
        folder = pretrained.folder(weights, "face_parser")
        self._model = load_network(SegformerForSemanticSegmentation, folder, "the face parser", dtype=torch.float32)
        try:
            self._processor = SegformerImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InvalidArtifactError(f"the face parser's preprocessing in {folder} cannot be read: {error}") from error
        ids = [number for number, label in self._model.config.id2label.items() if label.lower() == "hair"]
        if len(ids) != 1:
            raise InvalidArtifactError(f"the face parser in {folder} has {len(ids)} classes named 'hair'; exactly one is needed")
        self._hair = int(ids[0])
        self._skin = [int(number) for number, label in self._model.config.id2label.items() if label.lower() in SKIN]
        self._device = device
        self._model = self._model.to(device).eval()

    def hair(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The hair mask (H, W) uint8 0/255 of an (H, W, 3) uint8 RGB picture."""
        return self._mask(self._logits(image), [self._hair], image.shape)

    def hair_and_skin(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The masks of hair and of skin (face, ears and neck), (H, W) uint8 0/255 each, of an (H, W, 3) uint8 RGB picture."""
        logits = self._logits(image)
        return self._mask(logits, [self._hair], image.shape), self._mask(logits, self._skin, image.shape)

    @torch.no_grad()
    def _logits(self, image: NDArray[np.uint8]) -> torch.Tensor:
        pixels = self._processor(images=image, return_tensors="pt")["pixel_values"].to(self._device)
        return torch.as_tensor(self._model(pixel_values=pixels).logits[0].float())

    @staticmethod
    def _mask(logits: torch.Tensor, classes: list[int], shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Where one of these classes is the likeliest, (H, W) uint8 0/255."""
        if not classes:
            return np.zeros(shape[:2], np.uint8)
        # these classes against the best other one, enlarged as a soft value so that the outline is smooth at full resolution
        other = logits.clone()
        other[classes] = -torch.inf
        margin = (logits[classes].amax(dim=0) - other.amax(dim=0)).clamp(-20, 20).cpu().numpy()
        enlarged = cv2.resize(margin, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
        return (enlarged > 0).astype(np.uint8) * np.uint8(255)
