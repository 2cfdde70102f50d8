"""How well the trained miniature parts do on heads that were never trained on, through the classes that the product uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from backend.demo import architectures
from backend.demo.portraits import HAIR, blur_face
from backend.demo.training_data import Photo, face_ring, head_crop
from backend.training.models.perceptual import load_perceptual
from backend.training.training_face import FaceAnalyzer
from backend.tryon import conditioning
from backend.tryon.segmentation import HairParser
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
            "head_crop": (cut, np.array(photo.box_in(square, 256))),
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
    """Hair IoU on head crops of ``side`` px: over all pixels, and the mean and the lowest of the photos."""
    net = HairParser(weights, device=torch.device("cpu"))
    pairs = []
    for photo in photos:
        image, truth = head_crop(photo, photo.square(), side)
        found = net.hair(image) > 0
        pairs.append([(found & (truth == HAIR)).sum(), (found | (truth == HAIR)).sum()])
    shared, joined = np.array(pairs, dtype=np.float64).T
    return {
        "hair_iou": round(float(shared.sum() / joined.sum()), 4),
        "hair_iou_photo_mean": round(float((shared / joined).mean()), 4),
        "hair_iou_worst": round(float((shared / joined).min()), 4),
        "photos": len(pairs),
    }


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
    """PSNR of reconstructed head crops at 128 px in dB: means over photos, of the whole picture and of the hair.

    With it mean and standard deviation of the scaled latents, which diffusion wants near 0 and 1.
    """
    model = conditioning.load_vae(folder(weights, "inpainting"), device=torch.device("cpu"), dtype=torch.float32)
    whole, hair, latents = [], [], []
    for photo in photos:
        image, parsing = head_crop(photo, photo.square(), architectures.IMAGE_SIDE)
        with torch.no_grad():
            mean, _ = conditioning.encode_latents(model, conditioning.to_tensor([image]))
            decoded = conditioning.to_pictures(conditioning.decode_latents(model, mean))[0]
        latents.append(mean)
        error = np.square((decoded.astype(np.float64) - image) / 255).mean(axis=2)
        whole.append(-10 * np.log10(error.mean()))
        if (parsing == HAIR).any():
            hair.append(-10 * np.log10(error[parsing == HAIR].mean()))
    scaled = torch.cat(latents)
    return {
        "psnr": round(float(np.mean(whole)), 3),
        "psnr_worst": round(float(np.min(whole)), 3),
        "psnr_hair": round(float(np.mean(hair)), 3),
        "scaled_latent_std": round(float(scaled.std()), 3),
        "scaled_latent_mean": round(float(scaled.mean()), 3),
        "photos": len(whole),
    }


def perceptual(weights: Path, photos: Sequence[Photo]) -> dict[str, Any]:
    """What the distance (0 the same, 2 at most) says of a softened head crop and of another person's, as means over photos.

    ``order_of_blur``: share of photos of which a slight softening is nearer than a strong one.
    """
    net, _ = load_perceptual(weights)
    crops = [head_crop(photo, photo.square(), architectures.IMAGE_SIDE)[0] for photo in photos]
    sharp, slight, strong = (
        conditioning.to_tensor(pictures)
        for pictures in (crops, *([cv2.GaussianBlur(image, (0, 0), sigma) for image in crops] for sigma in (0.7, 2.0)))
    )
    with torch.no_grad():
        near, far, other = net.lpips(sharp, slight), net.lpips(sharp, strong), net.lpips(sharp, sharp.roll(1, 0))
    return {
        "order_of_blur": round(float((near < far).float().mean()), 4),
        "distance_blur_0.7": round(float(near.mean()), 4),
        "distance_blur_2.0": round(float(far.mean()), 4),
        "distance_other_photo": round(float(other.mean()), 4),
        "photos": len(crops),
    }


def text(weights: Path, photos: Sequence[Photo]) -> dict[str, Any]:
    """How far prompts lie apart: cosine of the pooled vectors of all pairs of single choices (1 would be indistinguishable)."""
    from backend.training.data_processing.prompts import choices, prompt_from_choice

    prompts = [prompt_from_choice(**{kind: choice}) for kind, offered in choices().items() for choice in offered]
    encoders = conditioning.TextEncoders(folder(weights, "inpainting"), device=torch.device("cpu"), dtype=torch.float32)
    pooled = torch.nn.functional.normalize(encoders.encode(prompts)[1])
    cosine = (pooled @ pooled.T)[~torch.eye(len(prompts), dtype=torch.bool)]
    return {"prompts": len(prompts), "cosine_mean": round(float(cosine.mean()), 4), "cosine_max": round(float(cosine.max()), 4)}


def unet(weights: Path, photos: Sequence[Photo]) -> dict[str, Any]:
    """Mean squared error of the prediction at timesteps 100, 300, ..., 900 on held-out head crops with holes to fill, for the true
    prompt and for another photo's."""
    from backend.demo.train_diffusion import denoising_errors

    errors, shuffled = denoising_errors(weights, photos)
    return {
        "mse": round(float(errors.mean()), 4),
        "mse_at": {str(t): round(float(v), 4) for t, v in zip(range(100, 1000, 200), errors, strict=True)},
        "mse_other_prompt": round(float(shuffled.mean()), 4),
        "photos": len(photos),
    }


def controlnet(weights: Path, photos: Sequence[Photo]) -> dict[str, Any]:
    """Mean squared error of the base's prediction without the ControlNet, with it, and with another head's structure map."""
    from backend.demo.train_diffusion import steered_errors

    plain, steered, other = steered_errors(weights, [photo for photo in photos if photo.box is not None])
    return {"mse_without": round(plain, 4), "mse": round(steered, 4), "mse_other_map": round(other, 4)}
