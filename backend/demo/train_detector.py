"""Trains the miniature face detector on rendered photos: whole frames, head crops, faces that fill the picture, several people.

Targets follow Generalized Focal Loss (arXiv 2006.04388) and the centre sampling of FCOS (arXiv 1904.01355): a face belongs to the
cells around its centre, on the one or two strides that suit its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from backend.demo import miniature, train_loop
from backend.demo.networks import DETECTOR_SIDE, DETECTOR_STRIDES, DFL_BINS, FaceDetectorNet
from backend.demo.portraits import blur_face
from backend.demo.training_data import Photo, Photos, face_ring, jittered, relight
from backend.imaging import crop
from backend.training import keyed

SCHEDULE = train_loop.Schedule(steps=1400, batch_size=8, lr=2e-3, warmup=50, average=0.99, save_every=100)
PHOTOS = 1536
_SIZES = {8: (0, 64), 16: (44, 190), 32: (150, 10_000)}
"""Longer side of the faces, in pixels of the 640 input, that each stride learns; neighbours overlap."""
_REACH = 1.0  # cells whose centre lies this many strides from the face's centre are faces
_IGNORED = 2.2  # and those up to this many are neither
_FILL = 114


@dataclass(frozen=True)
class Canvas:
    """A 640 x 640 input and its faces: image uint8 RGB, boxes (n, 4), landmarks (n, 5, 2) in its pixels."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    landmarks: NDArray[np.float32]


def train(place: train_loop.Workplace) -> dict[str, Any]:
    """Trains the detector, writes it to the workplace's ``weights`` folder and returns its card's entries."""
    photos = Photos(place.cache, "train", PHOTOS, workers=place.workers)
    net = FaceDetectorNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_of(step: int) -> Tensor:
        rng = keyed.numpy_generator(place.seed, "detector", step)
        canvases = [draw_canvas(photos, rng) for _ in range(SCHEDULE.batch_size)]
        images = torch.from_numpy(np.stack([canvas.image for canvas in canvases])).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):  # three times as fast as float32 where the CPU has AVX512-BF16
            outputs = net(images.float().div(255).contiguous(memory_format=torch.channels_last))
        return detection_loss(outputs, canvases)

    loss = train_loop.fit("detector", net, loss_of, SCHEDULE, place)
    miniature.write_detector(place.weights, net)
    return {"steps": SCHEDULE.steps, "loss": round(loss, 4), "photos": PHOTOS}


# ---- pictures ------------------------------------------------------------------


