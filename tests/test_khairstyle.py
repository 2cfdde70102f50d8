"""Reading K-Hairstyle: the index over every oddity of the released set, and label readers that nothing can crash."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend.errors import MissingInputError
from backend.training.data_processing import labels as label_module
from backend.training.data_processing.khairstyle import (
    REASONS,
    Index,
    LabelError,
    Pair,
    index_dataset,
    parse_polygon,
    read_label,
    sniff,
)
from backend.training.data_processing.names import folders_of, photo_id, repaired, stem_key
from backend.training.prepare_photo import PHOTO_REASONS, PhotoSettings, process

RING = [(100.0, 50.0), (300.5, 60.0), (280.0, 240.0), (120.0, 220.25)]
FACE = [(150.0, 120.0), (250.0, 120.0), (200.0, 230.0)]
FUZZED = int(os.environ.get("DEEPHAIR_FUZZ", "2000"))  # files of the long fuzz; issue 4's own size is DEEPHAIR_FUZZ=20000


def points(ring: list[tuple[float, float]]) -> list[dict[str, float]]:
    return [{"x": x, "y": y} for x, y in ring]


def jpeg(seed: int = 0, side: int = 16) -> bytes:
    picture = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(picture, (side, side)))[1].tobytes()


def label(filename: str | None, **changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": "6f1c", "source": (filename or "").split("-")[0], "filename": filename, "width": 512, "height": 512,
        "polygon1": json.dumps([points(RING)]), "polygon2": json.dumps([points(FACE)]), "rgb": "[40, 30, 20]",
        "basestyle": "허쉬", "length": "장발", "curl": "S", "bang": "시스루", "sex": "여", "age": 24,
        "hair-width": "굵음",
        "front": False, "horizontal": 45, "vertical": "상", "before-after": "after", "user-stisfied": 5, "comment": "",
    }  # fmt: skip
    return {key: value for key, value in (record | changes).items() if value is not ...}


def write(path: Path, content: bytes | dict[str, Any] | list[Any] | str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (dict, list)):
        content = json.dumps(content, ensure_ascii=False)
    path.write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    return path


def read_one(folder: Path, record: Any, *, name: str = "CP032677-001.jpg", encoding: str = "utf-8") -> Any:
    photo = write(folder / name, jpeg())
    return read_label(Pair(photo, write(folder / "label.json", record, encoding)))


def reasons(index: Index) -> dict[str, str]:
    return {item.path.name: item.reason for item in index.rejected}


# ---- the index ----------------------------------------------------------------------------------


@pytest.fixture
def oddities(tmp_path: Path) -> tuple[Path, Path, dict[str, str], dict[str, str]]:
    """A tree with every oddity of the released set; expected pairs (photo -> label) and reasons (file -> code)."""
    images, labels = tmp_path / "images", tmp_path / "labels"
    sub = Path("0002.mqset/0030.허쉬/0126.CP032677")
    pairs: dict[str, str] = {}
    rejected: dict[str, str] = {}

    def photo(name: str, where: Path = sub) -> None:
        write(images / where / name, jpeg(len(pairs)))

    photo("CP032677-001.jpg")
    write(labels / sub / "CP032677_001.json", label("CP032677-001.jpg"))
    pairs["CP032677-001.jpg"] = "CP032677_001.json"
    # the same label again under the photo's name
    write(labels / sub / "CP032677-001.jpg", label("CP032677-001.jpg"))
    rejected["labels/CP032677-001.jpg"] = "duplicate_label"
    # .JPG and .jpeg where the label says .jpg
    for number, name in ((2, "CP032677-002.JPG"), (3, "CP032677-003.jpeg")):
        photo(name)
        write(labels / sub / f"CP032677_{number:03d}.json", label(f"CP032677-{number:03d}.jpg"))
        pairs[name] = f"CP032677_{number:03d}.json"
    # the label's own name lies, its filename counts
    photo("CP032677-004.jpg")
    write(labels / sub / "CP032677_999.json", label("CP032677-004.jpg"))
    pairs["CP032677-004.jpg"] = "CP032677_999.json"
    # no filename: by the stem, '-' for '_', any case
    photo("cp032677-005.jpg")
    write(labels / sub / "CP032677_005.json", label(""))
    pairs["cp032677-005.jpg"] = "CP032677_005.json"
    # the only label has a photo's name
    photo("CP032677-006.png")
    write(labels / sub / "CP032677-006.jpg", label("CP032677-006.png"))
    pairs["CP032677-006.png"] = "CP032677-006.jpg"
    # a folder in NFD, as macOS writes it
    photo("JS000001-001.jpg", Path(unicodedata.normalize("NFD", "0002.mqset/0030.허쉬/0127.JS000001")))
    write(labels / "0002.mqset/0030.허쉬/0127.JS000001/JS000001_001.json", label("JS000001-001.jpg"))
    pairs["JS000001-001.jpg"] = "JS000001_001.json"
    # broken JSON keeps its place beside its photo (read_label tells the reason)
    photo("CP032677-007.jpg")
    write(labels / sub / "CP032677_007.json", b'{"filename": "CP032677-007.jpg", ')
    pairs["CP032677-007.jpg"] = "CP032677_007.json"

    photo("CP032677-008.jpg")
    rejected["CP032677-008.jpg"] = "no_label"
    write(labels / "0002.mqset/0011.바디/4323.JSS912.63/JSS912_001.json", label("JSS912-001.jpg"))
    rejected["JSS912_001.json"] = "orphan_label"
    write(images / sub / "CP032677-009.jpg", b"\0" * 2000)
    rejected["CP032677-009.jpg"] = "not_an_image"
    write(labels / sub / "CP032677_009.json", label("CP032677-009.jpg"))  # one input with its photo
    write(labels / sub / "CP032677.zip", b"PK\x03\x04" + b"\0" * 40)
    rejected["CP032677.zip"] = "archive"
    write(images / sub / ".DS_Store", b"\0\0\0\1Bud1")
    rejected[".DS_Store"] = "foreign"
    write(images / "validation" / "CP032677-002.jpg", jpeg(99))
    rejected["CP032677-002.jpg"] = "duplicate_id"
    (images / sub / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    rejected["gone.jpg"] = "unreadable"
    (images / sub / "round").symlink_to("round")
    rejected["round"] = "unreadable"
    os.mkfifo(images / sub / "pipe.jpg")
    rejected["pipe.jpg"] = "unreadable"
    (images / sub / "up").symlink_to(images, target_is_directory=True)  # a loop: entered once
    write(labels / sub / "CP032677_010.json", b"\xff\xfe\xff\x80")
    rejected["CP032677_010.json"] = "bad_encoding"
    write(labels / sub / "empty.json", b"  \n")
    rejected["empty.json"] = "empty_label"
    return images, labels, pairs, rejected


def test_every_oddity_is_one_input(oddities: tuple[Path, Path, dict[str, str], dict[str, str]]) -> None:
    images, labels, pairs, rejected = oddities
    index = index_dataset(images, labels)
    assert {pair.photo.name: pair.label.name for pair in index.pairs} == pairs
    expected = Counter((Path(name).name, reason) for name, reason in rejected.items())
    assert Counter((item.path.name, item.reason) for item in index.rejected) == expected
    assert index.inputs == len(pairs) + len(rejected)
    assert {item.reason for item in index.rejected} <= REASONS.keys()
    assert list(index.pairs) == sorted(index.pairs, key=lambda pair: str(pair.photo))


def test_one_root_for_both_gives_the_same_pairs(oddities: tuple[Path, Path, dict[str, str], dict[str, str]]) -> None:
    images, labels, pairs, _ = oddities
    seen: list[int] = []
    index = index_dataset(images.parent, images.parent, progress=seen.append)
    assert {pair.photo.name: pair.label.name for pair in index.pairs} == pairs
    assert index == index_dataset(images.parent, labels)  # one root below the other
    assert seen == []  # fewer than a thousand files


def test_missing_folder_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nowhere"):
        index_dataset(tmp_path / "nowhere", tmp_path)


def test_label_of_another_edition_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path / "images/0002.mqset/CP000001-001.jpg", jpeg())
    write(tmp_path / "labels/0001.hqset/CP000001_001.json", label("CP000001-001.jpg"))
    index = index_dataset(tmp_path / "images", tmp_path / "labels")
    assert reasons(index) == {"CP000001-001.jpg": "no_label", "CP000001_001.json": "orphan_label"}
    right = write(tmp_path / "labels/0002.mqset/CP000001_001.json", label("CP000001-001.jpg"))
    assert [pair.label for pair in index_dataset(tmp_path / "images", tmp_path / "labels").pairs] == [right]


def test_two_photos_of_one_name_take_the_label_beside_them(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        write(tmp_path / part / "images/0126.CP032677/CP032677-001.jpg", jpeg())
        write(tmp_path / part / "labels/0126.CP032677/CP032677_001.json", label("CP032677-001.jpg"))
    index = index_dataset(tmp_path, tmp_path)
    assert [(pair.photo.parts[-4], pair.label.parts[-4]) for pair in index.pairs] == [("training", "training")]
    assert [(item.path.parts[-4], item.reason) for item in index.rejected] == [("validation", "duplicate_id")]


def test_a_camera_name_falls_back_to_the_labels_own_name_and_another_view_does_not(tmp_path: Path) -> None:
    write(tmp_path / "CP000001-001.jpg", jpeg())
    write(tmp_path / "CP000001_001.json", label("IMG_0001.JPG"))
    write(tmp_path / "CP000001-002.jpg", jpeg())
    write(tmp_path / "CP000001_002.json", label("CP000001-003.jpg"))
    index = index_dataset(tmp_path, tmp_path)
    assert [pair.photo.name for pair in index.pairs] == ["CP000001-001.jpg"]
    assert reasons(index) == {"CP000001-002.jpg": "no_label", "CP000001_002.json": "orphan_label"}


def test_sample_packs_one_list(tmp_path: Path) -> None:
    flat = json.dumps(points(RING))
    entries: list[Any] = [{"file_name": f"img{number:02d}.jpg", "polygon1": flat} for number in range(1, 5)]
    entries[0]["polygon2"] = json.dumps(points(FACE))
    write(tmp_path / "label.json", {"annotation": [*entries, "nothing", {"polygon1": flat}]})
    for name in ("img01.jpg", "img02.JPG", "img03.JPG"):
        write(tmp_path / name, jpeg())
    index = index_dataset(tmp_path, tmp_path)
    assert [(pair.photo.name, pair.entry) for pair in index.pairs] == [
        ("img01.jpg", 0),
        ("img02.JPG", 1),
        ("img03.JPG", 2),
    ]
    assert sorted((item.reason, item.detail[:7]) for item in index.rejected) == [
        ("bad_label", "entry 4"), ("bad_label", "entry 5"), ("orphan_label", "gives '"),
    ]  # fmt: skip
    front, back = read_label(index.pairs[0]), read_label(index.pairs[1])
    np.testing.assert_array_equal(front.hair_rings[0], RING)
    np.testing.assert_array_equal(front.face_rings[0], FACE)
    assert (front.id, front.source, front.folder_index, front.phase) == ("img01", "img01", None, None)
    assert back.face_rings == () and set(back.attributes.values()) == {None}
    with pytest.raises(LabelError, match="entry 9") as caught:
        read_label(Pair(index.pairs[0].photo, index.pairs[0].label, 9))
    assert caught.value.reason == "bad_label"


def test_names_that_cannot_be_ids_are_rejected(tmp_path: Path) -> None:
    write(tmp_path / ("a" * 210 + ".jpg"), jpeg())
    (tmp_path / os.fsdecode(b"\xb0\xa1.jpg")).write_bytes(jpeg())
    write(tmp_path / "line\nbreak.jpg", jpeg())
    index = index_dataset(tmp_path, tmp_path)
    assert [item.reason for item in index.rejected] == ["bad_name"] * 3
    for item in index.rejected:
        item.detail.encode("utf-8")


def test_label_over_the_size_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_module, "MAX_LABEL_BYTES", 100)
    write(tmp_path / "CP000001-001.jpg", jpeg())
    write(tmp_path / "CP000001_001.json", label("CP000001-001.jpg"))
    (pair,) = index_dataset(tmp_path, tmp_path).pairs
    with pytest.raises(LabelError) as caught:
        read_label(pair)
    assert caught.value.reason == "too_large"


def test_sniff() -> None:
    assert sniff(jpeg()[:64]) == "photo"
    assert sniff(b"\x89PNG\r\n\x1a\n....") == "photo"
    assert sniff(b"\xef\xbb\xbf \n{") == sniff(b"[") == "label"
    assert (sniff(b"PK\x03\x04"), sniff(b""), sniff(b"\0{")) == ("archive", "empty", "other")


def test_names() -> None:
    assert stem_key("a/b\\CP032677_001.JPG") == stem_key("cp032677-001.json") == "cp032677-001"
    assert photo_id("cp032677_001") == "CP032677-001"
    path = Path("x/0002.mqset/0001.가르마/0126.CP032677/CP032677-001.jpg")
    folders = folders_of(path)
    assert (folders.edition, folders.basestyle, folders.source, folders.index) == ("mqset", "가르마", "CP032677", 126)
    garbled = Path(str(path).encode().decode("cp437"))
    assert folders_of(garbled) == folders
    assert folders_of(Path("0011.바디/4323.JSS912.63/x.json")).source == "JSS912.63"
    assert repaired("Café") == "Café" and repaired("가르마") == "가르마"


# ---- one label ----------------------------------------------------------------------------------


def test_a_whole_label(tmp_path: Path) -> None:
    photo = write(tmp_path / "0002.mqset/0030.허쉬/0126.CP032677/CP032677-001.jpg", jpeg())
    result = read_label(Pair(photo, write(tmp_path / "x.json", label("CP032677-001.jpg"))))
    assert (result.id, result.source, result.prefix, result.folder_index) == ("CP032677-001", "CP032677", "CP", 126)
    assert (result.basestyle_folder, result.size, result.filename) == ("허쉬", (512, 512), "CP032677-001.jpg")
    assert (result.horizontal, result.vertical, result.front, result.phase) == (45.0, "high", False, "after")
    assert result.attributes["age"] == "24" and result.attributes["user-satisfied"] == "5"
    assert result.attributes["damage"] is None
    assert result.hair_rings[0].dtype == np.float64
    np.testing.assert_array_equal(result.hair_rings[0], RING)


def test_both_spellings_of_keys(tmp_path: Path) -> None:
    record = label("CP032677-001.jpg", sex=..., **{"hair-width": "", "hair_width": "얇음", "gender": "남", "basestyle_type": "장"})
    attributes = read_one(tmp_path, record).attributes
    assert (attributes["hair-width"], attributes["sex"], attributes["basestyle-type"]) == ("얇음", "남", "장")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    assert read_one(tmp_path, label("CP032677-001.jpg"), encoding=encoding).attributes["basestyle"] == "허쉬"


@pytest.mark.parametrize("blank", ["", "  ", "nan", "NaN", "none", "null", "na", None, math.nan, []])
def test_blank_values(tmp_path: Path, blank: Any) -> None:
    names = ("curl", "horizontal", "vertical", "front", "before-after", "width", "polygon2")
    result = read_one(tmp_path, label("CP032677-001.jpg", **dict.fromkeys(names, blank)))
    assert (result.attributes["curl"], result.size, result.face_rings) == (None, None, ())
    assert (result.horizontal, result.vertical, result.front, result.phase) == (None, None, None, None)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(360, 0.0), ("90", 90.0), (-1, None), (361, None), ("left", None), (True, None), (10**400, None)],
)
def test_azimuth(tmp_path: Path, raw: Any, expected: float | None) -> None:
    assert read_one(tmp_path, label("CP032677-001.jpg", horizontal=raw)).horizontal == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty_label"),
        (b'{"a": 1', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"age": ' + b"9" * 5000 + b"}", "bad_json"),
        (b'{"a": "\xff\xfe"}', "bad_encoding"),
        (b"17", "bad_label"),
        (b"[]", "bad_label"),
        (b'{"polygon1": 5}', "bad_polygon"),
        (b'{"polygon2": "[{"}', "bad_polygon"),
    ],
)
def test_unusable_labels_say_why(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(LabelError) as caught:
        read_one(tmp_path, content)
    assert caught.value.reason == reason
    again = pickle.loads(pickle.dumps(caught.value))  # it must survive the way back from a worker process
    assert (again.reason, again.detail) == (caught.value.reason, caught.value.detail)


def test_lone_surrogates_do_not_reach_the_output(tmp_path: Path) -> None:
    write(tmp_path / "tree/CP000001_001.json", b'{"filename": "CP\\ud800-001.jpg"}')
    (orphan,) = index_dataset(tmp_path / "tree", tmp_path / "tree").rejected
    assert orphan.reason == "orphan_label"
    orphan.detail.encode("utf-8")
    value = read_one(tmp_path, b'{"comment": 1, "basestyle": "\\ud800x"}').attributes["basestyle"]
    value.encode("utf-8")


# ---- polygons -----------------------------------------------------------------------------------

ENCODINGS: dict[str, Callable[[list[tuple[float, float]]], object]] = {
    "nested": lambda ring: [points(ring)],
    "flat": points,
    "nested text": lambda ring: json.dumps([points(ring)]),
    "flat text": lambda ring: json.dumps(points(ring)),
    "python quotes": lambda ring: repr([points(ring)]),
    "python tuples": lambda ring: repr([tuple(point) for point in ring]),
    "string numbers": lambda ring: json.dumps([[{"x": str(x), "y": f" {y} "} for x, y in ring]]),
    "encoded twice": lambda ring: json.dumps(json.dumps([points(ring)])),
    "quoted whole": lambda ring: f"'{json.dumps([points(ring)])}'",
    "pairs": lambda ring: [[list(point) for point in ring]],
    "rings as text": lambda ring: [json.dumps(points(ring))],
    "upper case": lambda ring: [[{"X": x, "Y": y} for x, y in ring]],
}
finite = st.floats(-2000, 6000, allow_nan=False).map(lambda value: round(value, 3))
rings = st.lists(st.tuples(finite, finite), min_size=3, max_size=30, unique=True)


@settings(max_examples=60, deadline=None)
@given(ring=rings, form=st.sampled_from(sorted(ENCODINGS)))
def test_every_form_of_a_polygon_gives_the_same_ring(ring: list[tuple[float, float]], form: str) -> None:
    (result,) = parse_polygon(ENCODINGS[form](ring))
    np.testing.assert_array_equal(result, np.asarray(ring, np.float64))


@pytest.mark.parametrize("value", [None, "", "[]", "[[]]", "nan", "null", [], [[]], [[], None], math.nan])
def test_no_polygon(value: object) -> None:
    assert parse_polygon(value) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "nan", None, "12px", 1e300, 10**400, True, {}])
def test_points_that_are_no_numbers_are_left_out(bad: Any) -> None:
    broken = points(RING)
    broken.insert(2, {"x": bad, "y": 3.0})
    (ring,) = parse_polygon([broken])
    np.testing.assert_array_equal(ring, RING)
    assert parse_polygon([broken[:2] + broken[2:3]]) == []


def test_rings_are_dropped_or_kept() -> None:
    bow_tie = [(0.0, 0.0), (10.0, 10.0), (10.0, 0.0), (0.0, 10.0)]
    outside = [(600.0, 5.0), (700.0, 5.0), (650.0, 90.0)]
    across = [(-50.0, -5.0), (20.0, 5.0), (30.0, 900.0)]
    two = [(1.0, 1.0), (2.0, 2.0), (1.0, 1.0), (2.0, 2.0)]
    value = [points(ring) for ring in (bow_tie, outside, across, two)]
    assert [len(ring) for ring in parse_polygon(value)] == [4, 3, 3]
    kept = parse_polygon(value, frame=(512, 512))
    np.testing.assert_array_equal(kept[0], bow_tie)
    np.testing.assert_array_equal(kept[1], across)
    assert len(kept) == 2


def test_limits() -> None:
    many = [[0.5 * number, number % 7] for number in range(20_000)]
    assert len(parse_polygon(many)[0]) == 20_000
    too_many: list[Any] = [[*many, [1, 2]], [many, many], [[]] * 20_001]
    for value in too_many:
        with pytest.raises(LabelError) as caught:
            parse_polygon(value)
        assert caught.value.reason == "too_many_points"
    deep: Any = points(RING)
    for _ in range(50):
        deep = [deep]
    unreadable: list[Any] = [deep, "[" * 5000, "(" * 5000, "[{'x': __import__('os')}]", {"x": 1, "y": 2}, 7]
    for value in unreadable:
        with pytest.raises(LabelError) as caught:
            parse_polygon(value)
        assert caught.value.reason == "bad_polygon"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.just({"x": 1, "y": "2"}),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["x", "y", "X", "z"]), inner, max_size=3),
    max_leaves=25,
)


@settings(max_examples=150, deadline=None)
@given(value=json_values | json_values.map(json.dumps) | json_values.map(repr) | st.text(max_size=60))
def test_any_value_gives_rings_or_a_label_error(value: object) -> None:
    try:
        result = parse_polygon(value, frame=(512, 512))
    except LabelError as error:
        assert error.reason in REASONS
        return
    for ring in result:
        assert ring.dtype == np.float64 and ring.ndim == 2 and ring.shape[1] == 2 and len(ring) >= 3
        assert np.isfinite(ring).all()


@settings(max_examples=60, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(label("CP032677-001.jpg"))), json_values, max_size=6))
def test_any_label_gives_a_photo_label_or_a_label_error(changes: dict[str, Any], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    try:
        result = read_one(folder, json.dumps(label("CP032677-001.jpg") | changes))
    except LabelError as error:
        assert error.reason in REASONS
        return
    assert result.id == "CP032677-001"
    json.dumps(result.attributes, allow_nan=False).encode("utf-8")
    assert all(value is None or isinstance(value, str) for value in result.attributes.values())


# ---- fuzz ---------------------------------------------------------------------------------------


def mutated(content: bytes, generator: np.random.Generator) -> bytes:
    """One of: flipped bytes, cut, doubled, a slice moved, a token swapped for a nasty one, another encoding."""
    data = bytearray(content)
    choice = int(generator.integers(6))
    at = int(generator.integers(len(data)))
    if choice == 0:
        for place in generator.integers(0, len(data), int(generator.integers(1, 20))):
            data[place] = int(generator.integers(256))
    elif choice == 1:
        del data[at:]
    elif choice == 2:
        data[at:at] = data[: int(generator.integers(len(data)))]
    elif choice == 3:
        width = int(generator.integers(1, 40))
        moved = data[at : at + width]
        del data[at : at + width]
        data[:0] = moved
    elif choice == 4:
        tokens = [*rb"""NaN 1e999 null [[[[ " \ud800 {} ' -Infinity""".split(), b"\0", b"9" * 5000, b"\xef\xbb\xbf"]
        token = tokens[int(generator.integers(len(tokens)))]
        data[at : at + int(generator.integers(1, 8))] = token
    else:
        return content.decode("utf-8", "replace").encode(["utf-16", "cp949", "utf-8-sig"][int(generator.integers(3))], "replace")
    return bytes(data)


def fuzz(
    folder: Path, count: int, seed: int = 0, batch: int = 60, *, side: int = 16, work: Callable[[Pair], str] | None = None
) -> Counter[str]:
    """Reads ``count`` mutated labels and photos, ``batch`` to a tree; the index accounts for each whatever it holds.

    ``work`` is what is done with a photo that has a label, and returns its outcome; by default its label is read.
    """
    generator = np.random.default_rng(seed)
    photo = jpeg(side=side)
    whole = json.dumps(label("CP000001-001.jpg"), ensure_ascii=False).encode()
    pack = json.dumps({"annotation": [label("CP000001-001.jpg"), {"file_name": "CP000001-002.jpg", "polygon1": "[]"}]}).encode()
    outcomes: Counter[str] = Counter()
    done = 0
    while done < count:
        root = folder / f"batch{done}"
        names = []
        for number in range(min(batch, count - done)):
            kind = int(generator.integers(6))
            original = (whole, whole, whole, pack, photo, photo)[kind]
            suffix = (".jpg", ".json", ".JPG", "")[number % 4] if kind < 5 else ".jpg"  # every sixth is a damaged photo with a label
            name = f"CP000001{'-_'[number % 2]}{int(generator.integers(1, batch)) if kind < 5 else 200 + number:03d}{suffix}"
            write(root / name, mutated(original.replace(b"CP000001-001", f"CP000001-{number:03d}".encode()), generator))
            names.append(name)
            write(root / f"CP000001-{number:03d}.jpeg", photo)  # an intact photo that some labels find
            if kind == 5:
                write(root / f"CP000001_{200 + number:03d}.json", label(f"CP000001-{200 + number:03d}.jpg"))
        done += len(names)
        index = index_dataset(root, root)
        spoken_of = Counter([*(pair.photo for pair in index.pairs), *(item.path for item in index.rejected if item.reason != "bad_label")])
        assert all(spoken_of[root / f"CP000001-{number:03d}.jpeg"] == 1 for number in range(len(names)))
        assert len({(pair.label, pair.entry) for pair in index.pairs}) == len(index.pairs)
        outcomes.update((work or label_outcome)(pair) for pair in index.pairs)
        outcomes.update(item.reason for item in index.rejected)
        shutil.rmtree(root)
    return outcomes


def label_outcome(pair: Pair) -> str:
    try:
        read_label(pair)
    except LabelError as error:
        return error.reason
    return "read"


def test_fuzz(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path, 360)
    assert outcomes.keys() <= REASONS.keys() | {"read"}
    assert outcomes["read"] > 20 and outcomes["bad_json"] > 20  # both sides of the reader were met


class NoFaces:
    """Finds no face: the networks see decoded pixels only, whatever the file held."""

    def detect(self, image: np.ndarray) -> list[Any]:
        assert image.dtype == np.uint8 and image.ndim == 3
        return []


@pytest.mark.long  # the readable files go through the whole of Stage 0
def test_fuzz_of_stage_0(tmp_path: Path) -> None:
    settings = PhotoSettings(
        processed=tmp_path / "processed", images=tmp_path, weights=tmp_path, identity_model="adaface", resolution=64, patch_size=32,
        patches_per_photo=2, patch_min_hair=0.85, bald="two_part", max_pixels=10**7, min_hair_fraction=0.005, seed=0,
    )  # fmt: skip

    def work(pair: Pair) -> str:
        row = process(pair, settings, NoFaces())  # type: ignore[arg-type]
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode("utf-8")
        return str(row.get("reason", "accepted"))

    outcomes = fuzz(tmp_path / "data", FUZZED, side=512, work=work)
    assert outcomes.keys() <= REASONS.keys() | PHOTO_REASONS.keys() | {"accepted"}
    assert min(outcomes[name] for name in ("accepted", "truncated", "bad_json", "bad_polygon", "no_hair_polygon")) > FUZZED // 400, outcomes
