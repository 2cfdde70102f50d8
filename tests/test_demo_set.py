"""The miniature world: rendered people and their filing as K-Hairstyle."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from backend import artifacts
from backend.config import REPO_ROOT, load_config
from backend.demo import khairstyle_set, world
from backend.demo.camera import Camera
from backend.demo.hair import grow
from backend.demo.head import head_surface
from backend.demo.khairstyle_set import write_khairstyle
from backend.demo.portraits import (
    CELEBA_CLASSES,
    HAIR,
    Portrait,
    blur_face,
    mask_rings,
    render,
    sample_hairstyle,
    sample_identity,
    sample_scene,
)
from backend.training.data_processing.names import folders_of
from backend.training.data_processing.split import SplitRecord, assign_splits
from backend.training.training_face import is_blurred

HEADS, VIEWS, SIZE = 4, 6, 128


def person(seed: int, yaw: float = 0.0, size: int = 256, camera: str = "mid", **hair: Any) -> Portrait:
    scene = sample_scene(np.random.default_rng(seed + 1), camera=camera)
    style = sample_hairstyle(np.random.default_rng(seed), **{"tied": False, **hair})
    return render(sample_identity(seed), style, scene, yaw, size, seed)


def filled(rings: list[NDArray[np.float32]], size: int) -> NDArray[np.uint8]:
    mask = np.zeros((size, size), np.uint8)
    for ring in rings:
        cv2.fillPoly(mask, [np.round(ring).astype(np.int32)], 1)
    return mask


def iou(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.logical_and(a, b).sum() / np.logical_or(a, b).sum())


def filed(picture: NDArray[np.uint8], quality: int = 84) -> NDArray[np.uint8]:
    """The picture after JPEG."""
    _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR).astype(np.uint8)


# ---- people ----


def test_equal_arguments_give_equal_bytes() -> None:
    first = person(3, 25, 128)
    grow.cache_clear()
    head_surface.cache_clear()
    again = person(3, 25, 128)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.parsing, again.parsing)
    assert not np.array_equal(first.image, person(3, 26, 128).image)


@pytest.mark.parametrize("size", [64, 1025])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        person(3, size=size)


def test_unknown_fields_and_classes_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="curlz"):
        sample_hairstyle(rng, curlz=1)
    with pytest.raises(ValueError, match="curl is 4"):
        sample_hairstyle(rng, curl=4)


@pytest.mark.parametrize("yaw", [-70, -30, 0, 30, 70])
def test_landmarks_lie_in_the_face_box_on_their_own_features(yaw: float) -> None:
    drawn = person(42, yaw, length="men", bangs="none", parting=0, undercut=True)
    assert drawn.face_box is not None
    assert drawn.landmarks is not None
    x0, y0, x1, y1 = drawn.face_box
    x, y = drawn.landmarks.T
    assert (x >= x0).all() and (x <= x1).all() and (y >= y0).all() and (y <= y1).all()
    assert x[0] <= x[1] and x[3] <= x[4]
    assert y[:2].max() < y[2] < y[3:].min()
    if abs(yaw) <= 30:
        for at, name in ((0, "l_eye"), (1, "r_eye"), (2, "nose")):
            column, row = np.round(drawn.landmarks[at]).astype(int)
            window = drawn.parsing[row - 3 : row + 4, column - 3 : column + 4]
            assert name in {CELEBA_CLASSES[int(c)] for c in np.unique(window)}


def test_a_positive_yaw_turns_the_face_to_the_right_of_the_image() -> None:
    nose = np.array([[0.0, -0.3, 1.0]], np.float32)
    assert Camera(40, 0, 100, (0, 0)).project(nose)[0, 0] > 0
    turned, back = person(42, 40), person(42, 180)
    assert turned.landmarks is not None
    x = turned.landmarks[:, 0]
    assert x[2] > x[:2].mean()
    assert back.face_box is None and back.landmarks is None
    assert not np.isin(back.parsing, (2, 4, 5, 10, 11, 12)).any()


def test_the_crown_stays_in_the_frame_and_hair_has_the_share_of_real_photos() -> None:
    shares = []
    for seed, length in enumerate(("men", "women_short", "bob", "men")):
        hair = person(seed, length=length).parsing == HAIR
        top = int(np.flatnonzero(hair.any(axis=1))[0])
        assert 0 < top <= 0.05 * 256
        shares.append(float(hair.mean()))
    assert 0.04 < np.mean(shares) < 0.15


def test_a_polygon_of_the_parsing_covers_the_same_hair() -> None:
    for seed, yaw, length in ((1, 0, "long"), (2, 35, "bob"), (5, 180, "medium")):
        hair = person(seed, yaw, 512, length=length).parsing == HAIR
        rings = mask_rings(hair, 512 / 320)
        assert iou(filled(rings, 512), hair) >= 0.95
        assert 25 <= len(rings[0]) <= 250


def test_a_hole_in_a_mask_stays_a_hole_in_its_ring() -> None:
    mask = np.zeros((200, 200), np.uint8)
    cv2.circle(mask, (100, 100), 80, 1, -1)
    cv2.circle(mask, (110, 90), 30, 0, -1)
    rings = mask_rings(mask, 1.0)
    assert len(rings) == 1
    assert iou(filled(rings, 200), mask) > 0.97


def test_a_blurred_face_is_smooth_inside_and_untouched_outside() -> None:
    drawn = person(42, length="men", bangs="none")
    assert drawn.face_box is not None
    x0, y0, x1, y1 = drawn.face_box
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    ring = np.stack([(x0 + x1) / 2 + (x1 - x0) * 0.35 * np.cos(angle), (y0 + y1) / 2 + (y1 - y0) * 0.35 * np.sin(angle)], axis=1)
    blurred = blur_face(drawn.image, ring.astype(np.float32))
    inside = filled([ring.astype(np.float32)], 256) > 0
    assert np.array_equal(blurred[~inside], drawn.image[~inside])
    core = cv2.erode(inside.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    rough = [np.abs(cv2.Laplacian(i.astype(np.float32), cv2.CV_32F))[core].mean() for i in (blurred, drawn.image)]
    assert rough[0] < 0.25 * rough[1]


# ---- hairstyles can be told apart ----


def strand_angles(drawn: Portrait) -> NDArray[np.float64]:
    """Share of hair edges in 18 directions, from the structure tensor's gradient."""
    gray = cv2.cvtColor(drawn.image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    dx, dy = cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1)
    inside = cv2.erode((drawn.parsing == HAIR).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    angle = np.mod(np.arctan2(dy, dx), np.pi)[inside]
    counts, _ = np.histogram(angle, 18, (0, np.pi), weights=np.hypot(dx, dy)[inside])
    return counts / counts.sum()


def test_strand_directions_spread_as_the_curl_class_grows() -> None:
    entropy = np.zeros(4)
    for seed in range(3):
        for curl in range(4):
            share = strand_angles(person(seed + 20, 180, length="long", volume=1, colour="natural brown", curl=curl))
            entropy[curl] += -(share * np.log(share + 1e-12)).sum() / 3
    assert (np.diff(entropy[:3]) > 0.02).all()
    assert entropy[3] > entropy[1] + 0.02


def test_coils_of_the_tight_class_are_smaller_than_open_curls() -> None:
    """Hair hangs down on a back view, so a coil shows as light and dark along the columns."""
    fine = np.zeros(4)
    for seed in range(3):
        for curl in (2, 3):
            drawn = person(seed + 20, 180, length="long", volume=1, colour="natural brown", curl=curl)
            gray = cv2.cvtColor(drawn.image, cv2.COLOR_RGB2GRAY).astype(np.float32)
            inside = cv2.erode((drawn.parsing == HAIR).astype(np.uint8), np.ones((15, 15), np.uint8)) > 0
            levels = [cv2.GaussianBlur(gray, (1, 41), sigmaX=0.1, sigmaY=sigma) for sigma in (0.8, 1.6, 3.2, 6.4)]
            fine[curl] += (levels[0] - levels[1])[inside].std() / (levels[2] - levels[3])[inside].std() / 3
    assert fine[3] > 1.15 * fine[2]


@pytest.mark.parametrize("length", ["men", "long"])
def test_volume_grows_the_hair_area(length: str) -> None:
    area = np.zeros(3)
    for seed in range(3):
        for volume in range(3):
            area[volume] += (person(seed + 30, 15, 128, length=length, curl=1, volume=volume).parsing == HAIR).sum()
    assert area[1] > 1.08 * area[0]
    assert area[2] > 1.08 * area[1]


def test_the_drawn_hair_has_the_colour_of_its_class() -> None:
    def mean(colour: str) -> NDArray[np.float64]:
        drawn = person(50, length="bob", colour=colour, curl=0)
        return drawn.image[drawn.parsing == HAIR].mean(axis=0)

    black, red, yellow = mean("black"), mean("red-brown"), mean("yellow-brown")
    assert black.max() < 60 < yellow[0]
    assert red[0] > 1.5 * red[1]
    assert yellow[1] > red[1] + 20


# ---- the set on disk ----


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("khairstyle")
    manifest = write_khairstyle(root / "images", root / "labels", heads=HEADS, views=VIEWS, size=SIZE, seed=3)
    return root / "images", root / "labels", manifest


def labels_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))]


