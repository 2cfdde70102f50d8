"""Trains the miniature face detector on rendered photos: whole frames, head crops, faces that fill the picture, several people.

Targets follow Generalized Focal Loss (arXiv 2006.04388) and the centre sampling of FCOS (arXiv 1904.01355): a face belongs to the
cells around its centre, on the one or two strides that suit its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from backend.demo import miniature, train_loop
from backend.demo.networks import DETECTOR_SIDE, DETECTOR_STRIDES, DFL_BINS, FaceDetectorNet
from backend.demo.training_data import Photo, Photos, jittered, relight
from backend.imaging import crop
from backend.training import keyed

SCHEDULE = train_loop.Schedule(steps=1400, batch_size=8, lr=2e-3, photos=1536, warmup=50, average=0.99, save_every=100)
LONG = train_loop.Schedule(steps=4000, batch_size=24, lr=2e-3, photos=6144, warmup=100, average=0.998, save_every=500)
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
    schedule = place.pick(SCHEDULE, LONG)
    photos = Photos(place.cache, "train", schedule.photos, workers=place.workers)
    net = FaceDetectorNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss_of(_: int, batch: train_loop.Batch) -> Tensor:
        images = batch["images"].permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(place.device.type, torch.bfloat16):  # on a CPU with AVX512-BF16 three times as fast as float32
            outputs = net(images)
        return detection_loss(outputs, batch)

    loss = train_loop.fit("detector", net, partial(_batch, photos, schedule.batch_size, place.seed), loss_of, schedule, place)
    miniature.write_detector(place.weights, net)
    return {"steps": schedule.steps, "loss": round(loss, 4), "photos": schedule.photos}


def _batch(photos: Photos, size: int, seed: int, step: int) -> train_loop.Batch:
    rng = keyed.numpy_generator(seed, "detector", step)
    canvases = [draw_canvas(photos, rng) for _ in range(size)]
    return {"images": torch.from_numpy(np.stack([canvas.image for canvas in canvases])), **targets(canvases)}


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
    if photo.box is not None and rng.random() < 0.35:
        photo = photo.with_blurred_face()
    image, box, points = photo.image, photo.box, photo.landmarks
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

_IGNORE, _NONE, _FACE = -1, 0, 1


def targets(canvases: list[Canvas]) -> train_loop.Batch:
    """What each cell should say. For each stride s: ``cells{s}`` (B, h, w) int8, a face 1, none 0, neither -1; ``faces{s}`` (B, h, w, 14)
    float32, the box (4) and landmarks (10) of its face in strides."""
    maps: train_loop.Batch = {}
    for stride in DETECTOR_STRIDES:
        side = DETECTOR_SIDE // stride
        centres = (np.arange(side) + 0.5) * stride
        cells = np.full((len(canvases), side, side), _NONE, np.int8)
        faces = np.zeros((len(canvases), side, side, 14), np.float32)
        low, high = _SIZES[stride]
        for b, canvas in enumerate(canvases):
            for (x0, y0, x1, y1), points in zip(canvas.boxes, canvas.landmarks, strict=True):
                across = np.abs(centres[None] - (x0 + x1) / 2)
                down = np.abs(centres[:, None] - (y0 + y1) / 2)
                distance = np.maximum(across, down) / stride
                cells[b][(distance < _IGNORED) & (cells[b] == _NONE)] = _IGNORE
                if low <= max(x1 - x0, y1 - y0) < high:
                    cells[b][distance < _REACH] = _FACE
                    faces[b][distance < _REACH] = np.concatenate([[x0, y0, x1, y1], points.ravel()]) / stride
        maps |= {f"cells{stride}": torch.from_numpy(cells), f"faces{stride}": torch.from_numpy(faces)}
    return maps


def detection_loss(outputs: tuple[Tensor, ...], batch: train_loop.Batch) -> Tensor:
    """Focal loss of the class over all cells; box distribution, box overlap and landmarks over the cells that are faces.

    outputs: those of FaceDetectorNet. batch: with the maps of ``targets``.
    """
    parts, hits = [], []
    for output, stride in zip(outputs, DETECTOR_STRIDES, strict=True):
        cells = output.float().permute(0, 2, 3, 1)  # (B, h, w, 80)
        state = batch[f"cells{stride}"]
        hits.append((state == _FACE).sum())
        parts.append((_focal(cells[..., 4 * DFL_BINS], state == _FACE) * (state != _IGNORE)).sum())
        parts.append(_face_terms(cells[state == _FACE], state == _FACE, batch[f"faces{stride}"][state == _FACE]).sum())
    return torch.stack(parts).sum() / torch.stack(hits).sum().clamp_min(1)


def _focal(logits: Tensor, positive: Tensor) -> Tensor:
    """Focal loss (arXiv 1708.02002) with gamma 2 and alpha 0.5."""
    target = positive.float()
    probability = torch.sigmoid(logits)
    miss = torch.where(positive, 1 - probability, probability)
    return 2.0 * miss.square() * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def _face_terms(cells: Tensor, positive: Tensor, faces: Tensor) -> Tensor:
    """Box and landmark losses (n,) of the cells (n, 80) that are faces (n, 14), where ``positive`` (B, h, w) says."""
    _, row, column = torch.nonzero(positive, as_tuple=True)
    boxes, points = faces[:, :4], faces[:, 4:].view(-1, 5, 2)
    centre = torch.stack([column, row], dim=1) + 0.5
    wanted = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], dim=1).clamp(0, DFL_BINS - 1.01)  # (n, 4)
    logits = cells[:, : 4 * DFL_BINS].reshape(-1, 4, DFL_BINS)
    below = wanted.floor().long()
    share = wanted - below
    entropy = -F.log_softmax(logits, dim=-1)
    distribution = (
        entropy.gather(2, below[..., None])[..., 0] * (1 - share) + entropy.gather(2, below[..., None] + 1)[..., 0] * share
    ).mean(1)
    distances = (logits.softmax(-1) * torch.arange(DFL_BINS, device=cells.device)).sum(-1)
    landmarks = cells[:, 4 * DFL_BINS + 1 :].reshape(-1, 5, 3)
    placed = landmarks[..., :2] * 2.0 + (centre - 0.5)[:, None]
    size = (boxes[:, 2:] - boxes[:, :2]).max(dim=1).values
    offset = F.smooth_l1_loss(placed, points, reduction="none", beta=0.5).mean(dim=(1, 2)) / size
    seen = F.binary_cross_entropy_with_logits(landmarks[..., 2], torch.ones_like(landmarks[..., 2]), reduction="none").mean(1)
    return 0.5 * distribution + 2.0 * (1 - _overlap(distances, wanted)) + 4.0 * offset + 0.1 * seen


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes given as distances (n, 4) from the same points."""
    shared = torch.minimum(first, second)
    areas = [(d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3]) for d in (first, second, shared)]
    return areas[2] / (areas[0] + areas[1] - areas[2] + 1e-6)
