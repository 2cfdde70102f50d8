"""Faces: detection, alignment by five landmarks, identity (DESIGN 4.1 and 5.2).

One analyzer serves Stage 0, the evaluation and the app. The networks are ONNX files below ``paths.weights``: uniface's YOLOv8-Face and
AdaFace classes run them from there, so that nothing is downloaded and the miniature's files take the same way.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from backend import weights as pretrained
from backend.errors import InvalidArtifactError
from backend.imaging.crop import Box

if TYPE_CHECKING:
    from uniface import AdaFace, ArcFace, YOLOv8Face

IdentityModel = Literal["adaface", "insightface"]

PROVIDERS = ["CPUExecutionProvider"]  # two small networks; the card's memory belongs to the diffusion model
MIN_CONFIDENCE = 0.5


@dataclass(frozen=True)
class DetectedFace:
    """box and landmarks in the picture's pixels; landmarks (5, 2) float32: left eye, right eye, nose, mouth corners as seen."""

    box: Box
    confidence: float
    landmarks: NDArray[np.float32]

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def forgo_torch() -> None:
    """Tells this process never to import torch. uniface takes it for a faster NMS if it is there, which costs a Stage 0 worker 700 MB."""
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]


def _detector(path: Path) -> YOLOv8Face:
    from uniface import YOLOv8Face

    class LocalYOLOv8Face(YOLOv8Face):
        """YOLOv8Face on a file that is already here."""

        def __init__(self) -> None:
            self.confidence_threshold, self.nms_threshold = MIN_CONFIDENCE, 0.45
            self.input_size, self.max_det, self.nms_mode = 640, 50, "numpy"
            self.strides, self.providers = [8, 16, 32], PROVIDERS
            self._initialize_model(str(path))

    return LocalYOLOv8Face()


def _recognizer(path: Path, kind: IdentityModel) -> AdaFace | ArcFace:
    from uniface import AdaFace, ArcFace
    from uniface.recognition.base import BaseRecognizer, PreprocessConfig

    base = AdaFace if kind == "adaface" else ArcFace

    class LocalRecognizer(base):  # type: ignore[misc, valid-type]
        """The recognizer on a file that is already here."""

        def __init__(self) -> None:
            BaseRecognizer.__init__(self, model_path=str(path), preprocessing=PreprocessConfig(), providers=PROVIDERS)

    return LocalRecognizer()


def _session(path: Path, threads: int) -> Any:
    """A network with its number of threads, which uniface leaves to ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=PROVIDERS)


class FaceAnalyzer:
    """Finds faces and says who they are.

    weights: ``paths.weights``; identity: which of the two identity models; threads: of each network, 0 for one per core (where a process
    per core works, more than one thread each made all of them slower by a third). Raises MissingInputError when a file is not there,
    InvalidArtifactError when it is not the network it should be.
    """

    def __init__(self, weights: Path, identity: IdentityModel = "adaface", *, threads: int = 0) -> None:
        pretrained.require(weights, "face_detector", identity)
        self.identity: IdentityModel = identity
        paths = [pretrained.files(weights, name)[0] for name in ("face_detector", identity)]
        try:
            self._detector = _detector(paths[0])
            self._recognizer = _recognizer(paths[1], identity)
            if threads:
                for network, path in zip((self._detector, self._recognizer), paths, strict=True):
                    network.session = _session(path, threads)
        except (RuntimeError, ValueError) as error:
            raise InvalidArtifactError(f"a face network cannot be loaded from {paths[0].parent}: {error}") from error

    def detect(self, image: NDArray[np.uint8]) -> list[DetectedFace]:
        """All faces of an (H, W, 3) uint8 RGB picture, largest first."""
        found = self._detector.detect(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        faces = []
        for face in found:
            x0, y0, x1, y1 = (float(v) for v in face.bbox[:4])
            faces.append(DetectedFace((x0, y0, x1, y1), float(face.confidence), np.asarray(face.landmarks, np.float32)))
        return sorted(faces, key=lambda face: face.area, reverse=True)

    def embed(self, image: NDArray[np.uint8], landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
        """The identity of one face, (512,) float32 of unit length, after alignment to 112 x 112 by its landmarks."""
        raw = self._recognizer.get_embedding(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), landmarks).reshape(-1).astype(np.float32)
        norm = float(np.linalg.norm(raw))
        if raw.shape != (512,) or not np.isfinite(norm) or norm == 0.0:
            raise InvalidArtifactError(f"the identity network gave shape {raw.shape}, norm {norm}; 512 finite numbers are wanted")
        return raw / np.float32(norm)


def yaw_of(landmarks: NDArray[np.floating]) -> float:
    """Head pose from the five landmarks of a face: yaw in degrees, 0 frontal, positive towards the image's right, within -90..90.

    Under weak perspective the nose's tip moves across the line from eyes to mouth by its protrusion times sin(yaw), while the widths of
    eyes and mouth shrink by cos(yaw); NOSE_SHARE is the one over the other on a mean face (28 mm over the mean of 63 and 50 mm).
    landmarks: (5, 2), in the order of DetectedFace.
    """
    points = np.asarray(landmarks, np.float64)
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    down = mouth - eyes
    height = float(np.hypot(*down))
    if height == 0.0:
        return 0.0
    across = np.array([down[1], -down[0]]) / height
    middle = eyes + down * (((points[2] - eyes) @ down) / height**2)
    width = ((points[1] - points[0]) @ across + (points[4] - points[3]) @ across) / 2
    return float(np.degrees(np.arctan2((points[2] - middle) @ across, NOSE_SHARE * max(width, 0.0))))


NOSE_SHARE = 0.5


def is_blurred(image: NDArray[np.uint8], face: NDArray[np.uint8], hair: NDArray[np.uint8]) -> bool:
    """Whether a face was smoothed away, as inside ``polygon2`` of the released photos.

    Looks for fine detail (98th percentile of the absolute Laplacian of brightness) inside the face mask at one size of face: eyes, brows
    and lips have it, a smooth gradient has not, and at that size the noise of a large photo has gone. image (H, W, 3) uint8 RGB; masks
    (H, W) 0/255; hair is left out of the face.
    """
    x, y, width, height = cv2.boundingRect(face)
    window = np.s_[max(0, y - BORDER) : y + height + BORDER, max(0, x - BORDER) : x + width + BORDER]
    image, face, hair = image[window], face[window], hair[window]
    if not face.any():
        return True
    shrunk = min(1.0, FACE_SIDE / max(width, height))
    size = (max(1, round(face.shape[1] * shrunk)), max(1, round(face.shape[0] * shrunk)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    skin = cv2.resize(np.where(hair > 0, 0, face).astype(np.uint8), size, interpolation=cv2.INTER_AREA) == 255
    inside = cv2.erode(skin.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=2) > 0
    if inside.sum() < 64:
        return True
    detail = np.abs(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_32F, ksize=3))
    return float(np.percentile(detail[inside], 98)) < BLURRED_BELOW


BORDER = 4  # px kept around the face for the Laplacian and the erosion
FACE_SIDE = 128  # px, the size at which faces are compared
BLURRED_BELOW = 90.0  # grey levels; of 188 faces of rendered photos the blurred ones have 8 to 74, the intact ones 126 and more