def photos_of(folder: Path) -> list[Path]:
    found = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    return [p for p in found if p.read_bytes()[:3] == b"\xff\xd8\xff"]


def test_files_lie_and_are_named_as_in_the_dataset(written: tuple[Path, Path, dict[str, Any]]) -> None:
    images, labels, manifest = written
    extra = 3  # truncated, without hair, with blank values
    assert len(photos_of(images)) == manifest["photos"] + extra == (HEADS + 2) * VIEWS + extra
    assert len(labels_of(labels)) == manifest["photos"] + extra + 1  # and an orphan
    assert {p.suffix for p in photos_of(images)} == {".jpg", ".JPG", ".jpeg"}
    for label in labels_of(labels):
        folder = images / label["path"].lstrip("/")
        assert folder.is_dir()
        assert folder.name.split(".")[1] == label["source"]
        assert folder.parent.name.split(".")[1] == label["basestyle"]


def test_labels_hold_rings_as_strings_and_lie_on_the_hair(written: tuple[Path, Path, dict[str, Any]]) -> None:
    images, labels, manifest = written
    stems = {p.stem: p for p in photos_of(images)}
    faced = 0
    for label in labels_of(labels):
        stem = Path(label["filename"]).stem
        if stem not in manifest["truth"]:
            continue
        rings = json.loads(label["polygon1"])
        points = np.array([[p["x"], p["y"]] for ring in rings for p in ring])
        assert points.min() >= 0 and points.max() < SIZE
        inside = filled([np.array([[p["x"], p["y"]] for p in ring], np.float32) for ring in rings], SIZE) > 0
        image = cv2.cvtColor(cv2.imread(str(stems[stem])), cv2.COLOR_BGR2RGB)
        assert np.abs(image[inside].mean(axis=0) - np.array(json.loads(label["rgb"]))).max() < 20
        truth = manifest["truth"][stem]
        assert (json.loads(label["polygon2"]) != []) == (abs(truth["yaw"]) <= 100)
        faced += bool(json.loads(label["polygon2"]))
    assert faced > 0


