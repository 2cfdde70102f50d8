"""Stage 0 for one photo: from its bytes and its label to the files of DESIGN 4.1, or to a reason why not.

The eight steps: read, find the face, crop the head, mask the hair, take the hair out, keep the hair alone, cut patches and the style
picture, and embed the identity and write the prompt.
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.errors import DeepHairError
from backend.imaging import bald, crop, masks, patches
from backend.imaging.decode import ImageError, decode_stored, write_png
from backend.training.data_processing.labels import LabelError, Pair, PhotoLabel, read_label
from backend.training.data_processing.mapping import english, texture_labels
from backend.training.data_processing.names import printable
from backend.training.data_processing.prompts import write_prompt
from backend.training.keyed import key
from backend.training.training_face import DetectedFace, FaceAnalyzer, IdentityModel, forgo_torch, is_blurred, yaw_of

logger = logging.getLogger(__name__)

STRAY_SHARE = 0.008  # growth of the label's polygon, share of the crop's side: hairs stand out of it, and would stay in the bald image

PHOTO_REASONS: dict[str, str] = {
    "not_an_image": "The file is not a picture.",
    "unsupported_format": "The picture is neither JPEG, PNG nor WebP.",
    "truncated": "The picture is damaged or cut off.",
    "too_many_pixels": "The picture is larger than data.max_pixels.",
    "too_small": "The picture is too small to be a portrait.",
    "no_hair_polygon": "The label has no usable hair polygon.",
    "hair_outside_frame": "The hair polygon lies outside the photo.",
    "too_little_hair": "The hair covers less of the head crop than data.min_hair_fraction.",
    "wrong_size": "The photo is not of the size that its label gives, so the polygons do not fit it.",
    "unreadable": "The file cannot be read.",
    "worker_killed": "The process that worked on this photo died, again and again.",
}


@dataclass(frozen=True)
class PhotoSettings:
    """What the processing of a photo depends on, small enough to be sent to every worker."""

    processed: Path
    images: Path
    weights: Path
    identity_model: IdentityModel
    resolution: int
    patch_size: int
    patches_per_photo: int
    patch_min_hair: float
    bald: bald.Method
    max_pixels: int
    min_hair_fraction: float
    seed: int


class PhotoRejected(Exception):
    """A photo that cannot become training data: ``reason`` is a stable code, ``detail`` what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


_worker: tuple[PhotoSettings, FaceAnalyzer] | DeepHairError | None = None  # of this worker process, set once by start_worker


def start_worker(settings: PhotoSettings) -> None:
    """Loads the face networks once per worker process. A failure is kept and raised by ``work``, where the parent can see it."""
    global _worker
    forgo_torch()
    cv2.setNumThreads(1)
    try:
        _worker = (settings, FaceAnalyzer(settings.weights, settings.identity_model, threads=1))
    except DeepHairError as error:
        _worker = error


def work(pair: Pair) -> dict[str, Any]:
    """Processes one photo in a started worker; returns its row of metadata or of quarantine (which has the key ``reason``)."""
    if _worker is None:
        raise RuntimeError("start_worker has not run in this process")
    if isinstance(_worker, DeepHairError):
        raise _worker
    return process(pair, *_worker)


def process(pair: Pair, settings: PhotoSettings, faces: FaceAnalyzer) -> dict[str, Any]:
    """Processes one photo: writes its files and returns its metadata row, or returns a row with ``path``, ``reason`` and ``detail``."""
    try:
        return _accept(pair, settings, faces)
    except PhotoRejected as rejected:
        return {"path": relative(pair.photo, settings.images), "reason": rejected.reason, "detail": rejected.detail}


def relative(path: Path, root: Path) -> str:
    """The path from the dataset's root, so that moving the dataset changes no output; undecodable bytes of a name are escaped."""
    return printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix())


