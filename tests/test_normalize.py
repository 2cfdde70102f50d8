"""Downloads to the documented folders: names repaired, duplicates dropped, nothing written outside, nothing lost."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from backend.errors import MissingInputError
from backend.training.data_processing.khairstyle import index_dataset
from backend.training.data_processing.normalize_khairstyle import main, normalize

HEAD = "0002.mqset/0001.가르마/0126.CP032677"


def jpeg(seed: int) -> bytes:
    return cv2.imencode(".jpg", np.random.default_rng(seed).integers(0, 255, (12, 12, 3), np.uint8))[1].tobytes()


def label(view: int, **more: object) -> bytes:
    return json.dumps({"filename": f"CP032677-{view:03d}.jpg", "basestyle": "가르마", **more}, ensure_ascii=False).encode()


class RawName(zipfile.ZipInfo):
    """An entry whose name is stored as raw bytes without the UTF-8 flag, as the released archives have it."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:
        return self.filename.encode("cp437"), self.flag_bits


def put(archive: zipfile.ZipFile, name: str, content: bytes, *, encoding: str = "utf-8", mode: int = 0o100644) -> None:
    info = RawName(name.encode(encoding).decode("cp437"))
    info.external_attr = mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, content)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """Two archives and an unpacked validation part, as they come."""
    folder = tmp_path / "download"
    folder.mkdir()
    with zipfile.ZipFile(folder / "images_mqset001_train.zip", "w") as archive:
        put(archive, f"mqset/images/{HEAD}/CP032677-001.jpg", jpeg(1))
        put(archive, f"mqset/images/{HEAD}/CP032677-002.JPG", jpeg(2))
        put(archive, "mqset/images/Thumbs.db", b"\0\1")
    with zipfile.ZipFile(folder / "labels_mqset_train.zip", "w") as archive:
        put(archive, f"mqset/labels/{HEAD}/CP032677-001.jpg", label(1))  # repeats the next one, and comes first
        put(archive, f"mqset/labels/{HEAD}/CP032677_001.json", label(1))
        put(archive, f"mqset/labels/{HEAD}/CP032677-002.jpg", label(2))  # the only copy
        put(archive, f"mqset/labels/{HEAD}/CP032677.zip", b"PK\x05\x06" + b"\0" * 18)
    validation = folder / "Validation" / "원천데이터" / HEAD
    validation.mkdir(parents=True)
    (validation / "CP032677-003.jpeg").write_bytes(jpeg(3))
    (validation / "CP032677_003.json").write_bytes(label(3))
    return folder