def draw_canvas(photos: Photos, rng: np.random.Generator) -> Canvas:
    """One, two or four photos on grey, as ``letterbox_resize`` would bring them."""
    tiles = (1, 2, 4)[int(rng.choice(3, p=[0.75, 0.15, 0.1]))]
    image = np.full((DETECTOR_SIDE, DETECTOR_SIDE, 3), _FILL, np.uint8)
    boxes, landmarks = [], []
    for k in range(tiles):
        width, height = (640, 640) if tiles == 1 else (320, 640) if tiles == 2 else (320, 320)
        picture, box, points = _region(photos[int(rng.integers(len(photos)))], width / height if tiles == 2 else None, rng)
        scale = min(width / picture.shape[1], height / picture.shape[0]) * (
            1.0 if tiles > 1 else float(rng.choice([1.0, rng.uniform(0.4, 1.0)]))
        )
        size = int(picture.shape[1] * scale), int(picture.shape[0] * scale)
        origin = np.array([(k % 2) * 320 + (width - size[0]) // 2, (k // 2) * 320 + (height - size[1]) // 2])
        resized = cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
        image[origin[1] : origin[1] + size[1], origin[0] : origin[0] + size[0]] = relight(resized, rng)
        if box is not None and points is not None:
            boxes.append(box * scale + np.tile(origin, 2))
            landmarks.append(points * scale + origin)
    return Canvas(image, np.array(boxes, np.float32).reshape(-1, 4), np.array(landmarks, np.float32).reshape(-1, 5, 2))


def _region(
    photo: Photo, aspect: float | None, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """A part of the photo, blurred or mirrored at times: the picture, and the face's box and landmarks in it."""
    image, box, points = photo.image, photo.box, photo.landmarks
    if box is not None and rng.random() < 0.35:
        image = blur_face(image, face_ring(box))
    frame = crop.Square(0, 0, image.shape[0])
    how = rng.random()
    if how < 0.4 or (box is None and how > 0.75):
        square = jittered(frame, rng, (0.8, 1.05), 0.06)
    elif how < 0.75:
        square = jittered(photo.square(), rng, (0.75, 1.5), 0.1)
    else:
        assert box is not None
        face = crop.Square(round(float(box[0])), round(float(box[1])), round(float(max(box[2:] - box[:2]))))
        square = jittered(face, rng, (1.5, 3.5), 0.25)
    picture = crop.crop_square(image, square)
    keep = aspect or float(rng.choice([1.0, rng.uniform(0.6, 1.6)]))
    margin = round(picture.shape[0] * (1 - min(keep, 1 / keep)) / 2)
    origin = np.array([square.x0, square.y0], np.float32)
    if keep < 1:
        picture, origin = picture[:, margin : picture.shape[1] - margin], origin + np.array([margin, 0], np.float32)
    elif keep > 1:
        picture = picture[: picture.shape[0] - 2 * margin]
    if box is None or points is None:
        return picture, None, None
    box, points = box - np.tile(origin, 2), points - origin
    if rng.random() < 0.5:
        picture, box, points = _mirrored(picture, box, points)
    height, width = picture.shape[:2]
    inside = np.clip(box, 0, [width, height, width, height])
    if (inside[2] - inside[0]) * (inside[3] - inside[1]) < 0.6 * (box[2] - box[0]) * (box[3] - box[1]):
        return np.full_like(picture, _FILL), None, None  # most of the face is cut off: neither a face nor none
    return picture, inside.astype(np.float32), points


def _mirrored(
    picture: NDArray[np.uint8], box: NDArray[np.float32], points: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    width = picture.shape[1]
    points = points[[1, 0, 2, 4, 3]]
    return (
        picture[:, ::-1],
        np.array([width - box[2], box[1], width - box[0], box[3]], np.float32),
        np.stack([width - points[:, 0], points[:, 1]], axis=1).astype(np.float32),
    )


# ---- loss ----------------------------------------------------------------------


def detection_loss(outputs: tuple[Tensor, ...], canvases: list[Canvas]) -> Tensor:
    """Focal loss of the class over all cells; box distribution, box overlap and landmarks over the cells that are faces."""
    total = torch.zeros(())
    hits = 0
    parts = []
    for output, stride in zip(outputs, DETECTOR_STRIDES, strict=True):
        cells = output.float().permute(0, 2, 3, 1)  # (B, h, w, 80)
        owner, counted = _assign(canvases, stride, cells.shape[1])
        positive = owner >= 0
        hits += int(positive.sum())
        parts.append(_focal(cells[..., 4 * DFL_BINS], positive)[counted].sum())
        if positive.any():
            parts.append(_face_terms(cells[positive], positive, owner[positive], canvases, stride).sum())
    for part in parts:
        total = total + part
    return total / max(hits, 1)


def _assign(canvases: list[Canvas], stride: int, side: int) -> tuple[Tensor, Tensor]:
    """For each cell the index of its face or -1, (B, side, side), and whether it counts in the class loss."""
    centres = (np.arange(side) + 0.5) * stride
    owner = np.full((len(canvases), side, side), -1, np.int64)
    counted = np.ones(owner.shape, bool)
    low, high = _SIZES[stride]
    for b, canvas in enumerate(canvases):
        for k, (x0, y0, x1, y1) in enumerate(canvas.boxes):
            across = np.abs(centres[None] - (x0 + x1) / 2)
            down = np.abs(centres[:, None] - (y0 + y1) / 2)
            distance = np.maximum(across, down) / stride
            suits = low <= max(x1 - x0, y1 - y0) < high
            counted[b][distance < _IGNORED] = False
            if suits:
                owner[b][distance < _REACH] = k
    counted |= owner >= 0
    return torch.from_numpy(owner), torch.from_numpy(counted)


def _focal(logits: Tensor, positive: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002) with gamma 2 and alpha 0.5."""
    target = positive.float()
    probability = torch.sigmoid(logits)
    miss = torch.where(positive, 1 - probability, probability)
    return 2.0 * miss.square() * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def _face_terms(cells: Tensor, positive: Tensor, owner: Tensor, canvases: list[Canvas], stride: int) -> Tensor:
    """Box and landmark losses of the cells that are faces, (n,)."""
    batch, row, column = torch.nonzero(positive, as_tuple=True)
    boxes = torch.from_numpy(np.stack([canvases[b].boxes[k] for b, k in zip(batch.tolist(), owner.tolist(), strict=True)])) / stride
    points = torch.from_numpy(np.stack([canvases[b].landmarks[k] for b, k in zip(batch.tolist(), owner.tolist(), strict=True)])) / stride
    centre = torch.stack([column, row], dim=1) + 0.5
    wanted = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], dim=1).clamp(0, DFL_BINS - 1.01)  # (n, 4)
    logits = cells[:, : 4 * DFL_BINS].reshape(-1, 4, DFL_BINS)
    below = wanted.floor().long()
    share = wanted - below
    entropy = -F.log_softmax(logits, dim=-1)
    distribution = (
        entropy.gather(2, below[..., None])[..., 0] * (1 - share) + entropy.gather(2, below[..., None] + 1)[..., 0] * share
    ).mean(1)
    distances = (logits.softmax(-1) * torch.arange(DFL_BINS)).sum(-1)
    landmarks = cells[:, 4 * DFL_BINS + 1 :].reshape(-1, 5, 3)
    placed = landmarks[..., :2] * 2.0 + (centre - 0.5)[:, None]
    size = (boxes[:, 2:] - boxes[:, :2]).max(dim=1).values
    offset = F.smooth_l1_loss(placed, points, reduction="none", beta=0.5).mean(dim=(1, 2)) / size
    seen = F.binary_cross_entropy_with_logits(landmarks[..., 2], torch.ones(()).expand_as(landmarks[..., 2]), reduction="none").mean(1)
    return 0.5 * distribution + 2.0 * (1 - _overlap(distances, wanted)) + 4.0 * offset + 0.1 * seen


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes given as distances (n, 4) from the same points."""
    shared = torch.minimum(first, second)
    areas = [(d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3]) for d in (first, second, shared)]
    return areas[2] / (areas[0] + areas[1] - areas[2] + 1e-6)