def _accept(pair: Pair, settings: PhotoSettings, faces: FaceAnalyzer) -> dict[str, Any]:
    label = _label(pair)
    content, frame = _photo(pair, label, settings.max_pixels)
    face = _main_face(faces.detect(frame), label)
    face_box = face.box if face else crop.rings_box(label.face_rings)
    hair_box = crop.rings_box(label.hair_rings)
    square = crop.head_square(_in_frame(hair_box, frame), face_box, (frame.shape[1], frame.shape[0]))
    native = crop.crop_square(frame, square)
    photo = crop.resize(native, settings.resolution)
    hair_rings = [square.scaled(ring, settings.resolution) for ring in label.hair_rings]
    face_rings = [square.scaled(ring, settings.resolution) for ring in label.face_rings]
    outline = masks.rasterize(hair_rings, settings.resolution, settings.resolution)
    hair = masks.grow(outline, STRAY_SHARE * settings.resolution)
    share = float((outline > 0).mean())
    if share < settings.min_hair_fraction:
        raise PhotoRejected("too_little_hair", f"{share:.4f} of the head crop, at least {settings.min_hair_fraction} are wanted")
    box = square.scaled_box(face_box, settings.resolution) if face_box else None
    native_hair = masks.rasterize([ring - (square.x0, square.y0) for ring in label.hair_rings], square.side, square.side)
    names = _write_images(label.id, photo, hair, bald.remove_hair(photo, hair, box, settings.bald), settings)
    names |= _write_patches(label.id, native, native_hair, settings)
    names["identity"] = _write_identity(label, frame, face, faces, settings)
    return _row(pair, label, settings, content, frame, square, face, box, hair_rings, face_rings, names)


def _label(pair: Pair) -> PhotoLabel:
    try:
        label = read_label(pair)
    except LabelError as error:
        raise PhotoRejected(error.reason, error.detail) from error
    if not label.hair_rings:
        raise PhotoRejected("no_hair_polygon", "polygon1 holds no ring of three points or more")
    return label


def _photo(pair: Pair, label: PhotoLabel, max_pixels: int) -> tuple[bytes, NDArray[np.uint8]]:
    try:
        content = pair.photo.read_bytes()
        frame = decode_stored(content, max_pixels=max_pixels)
    except ImageError as error:
        raise PhotoRejected(error.code, error.message) from error
    except OSError as error:
        raise PhotoRejected("unreadable", error.strerror or str(error)) from error
    height, width = frame.shape[:2]
    if label.size and label.size != (width, height):
        raise PhotoRejected("wrong_size", f"the photo is {width} x {height}, its label says {label.size[0]} x {label.size[1]}")
    return content, frame


def _in_frame(box: crop.Box | None, frame: NDArray[np.uint8]) -> crop.Box | None:
    """The part of the hair's box that the photo shows; rings may reach beyond the frame."""
    height, width = frame.shape[:2]
    if box is None:
        return None
    inside = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height)))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise PhotoRejected("hair_outside_frame", f"the hair's box {tuple(round(v) for v in box)} misses the {width} x {height} photo")
    return inside


def signed_yaw(horizontal: float | None) -> float | None:
    """Camera azimuth 0..360 (0 front, 180 back) as yaw in (-180, 180]."""
    if horizontal is None:
        return None
    return horizontal - 360.0 if horizontal > 180.0 else horizontal


def _yaw(label: PhotoLabel, face: DetectedFace | None) -> float | None:
    """The camera's azimuth as labelled; on photos without one (the sample pack) the face's own pose, to whole degrees."""
    if label.horizontal is not None or face is None:
        return signed_yaw(label.horizontal)
    return float(round(yaw_of(face.landmarks)))


def _main_face(found: list[DetectedFace], label: PhotoLabel) -> DetectedFace | None:
    """The largest face that can be this head's, if any; a head seen from behind (by its label) has none, whatever a detector sees in the hair.

    Its centre lies in the blurred area, where there is one, or no farther from the hair than the face is large: the client's own face is
    blurred, and what a detector does find may hang on the wall.
    """
    yaw = signed_yaw(label.horizontal)
    if yaw is not None and abs(yaw) > 120.0:
        return None
    return next((face for face in found if _belongs(face, label)), None)


def _belongs(face: DetectedFace, label: PhotoLabel) -> bool:
    x0, y0, x1, y1 = face.box
    place = crop.rings_box(label.face_rings) or crop.rings_box(label.hair_rings)
    if place is None:
        return True
    reach = 0.25 if label.face_rings else 1.0  # of the face's size
    wide, high = reach * (x1 - x0), reach * (y1 - y0)
    return place[0] - wide <= (x0 + x1) / 2 <= place[2] + wide and place[1] - high <= (y0 + y1) / 2 <= place[3] + high