def test_label_values_say_what_was_drawn(written: tuple[Path, Path, dict[str, Any]]) -> None:
    _, labels, manifest = written
    curl = {"X": 0, "J": 1, "C": 1, "CC": 1, "S": 2, "SC": 2, "CS": 2, "SS": 3, "S3": 3}
    width = {"얇음": 0, "보통": 1, "굵음": 2}
    phases: dict[str, set[str]] = {}
    for label in labels_of(labels):
        truth = manifest["truth"].get(Path(label["filename"]).stem)
        if truth is None:
            continue
        phases.setdefault(label["source"], set()).add(label["before-after"])
        assert label["before-after"] == truth["phase"]
        assert label["front"] is (truth["yaw"] == 0)
        assert label["horizontal"] == int(truth["yaw"]) % 360
        if truth["phase"] == "after":
            assert curl[label["curl"]] == truth["curl"]
            assert width[label["hair-width"]] == truth["volume"]
    assert {"before", "after"} in phases.values()


def test_heads_stand_apart_and_one_client_is_filed_twice(written: tuple[Path, Path, dict[str, Any]]) -> None:
    images, _, _ = written
    numbers: dict[str, list[int]] = {}
    for folder in images.glob("*/*/*"):
        number, name = folder.name.split(".")
        numbers.setdefault(name.rstrip("0123456789"), []).append(int(number))
    gaps = [int(g) for found in numbers.values() for g in np.diff(sorted(found))]
    assert sum(g <= 16 for g in gaps) == 1


def test_the_known_oddities_are_there(written: tuple[Path, Path, dict[str, Any]]) -> None:
    images, labels, _ = written
    photos = {p.stem for p in photos_of(images)}
    names = {p.name for p in images.rglob("*")}
    found = labels_of(labels)
    in_disguise = [p for p in images.rglob("*.jpg") if p.read_bytes()[:1] == b"{"]
    assert len(in_disguise) == 1
    assert in_disguise[0].read_bytes() in [p.read_bytes() for p in labels.rglob("*.json")]
    assert sum(Path(label["filename"]).stem not in photos for label in found) == 1  # an orphan
    assert any(label["filename"] not in names and Path(label["filename"]).stem in photos for label in found)  # another case
    assert any(label["polygon1"] == "[]" for label in found)
    assert any(None in label.values() and "nan" in label.values() and "" in label.values() for label in found)
    assert any(min(map(len, json.loads(label["polygon1"])), default=9) < 3 for label in found)
    assert any(cv2.imread(str(p)) is None or p.read_bytes()[-2:] != b"\xff\xd9" for p in photos_of(images))


