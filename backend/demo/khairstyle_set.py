"""Rendered people filed exactly as K-Hairstyle files its photos: folders, names, Korean values, blurred faces and known oddities.

Layout and values: facts/khairstyle.md 1.2 to 1.7. Nothing is written beside the dataset, so that the stages cannot tell.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from backend import artifacts
from backend.demo.portraits import Hairstyle, Portrait, blur_face, mask_rings, render, sample_hairstyle, sample_identity, sample_scene
from backend.demo.traits import HAIR_COLOURS
from backend.machine import cores

DEMO: dict[str, int] = {"heads": 36, "views": 6, "size": 512, "seed": 20}
BENCH: dict[str, int] = {"heads": 300, "views": 12, "size": 512, "seed": 21}
LEARN: dict[str, int] = {"heads": 480, "views": 4, "size": 512, "seed": 22}
LEARN_LONG: dict[str, int] = {"heads": 720, "views": 6, "size": 512, "seed": 23}
"""What start weights of Stage 1 and Stage 2 are trained on: two CPU cores, and the shipped ones, which a graphics card trained."""

FIRST_IDENTITY = 100_000  # identities of the sets; the miniature weights are trained on others (training_data)
HEAD_SPACING = 20  # running folder indices between heads: Stage 0 takes neighbours within 16 for one client
INTACT_EVERY, BEFORE_EVERY = 4, 7  # every fourth head keeps its face, every seventh has photos from before the cut
YAWS = (0, 28, -28, 180, 62, -85, 14, -14, 45, -48, 115, -140)
PREFIXES = ("CP", "JS", "JSS", "DS", "DSS", "MN", "AP")
_HAIR, _FACE_PARTS = 13, (2, 4, 5, 6, 7, 10, 11, 12)

_LENGTH = {"men": "남자", "women_short": "여숏", "bob": "단발", "medium": "중발", "long": "장발"}
_CURL = (("X",), ("J", "C", "CC"), ("S", "SC", "CS"), ("SS", "S3"))
_NATURAL_CURL = ("생머리", "반곱슬", "곱슬", "강곱슬")
_WIDTH = ("얇음", "보통", "굵음")
_COLOUR = dict(
    zip(HAIR_COLOURS, ("블랙", "자연갈색", "적갈색", "황갈색", "애쉬브라운", "핑크브라운", "옴브레", "투톤", "기타"), strict=True)
)
_BANGS = {"none": "해당없음", "see_through": "시스루", "full": "풀뱅", "side_swept": "살짝 넘긴스타일", "choppy": "처피뱅"}
_BASESTYLE = {  # by length: straight, then permed
    "men": ((6, "댄디"), (18, "쉐도우")), "women_short": ((24, "여자일반숏"), (17, "숏단발")), "bob": ((14, "보브"), (15, "빌드")),
    "medium": ((30, "허쉬"), (23, "에어")), "long": ((25, "원랭스"), (31, "히피")),
}  # fmt: skip
_EXIF = ("make", "model", "device", "datetime_original", "restype", "pixel_x_dimension", "pixel_y_dimension", "orientation", "focal_length",
         "aperture", "exposure_time", "iso_speed", "white_balance", "flash", "software", "gps_latitude", "gps_longitude", "comment")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One capture session: who, with which hair, where it is filed."""

    name: str
    prefix: str
    folder: str
    identity_seed: int
    hair: Hairstyle
    before: Hairstyle | None
    intact: bool
    scene_seed: int


@dataclass(frozen=True)
class Shot:
    """One photo to render: ``view`` is the number in its name."""

    source: Source
    view: int
    yaw: float
    camera: str
    phase: str
    size: int

    @property
    def stem(self) -> str:
        """The photo's name without suffix."""
        return f"{self.source.name}-{self.view:03d}"