def _write_images(
    name: str, photo: NDArray[np.uint8], hair: NDArray[np.uint8], without: NDArray[np.uint8], settings: PhotoSettings
) -> dict[str, Any]:
    alone = cv2.merge([*cv2.split(cv2.bitwise_and(photo, photo, mask=hair)), hair]).astype(np.uint8, copy=False)
    files = {"bald": f"bald_images/{name}.png", "hair_only": f"hair_only_images/{name}.png"}
    write_png(settings.processed / files["bald"], without, compression=1)
    write_png(settings.processed / files["hair_only"], alone, compression=1)
    return files


def _write_patches(name: str, native: NDArray[np.uint8], hair: NDArray[np.uint8], settings: PhotoSettings) -> dict[str, Any]:
    cut = patches.cut_patches(native, hair, size=settings.patch_size, count=settings.patches_per_photo, min_hair=settings.patch_min_hair)
    files = [f"hair_patches/{name}_{number:03d}.png" for number in range(len(cut))]
    for file, patch in zip(files, cut, strict=True):
        write_png(settings.processed / file, patch.image, compression=1)
    style = f"style_vectors/{name}.png"
    write_png(settings.processed / style, patches.style_picture(native, hair), compression=1)
    return {"patches": files, "style": style, "patch_source_px": cut[0].box[2] if cut else None}


def _write_identity(
    label: PhotoLabel, frame: NDArray[np.uint8], face: DetectedFace | None, faces: FaceAnalyzer, settings: PhotoSettings
) -> str | None:
    """Writes the identity embedding where the face is there and intact; otherwise Stage 2 uses its null token."""
    height, width = frame.shape[:2]
    if face is None:
        return None
    if label.face_rings and is_blurred(
        frame, masks.rasterize(label.face_rings, height, width), masks.rasterize(label.hair_rings, height, width)
    ):
        return None
    buffer = io.BytesIO()
    np.save(buffer, faces.embed(frame, face.landmarks), allow_pickle=False)
    file = f"identity_embeddings/{label.id}.npy"
    artifacts.write_bytes(settings.processed / file, buffer.getvalue())
    return file


def _row(
    pair: Pair,
    label: PhotoLabel,
    settings: PhotoSettings,
    content: bytes,
    frame: NDArray[np.uint8],
    square: crop.Square,
    face: DetectedFace | None,
    face_box: crop.Box | None,
    hair_rings: list[NDArray[np.float64]],
    face_rings: list[NDArray[np.float64]],
    names: dict[str, Any],
) -> dict[str, Any]:
    curl, volume = texture_labels(label.attributes, label.phase)
    return {
        "id": label.id,
        "source": label.source,
        "prefix": label.prefix,
        "folder_index": label.folder_index,
        "basestyle": label.attributes.get("basestyle") or label.basestyle_folder,
        "image": relative(pair.photo, settings.images),
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": [frame.shape[1], frame.shape[0]],
        "square": [square.x0, square.y0, square.side],
        "files": {key: value for key, value in names.items() if key in ("bald", "hair_only", "style", "identity")},
        "patches": names["patches"],
        "patch_source_px": names["patch_source_px"],
        "hair_rings": [np.round(ring, 2).tolist() for ring in hair_rings],
        "face_blur_rings": [np.round(ring, 2).tolist() for ring in face_rings],
        "face_box": [round(v, 2) for v in face_box] if face_box else None,
        "face_detected": face is not None,
        "landmarks": np.round(square.scaled(face.landmarks, settings.resolution), 2).tolist() if face else None,
        "identity_valid": names["identity"] is not None,
        "yaw": _yaw(label, face),
        "vertical": label.vertical,
        "front": label.front,
        "phase": label.phase,
        "attributes": english(label.attributes),
        "curl": curl,
        "volume": volume,
        "prompt": write_prompt(label.attributes, seed=key(settings.seed, "prompt/" + label.id) % 2**31, phase=label.phase),
    }
