"""How well the trained miniature parts do on heads that were never trained on, through the classes that the product uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from backend.demo import architectures
from backend.demo.portraits import HAIR, blur_face
from backend.demo.training_data import Photo, face_ring, head_crop
from backend.training.training_face import FaceAnalyzer
from backend.weights import folder


def overlap(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    shared = np.clip(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2]), 0, None).prod()
    return float(shared / ((first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - shared))


def detector(weights: Path, photos: Iterable[Photo]) -> dict[str, Any]:
    """Recall at IoU 0.5 of frames, of frames with a blurred face and of head crops; false faces on views without one.

    ``landmark_error`` is the mean distance of the five landmarks over the longer side of the face box.
    """
    faces = FaceAnalyzer(weights)
    found: dict[str, list[bool]] = {"frame": [], "blurred": [], "head_crop": []}
    false, errors, missed_yaw = [], [], []
    for photo in photos:
        if photo.box is None:
            false.append(bool(faces.detect(photo.image)))
            continue
        square = photo.square()
        cut, _ = head_crop(photo, square, 256)
        pictures = {
            "frame": (photo.image, photo.box),
            "blurred": (blur_face(photo.image, face_ring(photo.box)), photo.box),
            "head_crop": (cut, np.array(square.scaled_box(tuple(map(float, photo.box)), 256))),  # type: ignore[arg-type]
        }
        for name, (image, box) in pictures.items():
            best = max(faces.detect(image), key=lambda face: overlap(np.array(face.box), box), default=None)
            hit = best is not None and overlap(np.array(best.box), box) >= 0.5
            found[name].append(hit)
            if not hit:
                missed_yaw.append(round(photo.view.yaw))
            if name == "frame" and best is not None and photo.landmarks is not None:
                errors.append(float(np.linalg.norm(best.landmarks - photo.landmarks, axis=1).mean() / max(box[2:] - box[:2])))
    return {
        **{f"recall_{name}": round(float(np.mean(values)), 4) for name, values in found.items()},
        "faces": len(found["frame"]),
        "false_faces_on_backs": round(float(np.mean(false)), 4) if false else None,
        "backs": len(false),
        "landmark_error": round(float(np.mean(errors)), 4) if errors else None,
        "missed_yaw": sorted(missed_yaw),
    }


def parser(weights: Path, photos: Iterable[Photo], side: int = 128) -> dict[str, Any]:
    """Hair IoU and face IoU (skin and all features) on head crops of ``side`` px, and the mean over photos of hair IoU."""
    from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

    source = folder(weights, "face_parser")
    model = SegformerForSemanticSegmentation.from_pretrained(source, local_files_only=True, dtype=torch.float32).eval()
    processor = SegformerImageProcessor.from_pretrained(source, local_files_only=True)
    hair_id = next(index for index, name in model.config.id2label.items() if name == "hair")
    hair, face = np.zeros(2), np.zeros(2)
    each = []
    for photo in photos:
        image, truth = head_crop(photo, photo.square(), side)
        with torch.no_grad():
            logits = model(**processor(image, return_tensors="pt")).logits
        labels = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=False).argmax(1)[0].numpy()
        pair = _areas(labels == hair_id, truth == hair_id)
        hair += pair
        each.append(pair[0] / max(pair[1], 1))
        face += _areas((labels >= 1) & (labels <= 12), (truth >= 1) & (truth <= 12))
    return {
        "hair_iou": round(hair[0] / hair[1], 4),
        "hair_iou_photo_mean": round(float(np.mean(each)), 4),
        "face_iou": round(face[0] / face[1], 4),
        "photos": len(each),
    }


def _areas(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.array([(found & truth).sum(), (found | truth).sum()], dtype=np.float64)


def identity(weights: Path, photos: Iterable[Photo], *, max_yaw: float = 45.0) -> dict[str, Any]:
    """Similarity of the same person's photos against other people's, aligned by the true landmarks, up to ``max_yaw`` degrees.

    ``tpr_at_5_fpr``: share of same-person pairs above the 95th percentile of different-person pairs.
    """
    faces = FaceAnalyzer(weights)
    embeddings, people = [], []
    for photo in photos:
        if photo.landmarks is not None and abs(photo.view.yaw) <= max_yaw:
            embeddings.append(faces.embed(photo.image, photo.landmarks))
            people.append(photo.view.identity.seed)
    similarity = np.array(embeddings) @ np.array(embeddings).T
    same = np.array(people)[:, None] == np.array(people)[None]
    upper = np.triu(np.ones_like(same), 1).astype(bool)
    equal, other = similarity[same & upper], similarity[~same & upper]
    threshold = float(np.quantile(other, 0.95))
    return {
        "tpr_at_5_fpr": round(float((equal > threshold).mean()), 4),
        "same_mean": round(float(equal.mean()), 4),
        "different_mean": round(float(other.mean()), 4),
        "different_p95": round(threshold, 4),
        "same_pairs": len(equal),
        "different_pairs": len(other),
    }


def vae(weights: Path, photos: Iterable[Photo]) -> dict[str, Any]:
    """PSNR of reconstructed head crops at 128 px in dB, over the whole picture and inside the hair (means over photos)."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(folder(weights, "inpainting") / "vae", local_files_only=True).eval()
    whole, hair, latents = [], [], []
    for photo in photos:
        image, parsing = head_crop(photo, photo.square(), architectures.IMAGE_SIDE)
        tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float().div(127.5).sub(1)
        with torch.no_grad():
            mean = model.encode(tensor).latent_dist.mode()
            decoded = model.decode(mean).sample
        latents.append(mean)
        error = ((decoded.clamp(-1, 1) - tensor) / 2).square().mean(1)[0].numpy()
        whole.append(-10 * np.log10(error.mean()))
        if (parsing == HAIR).any():
            hair.append(-10 * np.log10(error[parsing == HAIR].mean()))
    scaled = torch.cat(latents) * model.config.scaling_factor
    return {
        "psnr": round(float(np.mean(whole)), 3),
        "psnr_worst": round(float(np.min(whole)), 3),
        "psnr_hair": round(float(np.mean(hair)), 3),
        "scaled_latent_std": round(float(scaled.std()), 3),
        "scaled_latent_mean": round(float(scaled.mean()), 3),
        "photos": len(whole),
    }