def write_khairstyle(
    images: Path,
    labels: Path,
    *,
    heads: int,
    views: int,
    size: int,
    seed: int,
    oddities: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes ``heads`` x ``views`` photos of ``size`` px and their labels, byte-equal for equal arguments; returns the truth for tests.

    One head more is filed as two neighbouring sources with different hair (A/B styling). With ``oddities`` the known kinds of dirt lie
    among them. progress(done, total) is called after each photo.
    """
    shots = planned(heads, views, size, seed)
    truth: dict[str, Any] = {}
    workers = cores()
    # a head goes to one worker as a whole, which grows its hair once for all views
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)
    ) as pool:
        for done, (shot, (photo, label)) in enumerate(zip(shots, pool.map(shoot, shots, chunksize=views), strict=True), 1):
            suffix = ".JPG" if oddities and done % 23 == 5 else ".jpeg" if oddities and done % 31 == 7 else ".jpg"
            _file(images, labels, shot, photo, label, suffix)
            hair = hair_of(shot)
            truth[shot.stem] = {"identity": shot.source.identity_seed, "curl": hair.curl, "volume": hair.volume, "colour": hair.colour,
                                "length": hair.length, "yaw": shot.yaw, "phase": shot.phase, "intact": shot.source.intact}  # fmt: skip
            if progress is not None:
                progress(done, len(shots))
    odd = _write_oddities(images, labels, shots[0], shots[views]) if oddities else {}
    return {"photos": len(shots), "sources": len({shot.source.name for shot in shots}), "odd": odd, "truth": truth}


# ---- who is photographed ----


def _sources(heads: int, seed: int) -> Iterator[Source]:
    for head in range(heads):
        rng = np.random.default_rng([seed, head])
        identity = sample_identity(FIRST_IDENTITY + 1000 * seed + head)
        colour = list(HAIR_COLOURS)[(head * 5 + head // 9) % len(HAIR_COLOURS)]
        length = _length(rng, identity.sex)
        hair = sample_hairstyle(rng, curl=head % 4, volume=head // 4 % 3, colour=colour, length=length, tied=False)
        before = (
            sample_hairstyle(rng, curl=(head + 2) % 4, volume=hair.volume, length=length, tied=False) if head % BEFORE_EVERY == 3 else None
        )
        intact = (head + head // 4) % INTACT_EVERY == 1  # shifted from row to row: every curl class has intact faces
        yield _source(head, seed, identity.seed, hair, before, intact=intact)


def _length(rng: np.random.Generator, sex: str) -> str:
    return "men" if sex == "male" else ("women_short", "bob", "medium", "long")[int(rng.integers(4))]


def _source(number: int, seed: int, identity: int, hair: Hairstyle, before: Hairstyle | None, *, intact: bool, offset: int = 0) -> Source:
    prefix = PREFIXES[number % len(PREFIXES)]
    name = f"{prefix}{100_000 + 1000 * seed + number * 3 + offset:06d}"
    base_id, base = _BASESTYLE[hair.length][min(hair.curl, 1)]
    folder = f"0002.mqset/{base_id:04d}.{base}/{1 + number * HEAD_SPACING + offset:04d}.{name}"
    return Source(name, prefix, folder, identity, hair, before, intact, 7 * seed + number)


def _ab_pair(heads: int, seed: int) -> list[Source]:
    """One client, filed twice with a folder index between them of one."""
    rng = np.random.default_rng([seed, heads, 2])
    identity = sample_identity(FIRST_IDENTITY + 1000 * seed + heads)
    length = _length(rng, identity.sex)
    first = sample_hairstyle(rng, curl=0, length=length, colour="black", tied=False)
    second = sample_hairstyle(rng, curl=2, length=length, colour="yellow-brown", tied=False)
    return [_source(heads, seed, identity.seed, hair, None, intact=True, offset=offset) for offset, hair in enumerate((first, second))]


def _shots(source: Source, number: int, views: int, size: int, seed: int) -> Iterator[Shot]:
    rng = np.random.default_rng([seed, number, 3])
    for view in range(views):
        yaw = float(round(YAWS[view % len(YAWS)] + (0 if view == 0 else rng.uniform(-6, 6))))
        phase = "before" if source.before is not None and view % 2 else "after"
        yield Shot(source, view + 1, yaw, "high" if (view + number) % 3 == 2 else "mid", phase, size)


def planned(heads: int, views: int, size: int, seed: int) -> list[Shot]:
    """Every photo of a set, head by head."""
    sources = [*_sources(heads, seed), *_ab_pair(heads, seed)]
    return [shot for number, source in enumerate(sources) for shot in _shots(source, number, views, size, seed)]


# ---- one photo ----


def hair_of(shot: Shot) -> Hairstyle:
    """The hairstyle that a photo shows: the former one on photos from before the cut."""
    return shot.source.before if shot.phase == "before" and shot.source.before else shot.source.hair


def shoot(shot: Shot) -> tuple[bytes, dict[str, Any]]:
    """Renders a photo and writes its label: JPEG bytes and the flat JSON object."""
    source, hair = shot.source, hair_of(shot)
    scene = sample_scene(np.random.default_rng([source.scene_seed, 11]), camera=shot.camera)
    scene = replace(scene, shift=float(np.random.default_rng([source.scene_seed, shot.view]).uniform(-0.03, 0.03)))
    portrait = render(sample_identity(source.identity_seed), hair, scene, shot.yaw, shot.size, source.identity_seed)
    face = face_ring(portrait)
    image = portrait.image if source.intact or face is None else blur_face(portrait.image, face)
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, scene.jpeg_quality])
    return encoded.tobytes(), _label(shot, portrait, face)


def face_ring(portrait: Portrait) -> NDArray[np.float32] | None:
    """The polygon over eyes, nose, mouth and cheeks, 6 to 12 vertices (n, 2), as ``polygon2`` has it; None on a back view."""
    if portrait.face_box is None:
        return None
    rows, columns = np.nonzero(np.isin(portrait.parsing, _FACE_PARTS))
    if len(rows) < 20:
        return None
    points = np.stack([columns, rows], axis=1).astype(np.float32)
    centre = (points.min(0) + points.max(0)) / 2
    grown = centre + (points - centre) * np.array([1.25, 1.15], np.float32)
    hull = cv2.convexHull(grown)
    ring = cv2.approxPolyDP(hull, 0.02 * cv2.arcLength(hull, True), True)[:, 0]
    return ring if len(ring) >= 3 else None


def _label(shot: Shot, portrait: Portrait, face: NDArray[np.float32] | None) -> dict[str, Any]:
    hair, identity = shot.source.hair, sample_identity(shot.source.identity_seed)  # labels give the after style, on before photos too
    rng = np.random.default_rng([shot.source.identity_seed, 5])
    mask = portrait.parsing == _HAIR
    rgb = portrait.image[mask].mean(axis=0).round().astype(int).tolist() if mask.any() else [0, 0, 0]
    parting = "가르마없음" if hair.parting == 0 else f"{hair.parting}:{10 - hair.parting}"
    seed_curl = shot.source.before.curl if shot.source.before else hair.curl
    return {
        "id": f"00000000-0000-4000-8000-{shot.source.identity_seed:06d}{shot.view:06d}",
        "source": shot.source.name, "path": f"/{shot.source.folder}", "filename": f"{shot.stem}.jpg", "width": shot.size, "height": shot.size,
        "polygon1": _rings(mask_rings(mask, shot.size / 320)), "polygon2": _rings([] if face is None else [face]), "rgb": str(rgb),
        "basestyle": shot.source.folder.split("/")[1].split(".")[1], "basestyle-type": "단" if hair.length in ("men", "women_short") else "장",
        "length": _LENGTH[hair.length], "curl": str(rng.choice(_CURL[hair.curl])),
        "bang": "기타(남자 내림머리)" if hair.length == "men" and hair.bangs != "none" else _BANGS[hair.bangs],
        "loss": "탈모아님", "side": "투블럭" if hair.undercut else "해당없음", "partition": parting, "color": _COLOUR[hair.colour],
        "exceptional": "묶음머리" if hair.tied else "해당없음", "sex": "남" if identity.sex == "male" else "여", "age": identity.age,
        "hair-width": _WIDTH[hair.volume], "natural-curl": _NATURAL_CURL[seed_curl], "damage": "건강모", "melanin-color": "적멜라닌",
        "water-repellency": "무", "black-colorize": "무", "patch-test": "무", "decolorize-history": "0",
        "front": shot.yaw == 0, "horizontal": int(shot.yaw) % 360, "vertical": "상" if shot.camera == "high" else "중", "before-after": shot.phase,
        "user-stisfied": "", "designer-satisfied": "nan", "collect-type": "진솔", "author": "", "collect-date": "20200901",
        **dict.fromkeys(_EXIF, ""),
    }  # fmt: skip


def _rings(rings: list[NDArray[np.float32]]) -> str:
    """Rings as the labels hold them: a string of JSON, a list of rings of {"x", "y"}."""
    return json.dumps([[{"x": round(float(x), 2), "y": round(float(y), 2)} for x, y in ring] for ring in rings])


def _file(images: Path, labels: Path, shot: Shot, photo: bytes, label: dict[str, Any], suffix: str) -> None:
    artifacts.write_bytes(images / shot.source.folder / f"{shot.stem}{suffix}", photo)
    _write_label(labels / shot.source.folder / f"{shot.stem.replace('-', '_')}.json", label)


def _write_label(path: Path, label: dict[str, Any]) -> None:
    artifacts.write_text(path, json.dumps(label, ensure_ascii=False))


# ---- dirt ----


def _write_oddities(images: Path, labels: Path, first: Shot, second: Shot) -> dict[str, str]:
    """The known kinds of dirt; returns {what: the reason that Stage 0 should give, or 'accepted'}."""
    photo, label = shoot(first)
    folder, other = first.source.folder, second.source.folder
    # a label under a photo's name, byte for byte a second time
    artifacts.write_bytes(images / folder / f"{first.stem}_copy.jpg", json.dumps(label, ensure_ascii=False).encode())
    # a label of a photo that is not there
    _write_label(labels / folder / f"{first.source.name}_850.json", {**label, "filename": f"{first.source.name}-850.jpg"})
    extra = {"truncated": (851, photo[: len(photo) // 2], {}), "no hair": (852, photo, {"polygon1": "[]"})}
    rings = json.loads(label["polygon1"])
    short = json.dumps([*rings, [{"x": 1.0, "y": 1.0}, {"x": 5.0, "y": 5.0}]])
    extra["blank values"] = (853, photo, {"polygon1": short, "color": "nan", "bang": "", "partition": None, "age": "none"})
    for view, content, changes in extra.values():
        name = f"{first.source.name}-{view}"
        artifacts.write_bytes(images / folder / f"{name}.jpg", content)
        _write_label(labels / folder / f"{name.replace('-', '_')}.json", {**label, "filename": f"{name}.jpg", **changes})
    artifacts.write_text(images / other / "Thumbs.db", "not a photo")
    return {"label copy": "duplicate_label", "orphan": "orphan_label", "truncated": "truncated", "no hair": "no_hair_polygon",
            "blank values": "accepted", "foreign": "foreign"}  # fmt: skip