def test_a_download_is_sorted(download: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    report = normalize([download], out)
    assert files(out) == {
        f"training/images/{HEAD}/CP032677-001.jpg": jpeg(1),
        f"training/images/{HEAD}/CP032677-002.JPG": jpeg(2),
        f"training/labels/{HEAD}/CP032677_001.json": label(1),
        f"training/labels/{HEAD}/CP032677_002.json": label(2),
        f"validation/images/{HEAD}/CP032677-003.jpeg": jpeg(3),
        f"validation/labels/{HEAD}/CP032677_003.json": label(3),
    }
    assert (report["inputs"], report["written"], report["renamed"]) == (9, 6, 1)
    assert [row["path"].rpartition("/")[2] for row in report["duplicates"]] == ["CP032677-001.jpg"]
    assert [row["reason"] for row in report["ignored"]] == ["system_file", "per_source_bundle"]
    assert report["refused"] == report["conflicts"] == []
    assert len(index_dataset(out / "training/images", out / "training/labels").pairs) == 2


@pytest.mark.parametrize("edition", ["0001.hqset", "0002.mqset", "0003.rawset"])
@pytest.mark.parametrize(
    "places",
    [
        ("mqset/images/{}", "mqset/labels/{}"),  # the authors' zips
        ("K-Hairstyle/Training/rawset/images/{}", "K-Hairstyle/Training/rawset/labels/{}"),
        ("원천데이터/{}", "라벨링데이터/{}"),  # AI-Hub
        ("{}", "{}"),  # photos and labels in one folder
    ],
)
def test_every_edition_in_every_packaging_goes_to_its_folder(tmp_path: Path, edition: str, places: tuple[str, str]) -> None:
    head = f"{edition}/0001.가르마/0126.CP032677"
    path = tmp_path / "download.zip"
    with zipfile.ZipFile(path, "w") as archive:
        put(archive, f"{places[0].format(head)}/CP032677-001.jpg", jpeg(1))
        put(archive, f"{places[1].format(head)}/CP032677_001.json", label(1))
    normalize([path], tmp_path / "data")
    assert files(tmp_path / "data") == {
        f"training/images/{head}/CP032677-001.jpg": jpeg(1),
        f"training/labels/{head}/CP032677_001.json": label(1),
    }


def test_dry_run_writes_nothing_and_says_the_same(download: Path, tmp_path: Path) -> None:
    planned = normalize([download], tmp_path / "data", dry_run=True)
    assert not (tmp_path / "data").exists()
    assert planned == normalize([download], tmp_path / "data")


def test_a_rerun_writes_only_what_is_missing_or_torn(download: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    normalize([download], out)
    before = files(out)
    torn, gone = (out / name for name in list(before)[:2])
    torn.write_bytes(before[torn.relative_to(out).as_posix()][:-3])
    gone.unlink()
    stamps = {name: (out / name).stat().st_mtime_ns for name in list(before)[2:]}
    report = normalize([download], out)
    assert (report["written"], report["unchanged"]) == (2, 4)
    assert files(out) == before
    assert {name: (out / name).stat().st_mtime_ns for name in stamps} == stamps


@pytest.mark.parametrize("encoding", ["utf-8", "cp949"])
def test_korean_names_read_as_cp437(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        put(archive, f"{HEAD}/CP032677-001.jpg", jpeg(1), encoding=encoding)
    assert zipfile.ZipFile(path).namelist() != [f"{HEAD}/CP032677-001.jpg"]
    normalize([path], tmp_path / "data")
    assert list(files(tmp_path / "data")) == [f"training/images/{HEAD}/CP032677-001.jpg"]
    unpacked = tmp_path / "tree"
    zipfile.ZipFile(path).extractall(unpacked)
    if encoding == "utf-8":  # a tree that a zip tool garbled
        assert normalize([unpacked], tmp_path / "data", dry_run=True)["unchanged"] == 1


def test_hostile_entries_are_refused_and_nothing_leaves_the_folder(tmp_path: Path) -> None:
    path, out = tmp_path / "x.zip", tmp_path / "inner" / "data"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../../../evil.jpg", "/evil.jpg", "C:/evil.jpg", "a\\..\\..\\evil.jpg", "0001.x/../../evil.jpg"):
            put(archive, name, jpeg(1))
        put(archive, "link.jpg", b"/etc/passwd", mode=stat.S_IFLNK | 0o777)
        put(archive, "bomb.json", b"{" + b" " * 5_000_000 + b"}")
        put(archive, "0126.CP032677/CP032677-001.jpg", jpeg(2))
    report = normalize([path], out)
    assert sorted(row["reason"] for row in report["refused"]) == ["archive_bomb", "link"] + ["unsafe_name"] * 5
    assert list(files(tmp_path)) == ["inner/data/training/images/0126.CP032677/CP032677-001.jpg", "x.zip"]
    assert report["inputs"] == 8


def test_an_archive_that_unpacks_to_much_more_than_it_is_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(40):
            put(archive, f"{number}.json", b"{" + b" " * 200_000 + b"}")
    report = normalize([path], tmp_path / "data")
    assert [row["reason"] for row in report["refused"]] == ["archive_bomb"]


def test_damaged_and_encrypted_entries_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        put(archive, "a.jpg", jpeg(1))
        put(archive, "b.jpg", jpeg(2))
    content = bytearray(path.read_bytes())
    content[content.index(b"a.jpg") + 100] ^= 0xFF
    at = content.rindex(b"PK\x01\x02")
    content[at + 8] |= 1  # the encryption flag of b.jpg
    path.write_bytes(content)
    report = normalize([path], tmp_path / "data")
    assert {row["path"].rpartition("!")[2]: row["reason"] for row in report["refused"]} == {
        "a.jpg": "unreadable",
        "b.jpg": "encrypted",
    }
    assert not (tmp_path / "data").exists()


def test_two_contents_for_one_place_are_a_conflict(tmp_path: Path) -> None:
    for part, view in (("a", 1), ("b", 2)):
        (tmp_path / part / "0126.CP032677").mkdir(parents=True)
        (tmp_path / part / "0126.CP032677/CP032677-001.jpg").write_bytes(jpeg(view))
    report = normalize([tmp_path / "a", tmp_path / "b"], tmp_path / "data")
    assert list(files(tmp_path / "data").values()) == [jpeg(1)]
    assert [row["reason"] for row in report["conflicts"]] == ["other_content"]


def test_command_line(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(download), "--out", str(tmp_path / "data"), "--report", str(tmp_path / "report.json")]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 6
    assert len(json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["duplicates"]) == 1
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "data")]) == 1
    with pytest.raises(MissingInputError, match=r"report\.json"):
        normalize([tmp_path / "report.json"], tmp_path / "data")
