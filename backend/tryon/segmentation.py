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


class HairParser:
    """Finds hair in a head crop. The class id comes from the model's own id2label, never from a constant."""

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
        self._device = device
        self._model = self._model.to(device).eval()

    @torch.no_grad()
    def hair(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The hair mask (H, W) uint8 0/255 of an (H, W, 3) uint8 RGB picture."""
        pixels = self._processor(images=image, return_tensors="pt")["pixel_values"].to(self._device)
        logits = self._model(pixel_values=pixels).logits.float()
        # hair against the best other class, enlarged as a soft value so that the outline is smooth at full resolution
        other = logits[0].clone()
        other[self._hair] = -torch.inf
        margin = (logits[0, self._hair] - other.amax(dim=0)).clamp(-20, 20).cpu().numpy()
        enlarged = cv2.resize(margin, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_LINEAR)
        return np.where(enlarged > 0, 255, 0).astype(np.uint8)
