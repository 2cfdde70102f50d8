"""Try on: an upload and a reference become the upload with that hair (DESIGN section 5)."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backend.config import Config
from backend.errors import MissingInputError
from backend.imaging import bald, crop, masks, patches, profiles
from backend.training.models.bundle import load_bundle
from backend.training.training_face import DetectedFace, FaceAnalyzer
from backend.tryon.conditioning import head_input, to_pictures
from backend.tryon.few_step import fuse
from backend.tryon.finishing import Painted, finish, require_hair
from backend.tryon.heads import Head, find_head
from backend.tryon.painter import Painter, PaintRequest, device_and_dtype
from backend.tryon.remembered import Remembered
from backend.tryon.segmentation import HairParser
from backend.tryon.values import Cancelled, FaceInfo, Preview, TryOnError, TryOnRequest, TryOnResult, sampling_of

__all__ = ["Cancelled", "FaceInfo", "Preview", "TryOn", "TryOnError", "TryOnRequest", "TryOnResult"]

MIN_FACE = 40  # px in the upload; below that a head is too small to be restyled
RIVAL_SHARE = 0.2  # a second face of this share of the largest one's area makes the choice a question for the person
REFERENCES = 64  # whose features are remembered: 128 KiB each with 16 style tokens
MIN_HAIR = 0.004  # share of a reference's head crop that must be hair


class TryOn:
    """The product: a deployed bundle with the detector, the parser and the base model's parts.

    header: the bundle's, and ``sampling``: the steps and guidance of a job that names none, and the few-step LoRA with its sha256.

    ``run`` is for one thread at a time; ``preview`` may run beside it.
    """

    def __init__(
        self, config: Config, painter: Painter, faces: FaceAnalyzer, parser: HairParser, header: dict[str, Any], sha256: str
    ) -> None:
        self.config, self.header, self.bundle_sha256 = config, header, sha256
        self._painter, self._faces, self._parser = painter, faces, parser
        self._resolution = int(header["resolution"])
        self._references: Remembered[str, torch.Tensor] = Remembered(REFERENCES)

    @classmethod
    def load(cls, config: Config) -> TryOn:
        """Loads everything that serving needs. Raises MissingInputError or InvalidArtifactError with what to do."""
        if not config.paths.bundle.is_file():
            raise MissingInputError(
                f"no deployed model at {config.paths.bundle}",
                hint="train and deploy one ('deephair run'), or 'make demo' for the miniature",
            )
        bundle = load_bundle(config.paths.bundle, config.paths.weights)
        wanted = config.sample.few_step
        few_step = fuse(bundle.model.unet, config.paths.weights, wanted) if wanted != "none" else None
        painter = Painter.of_bundle(bundle, config, few_step=few_step.kind if few_step else None)
        steps, guidance = sampling_of(config.sample, None, None, 1.0)
        if config.sample.compile:
            painter.compile(int(bundle.header["resolution"]), guidance)
        device, _ = device_and_dtype(config)
        sampling = {"steps": steps, "guidance": guidance, "few_step": dataclasses.asdict(few_step) if few_step else None}
        return cls(
            config,
            painter,
            FaceAnalyzer(config.paths.weights, bundle.header["identity_model"]),
            HairParser(config.paths.weights, device=device),
            {**bundle.header, "sampling": sampling},
            bundle.sha256,
        )

    def preview(self, image: NDArray[np.uint8]) -> Preview:
        """The faces of a picture, largest first, and the hair of the largest one."""
        faces = self._faces.detect(image)
        mask = np.zeros(image.shape[:2], np.uint8)
        if faces:
            head = self._head(image, faces[0], faces)
            _lay(mask, crop.resize(head.hair, head.square.side), head.square)
        return Preview([FaceInfo(f.box, f.confidence, f.landmarks.tolist()) for f in faces], mask)

    def run(
        self,
        request: TryOnRequest,
        *,
        on_step: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> TryOnResult:
        """Paints the reference's hair on the target. Raises TryOnError with an explanation, or Cancelled within one step."""
        request.check()
        steps, guidance = sampling_of(self.config.sample, request.steps, request.guidance, request.strength)
        start = time.monotonic()
        faces = self._faces.detect(request.target)
        face = _target_face(faces, request.face)
        head = self._head(request.target, face, faces)
        assert head.face_box is not None
        hair = crop.resize(head.hair, self._resolution)
        if request.mode != "full":
            require_hair(hair, "your photo", request.mode, code="no_own_hair")
        colours = profiles.Colours.of(request.profile)  # the networks are shown sRGB, as the reference is
        photo = colours.to_srgb(head.photo)
        photo = bald.smooth_face(photo, head.face_box, hair) if self.config.app.smooth_face else photo
        entered = head_input(
            photo,
            hair,
            head.face_box,
            method=self.config.data.bald,
            landmarks=head.square.scaled(face.landmarks, self._resolution),
            chosen=None if request.mask is None else self._chosen_region(request.mask, head.square),
            within=crop.resize(head.own, self._resolution),
        )
        paint_request = PaintRequest(
            head=entered,
            style=None if request.reference is None else self._style(request.reference, remember=request.remember),
            identity=self._faces.embed(request.target, face.landmarks),
            prompt=request.words(),
            seed=request.seed,
            photo=photo,
            own_words=bool(request.prompt),
        )
        painted = self._painter.paint(
            [paint_request], steps=steps, guidance=guidance, strength=request.strength, on_step=on_step, cancelled=cancelled
        )
        picture = checked_output(painted, entered.region)
        pasted = finish(
            request.target,
            head,
            Painted(colours.from_srgb(picture), *self._parser.hair_and_skin(picture), entered.region),
            mode=request.mode,
            feather=self.config.sample.feather,
            chosen=request.mask,
        )
        if not pasted.mask.any():
            raise TryOnError(
                "nothing of your photo would change", hint="paint a larger mask, or try another seed or hairstyle", code="unchanged"
            )
        info = {
            "bundle_sha256": self.bundle_sha256,
            "mode": request.mode,
            "strength": request.strength,
            "seed": request.seed,
            "steps": steps,
            "guidance": guidance,
            "few_step": self.header["sampling"]["few_step"],
            "seconds": round(time.monotonic() - start, 3),
            "changed_share": round(float((pasted.mask > 0).mean()), 4),
        }
        return TryOnResult(pasted.image, pasted.mask, info)

    def _chosen_region(self, mask: NDArray[np.uint8], square: crop.Square) -> NDArray[np.uint8]:
        """The person's mask in the head crop, at the model's resolution. Raises TryOnError where it lies beside the head."""
        region = masks.any_coverage((crop.crop_square(mask, square) > 0).astype(np.uint8) * np.uint8(255), self._resolution)
        if not region.any():
            raise TryOnError("the mask lies beside the head", hint="paint where the hair is or shall be", code="empty_mask")
        return region

    def _style(self, reference: NDArray[np.uint8], *, remember: bool) -> torch.Tensor:
        """What the UNet is told of a reference. It is remembered, not the photo, and only of those that are offered to everybody: the page's
        gallery is chosen from again and again, and finding the hair takes longer than a step. Raises TryOnError."""
        if not remember:
            return self._painter.style_features(self.style_picture(reference))
        key = hashlib.sha256(repr(reference.shape).encode() + np.ascontiguousarray(reference).tobytes()).hexdigest()
        return self._references.get(key, lambda: self._painter.style_features(self.style_picture(reference)))

    def style_picture(self, reference: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The reference's hair as Stage 1 sees it. A reference from behind has no face and is taken as it is. Raises TryOnError."""
        faces = self._faces.detect(reference)
        head = self._head(reference, faces[0] if faces else None, faces)
        hair = masks.without_specks(head.hair)
        if float((hair > 0).mean()) < MIN_HAIR:
            raise TryOnError(
                "no hair was found in the reference photo",
                hint="choose a photo that shows the hairstyle larger and clearer",
                code="no_hair",
            )
        return patches.style_picture(crop.resize(head.native, hair.shape[0]), hair)

    def _head(self, image: NDArray[np.uint8], face: DetectedFace | None, faces: Sequence[DetectedFace]) -> Head:
        return find_head(self._parser, image, face, [other for other in faces if other is not face], self._resolution)


def _target_face(faces: Sequence[DetectedFace], chosen: int | None) -> DetectedFace:
    """The face whose hair is to change, of those found, largest first. Raises TryOnError with what to do."""
    if not faces:
        raise TryOnError("no face was found in your photo", hint="use a photo that shows the face from the front, well lit", code="no_face")
    if chosen is not None and not 0 <= chosen < len(faces):
        raise TryOnError(
            f"face {chosen} was chosen, the photo has {len(faces)}", hint="choose one of the faces of the preview", code="no_face"
        )
    if chosen is None and len(faces) > 1 and faces[1].area > RIVAL_SHARE * faces[0].area:
        raise TryOnError(
            f"the photo has {len(faces)} faces", hint="choose whose hair to change, or crop the photo to one person", code="many_faces"
        )
    face = faces[chosen or 0]
    size = max(face.box[2] - face.box[0], face.box[3] - face.box[1])
    if size < MIN_FACE:
        raise TryOnError(
            f"the face is {size:.0f} pixels large, at least {MIN_FACE} are needed", hint="use a larger photo", code="too_small"
        )
    if _is_side_view(face):
        raise TryOnError("the face is seen from the side", hint="use a photo that shows both eyes", code="side_view")
    return face


def checked_output(painted: torch.Tensor, region: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The one painted crop as (S, S, 3) uint8, or TryOnError flat_output when it is no picture: not finite, or one colour."""
    if not torch.isfinite(painted).all():
        raise TryOnError(
            "the model's output was not finite", hint="try another seed; if it happens again, deploy another model", code="flat_output"
        )
    picture = to_pictures(painted)[0]
    if float(picture[region > 0].astype(np.float32).std(axis=0).max()) < 1.0:
        raise TryOnError(
            "the model painted one flat colour", hint="try another seed; if it happens again, deploy another model", code="flat_output"
        )
    return picture


def _is_side_view(face: DetectedFace) -> bool:
    """Whether the nose lies outside the eyes: beyond about 60 degrees of yaw (5-point landmarks, image order)."""
    left, right, nose = face.landmarks[0, 0], face.landmarks[1, 0], face.landmarks[2, 0]
    span = float(right - left)
    return span <= 0.15 * (face.box[2] - face.box[0]) or not (left - 0.15 * span <= nose <= right + 0.15 * span)


def _lay(mask: NDArray[np.uint8], part: NDArray[np.uint8], square: crop.Square) -> None:
    height, width = mask.shape
    x0, y0 = max(0, square.x0), max(0, square.y0)
    x1, y1 = min(width, square.x0 + square.side), min(height, square.y0 + square.side)
    mask[y0:y1, x0:x1] = part[y0 - square.y0 : y1 - square.y0, x0 - square.x0 : x1 - square.x0]