def test_the_set_is_byte_equal_for_a_seed(written: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    images, labels, _ = written
    shot = next(khairstyle_set._shots(next(iter(khairstyle_set._sources(HEADS, 3))), 0, VIEWS, SIZE, 3))
    photo, label = khairstyle_set.shoot(shot)
    assert next(images.rglob(f"{shot.stem}.*")).read_bytes() == photo
    stored = next(labels.rglob(f"{shot.stem.replace('-', '_')}.json"))
    assert json.loads(stored.read_text(encoding="utf-8")) == label


def test_classes_are_balanced_over_the_demo_heads() -> None:
    sources = list(khairstyle_set._sources(khairstyle_set.DEMO["heads"], khairstyle_set.DEMO["seed"]))
    cells = np.zeros((4, 3), int)
    intact, before = np.zeros(4, int), np.zeros(4, int)
    for source in sources:
        cells[source.hair.curl, source.hair.volume] += 1
        intact[source.hair.curl] += source.intact
        before[source.hair.curl] += source.before is not None
    assert cells.max() - cells.min() <= 1
    assert intact.min() > 0 and before.min() > 0  # no class is told by an intact face or a photo from before
    assert len({source.hair.colour for source in sources}) == 9


@pytest.mark.parametrize(("size", "seeds"), [(512, range(70, 74)), (1024, [78])])
def test_a_blurred_face_is_told_from_an_intact_one(size: int, seeds: Sequence[int]) -> None:
    for seed in seeds:
        drawn = person(seed, (0, 30, -30, 60)[seed % 4], size, bangs=("none", "see_through", "full")[seed % 3])
        ring = khairstyle_set.face_ring(drawn)
        assert ring is not None
        face = filled([ring], size) * np.uint8(255)
        hair = filled(mask_rings(drawn.parsing == HAIR, size / 320), size) * np.uint8(255)  # as coarse as a label's polygon
        assert not is_blurred(filed(drawn.image), face, hair), seed
        assert is_blurred(filed(blur_face(drawn.image, ring)), face, hair), seed


def test_the_person_of_the_readme_s_first_picture_is_in_the_demo() -> None:
    """The photo that README tries hair on: seen from the front, with an intact face, of a head that the demo does not train on."""
    said = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
    (stem,) = set(re.findall(r"images/\*/\*/\*/([A-Z]+\d+-\d+)\.jpg", said))
    heads, seed = khairstyle_set.DEMO["heads"], khairstyle_set.DEMO["seed"]
    sources = [*khairstyle_set._sources(heads, seed), *khairstyle_set._ab_pair(heads, seed)]
    shots = [
        shot
        for number, source in enumerate(sources)
        for shot in khairstyle_set._shots(source, number, khairstyle_set.DEMO["views"], khairstyle_set.DEMO["size"], seed)
    ]
    number, shot = next((number, shot) for number, shot in enumerate(shots, 1) if shot.stem == stem)
    assert shot.source.intact and shot.yaw == 0 and shot.phase == "after"
    assert number % 23 != 5 and number % 31 != 7, "its suffix is .jpg, not .JPG or .jpeg"
    config = load_config(REPO_ROOT / "configs/demo.yaml")
    folders = [folders_of(Path(source.folder) / "x.jpg") for source in sources]
    records = [
        SplitRecord(source.name, source.name, source.prefix, folder.index, folder.basestyle, None, None)
        for source, folder in zip(sources, folders, strict=True)
    ]
    assert assign_splits(records, seed=config.data.seed, fractions=config.data.split)[shot.source.name][1] == "test"
    for picture in re.findall(r"backend/app/static/gallery/\S+\.webp", said):
        assert (REPO_ROOT / picture).is_file()


def test_demo_data_builds_again_what_a_newer_checkout_has_changed_and_leaves_alone_what_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were trained anew must reach a folder that an older checkout has filled; weights from elsewhere must not be touched."""
    places = {"data.images": "photos", "data.labels": "labels", "paths.weights": "weights"}
    config = load_config(REPO_ROOT / "configs/demo.yaml", [f"{key}={tmp_path / name}" for key, name in places.items()])
    calls = []
    monkeypatch.setattr(world, "write_khairstyle", lambda *_, **__: calls.append("set"))

    def build(folder: Path) -> None:
        calls.append("weights")
        artifacts.write_bytes(folder / "face/yolov8n-face.onnx", b"")

    monkeypatch.setattr(world, "build", build)
    world.build_world(config)
    world.build_world(config)
    assert calls == ["set", "weights"]
    monkeypatch.setattr(world, "weights_mark", lambda: {"weights": "newer"})
    world.build_world(config)
    assert calls == ["set", "weights", "weights"]
    monkeypatch.setattr(world, "renderer_version", lambda: "newer")
    world.build_world(config)
    assert calls == ["set", "weights", "weights", "set"]
    (tmp_path / "weights" / world.MARK).unlink()
    monkeypatch.setattr(world, "weights_mark", lambda: {"weights": "newest"})
    world.build_world(config)
    assert calls == ["set", "weights", "weights", "set"]