def perceptual(weights: Path, photos: Sequence[Photo]) -> dict[str, Any]:
    """Whether the distance orders what it should: a photo is nearer to its slightly changed self than to its strongly changed self,
    to the same hairstyle than to another one's (share of correct orders; 0.5 is chance)."""
    from safetensors.torch import load_file

    from backend.demo.networks import vgg_features
    from backend.demo.train_pictures import normalised

    source = folder(weights, "perceptual")
    features = vgg_features().eval()
    features.load_state_dict({key.removeprefix("features."): value for key, value in load_file(source / "model.safetensors").items()})
    heads = [load_file(source / "lpips_heads.safetensors")[f"lin{k}.model.1.weight"] for k in range(5)]
    crops = [head_crop(photo, photo.square(), architectures.IMAGE_SIDE)[0] for photo in photos]
    blurred = [[cv2.GaussianBlur(image, (0, 0), sigma) for image in crops] for sigma in (0.7, 2.0)]
    with torch.no_grad():
        layers = [_unit_layers(features, normalised(images)) for images in (crops, *blurred)]
        near, far = (_distance(layers[0], other, heads) for other in layers[1:])
        order = list(range(1, len(crops))) + [0]
        other = _distance(layers[0], [layer[order] for layer in layers[0]], heads)
    return {"order_of_blur": round(float((near < far).float().mean()), 4), "mean_distance": {"blur_0.7": _r(near), "blur_2": _r(far), "other_photo": _r(other)}}


def _r(values: torch.Tensor) -> float:
    return round(float(values.mean()), 4)


def _unit_layers(features: torch.nn.Sequential, images: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the five blocks' last ReLU, each position scaled to unit length."""
    layers = []
    for k, module in enumerate(features):
        images = module(images)
        if k in (3, 8, 15, 22, 29):
            layers.append(F.normalize(images, dim=1, eps=1e-10))
    return layers


def _distance(first: list[torch.Tensor], second: list[torch.Tensor], heads: list[torch.Tensor]) -> torch.Tensor:
    return sum(((a - b).square() * head).sum(1).mean((1, 2)) for a, b, head in zip(first, second, heads, strict=True))  # type: ignore[return-value]
