"""The product on the miniature: what is outside the mask stays, what cannot be done is said, and HTTP and command line agree."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from backend.app.engine import LocalEngine
from backend.config import Config
from backend.demo.portraits import render, sample_hairstyle, sample_identity, sample_scene
from backend.errors import UsageError
from backend.imaging.decode import decode_upload, encode_png
from backend.training.data_processing.prompts import NEUTRAL_PROMPT, prompt_from_choice
from backend.tryon.pipeline import TryOn
from backend.tryon.values import Cancelled, TryOnError, TryOnRequest
from tests.app_standin import serving
from tests.conftest import World

SIZE = (1100, 1500)  # height, width


def _portrait(seed: int, yaw: float = 8.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    hair = sample_hairstyle(rng, length="bob", curl=1, volume=1, tied=False, bangs="none")
    return render(sample_identity(seed), hair, sample_scene(rng, camera="mid"), yaw, 512, seed).image


@pytest.fixture(scope="module")
def upload() -> np.ndarray:
    """A landscape photo of 1500 x 1100 with a person in it and noise in every byte, so that a touched pixel shows."""
    height, width = SIZE
    photo = np.full((height, width, 3), 128, np.uint8)
    photo[:, 200:1300] = cv2.resize(_portrait(7), (1100, 1100), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(0).integers(-3, 4, photo.shape)
    return np.clip(photo.astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return _portrait(11, yaw=-20.0)


@pytest.fixture(scope="module")
def config(finished_world: World, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return finished_world.config(paths__jobs=tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def tryon(config: Config) -> TryOn:
    return TryOn.load(config)


def test_outside_the_feathered_mask_every_byte_is_the_uploads(tryon: TryOn, upload: np.ndarray, reference: np.ndarray) -> None:
    steps: list[tuple[int, int]] = []
    result = tryon.run(TryOnRequest(upload, reference, None, seed=3), on_step=lambda done, total: steps.append((done, total)))
    assert result.image.shape == upload.shape and result.mask.shape == upload.shape[:2]
    assert np.array_equal(result.image[result.mask == 0], upload[result.mask == 0])
    assert 0.02 < float((result.mask > 0).mean()) < 0.8
    assert (result.image != upload).any(axis=2)[result.mask > 0.9].mean() > 0.5
    assert steps == [(n, 3) for n in (1, 2, 3)]
    assert result.info["bundle_sha256"] == tryon.bundle_sha256
    assert not any("face" in name or "landmark" in name for name in result.info)  # it is stored, and faces' measurements are not


def test_equal_seeds_paint_equal_pictures_and_other_seeds_others(tryon: TryOn, upload: np.ndarray, reference: np.ndarray) -> None:
    first, again, other = (tryon.run(TryOnRequest(upload, reference, None, seed=seed)).image for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_cancelled_job_stops_within_a_step(tryon: TryOn, upload: np.ndarray, reference: np.ndarray) -> None:
    seen: list[int] = []
    with pytest.raises(Cancelled):
        tryon.run(TryOnRequest(upload, reference, None), on_step=lambda done, _: seen.append(done), cancelled=lambda: len(seen) >= 1)
    assert len(seen) <= 2


def test_photos_that_cannot_be_worked_with_are_explained(tryon: TryOn, upload: np.ndarray, reference: np.ndarray) -> None:
    wall = np.full((400, 400, 3), 120, np.uint8)
    with pytest.raises(TryOnError) as caught:
        tryon.run(TryOnRequest(wall, reference, None))
    assert caught.value.code == "no_face" and caught.value.hint
    with pytest.raises(TryOnError) as caught:
        tryon.run(TryOnRequest(upload, None, None))
    assert caught.value.code == "nothing_to_try"
    with pytest.raises(TryOnError, match="face 9 was chosen"):
        tryon.run(TryOnRequest(upload, reference, None, face=9))
    pair = np.hstack([cv2.resize(_portrait(seed, yaw=0.0), (500, 500)) for seed in (7, 7)])
    with pytest.raises(TryOnError) as caught:
        tryon.run(TryOnRequest(pair, reference, None))
    assert caught.value.code == "many_faces"
    assert tryon.run(TryOnRequest(pair, reference, None, face=1)).image.shape == pair.shape


def _lab(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[where].mean(axis=0)


def test_a_painted_mask_replaces_the_region_to_the_pixel(tryon: TryOn, upload: np.ndarray, reference: np.ndarray) -> None:
    brush = np.zeros(SIZE, np.uint8)
    cv2.circle(brush, (750, 350), 211, 1, -1)  # any value but zero
    result = tryon.run(TryOnRequest(upload, reference, mask=brush))
    changed = (result.image != upload).any(axis=2)
    assert not changed[brush == 0].any() and not result.mask[brush == 0].any()
    core = cv2.erode(brush, np.ones((61, 61), np.uint8)) > 0
    assert (result.mask[core] > 0.99).all() and changed[core].mean() > 0.5  # the whole of it, hair or not
    for wrong, code in ((brush[:-1], "mask_size"), (np.zeros_like(brush), "empty_mask")):
        with pytest.raises(TryOnError) as caught:
            tryon.run(TryOnRequest(upload, reference, mask=wrong))
        assert caught.value.code == code
    beside = np.zeros(SIZE, np.uint8)
    beside[:40, :40] = 255
    with pytest.raises(TryOnError, match="beside the head"):
        tryon.run(TryOnRequest(upload, reference, mask=beside))


def test_colour_only_keeps_the_strands_and_the_outline(tryon: TryOn, upload: np.ndarray, reference: np.ndarray) -> None:
    own = tryon.preview(upload).hair_mask
    result = tryon.run(TryOnRequest(upload, reference, seed=3, mode="colour"))
    assert np.array_equal(result.image[result.mask == 0], upload[result.mask == 0])
    beyond = cv2.dilate(own, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (61, 61)))
    assert not result.mask[beyond == 0].any()  # nothing but the present hair and its soft edge
    core = result.mask > 0.999
    lightness = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[core].astype(float) for image in (upload, result.image)]
    assert np.corrcoef(*lightness)[0, 1] > 0.9  # strand for strand
    full = tryon.run(TryOnRequest(upload, reference, seed=3))
    painted = np.logical_and(full.mask > 0.99, tryon.preview(full.image).hair_mask > 0)
    goal, before, after = _lab(full.image, painted), _lab(upload, core), _lab(result.image, core)
    assert np.linalg.norm(after - goal) < 0.5 * np.linalg.norm(before - goal)


def test_shape_only_keeps_the_own_colour(tryon: TryOn, upload: np.ndarray, reference: np.ndarray) -> None:
    own = _lab(upload, tryon.preview(upload).hair_mask > 0)
    full, shaped = (tryon.run(TryOnRequest(upload, reference, seed=3, mode=mode)) for mode in ("full", "shape"))
    assert np.array_equal(full.mask, shaped.mask)  # the same hair, in another colour
    hair = np.logical_and(full.mask > 0.99, tryon.preview(full.image).hair_mask > 0)
    assert np.linalg.norm(_lab(shaped.image, hair) - own) < 0.5 * np.linalg.norm(_lab(full.image, hair) - own)


def test_strength_begins_with_the_photo(tryon: TryOn, upload: np.ndarray, reference: np.ndarray) -> None:
    """A weak one makes fewer steps and stays nearer to the photo; 1 is what was painted without the setting."""
    steps: list[tuple[int, int]] = []
    results = {
        strength: tryon.run(
            TryOnRequest(upload, reference, seed=3, steps=10, strength=strength), on_step=lambda done, total: steps.append((done, total))
        )
        for strength in (0.0, 0.3, 1.0)
    }
    assert steps == [(1, 1)] + [(n, 3) for n in (1, 2, 3)] + [(n, 10) for n in range(1, 11)]
    both = (results[0.3].mask > 0.99) & (results[1.0].mask > 0.99)
    far = {strength: np.abs(result.image[both].astype(float) - upload[both]).mean() for strength, result in results.items()}
    assert far[0.3] < far[1.0]
    assert np.array_equal(results[1.0].image, tryon.run(TryOnRequest(upload, reference, seed=3, steps=10)).image)


def test_of_what_a_person_brings_nothing_stays_in_the_models_memory(
    config: Config, tryon: TryOn, upload: np.ndarray, reference: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "gallery").mkdir()
    offered = encode_png(_portrait(12))
    (tmp_path / "gallery" / "look.png").write_bytes(offered)
    paths = config.paths.model_copy(update={"jobs": tmp_path / "jobs"})
    own = config.model_copy(update={"paths": paths, "app": config.app.model_copy(update={"gallery": tmp_path / "gallery"})})
    memories = (tryon._references, tryon._painter._remembered)
    kept = [*map(len, memories)]
    with serving(own, load=lambda _: LocalEngine(tryon)) as live:

        def grown(**fields: str | bytes) -> tuple[int, int]:
            done = live.wait(live.post(target=encode_png(upload), steps=1, **fields).json()["id"])
            assert done["state"] == "succeeded", done
            before = tuple(kept)
            kept[:] = map(len, memories)
            return kept[0] - before[0], kept[1] - before[1]

        assert grown(reference=encode_png(reference), prompt="as on my wedding day", color="black") == (0, 0)
        assert not any("wedding" in prompt for prompt in tryon._painter._remembered._values)
        assert grown(reference=offered, prompt="as on my wedding day") == (1, 0)
        assert grown(reference=offered, color="ash brown", bangs="choppy") == (0, 1)
        assert grown(reference=encode_png(reference), color="ash brown", bangs="choppy") == (0, 0)


def test_attributes_become_stage_0s_words() -> None:
    photo = np.zeros((8, 8, 3), np.uint8)
    picked = TryOnRequest(photo, None, length="long", curl="wavy", color="black", bangs="full")
    assert picked.words() == prompt_from_choice("long", "wavy", "black", "full") != NEUTRAL_PROMPT
    assert TryOnRequest(photo, None, "shiny", color="red").words() == f"{prompt_from_choice(colour='red')}, shiny"
    assert (TryOnRequest(photo, None, "shiny").words(), TryOnRequest(photo, photo).words()) == ("shiny", NEUTRAL_PROMPT)
    with pytest.raises(UsageError, match="curl 'kinky' is unknown"):
        TryOnRequest(photo, photo, curl="kinky").check()


INVERSE = {  # how a picture is stored so that the EXIF orientation turns it upright
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
KINDS = ("jpeg", "png", "webp", "alpha", "16 bit", "16 bit grey", "cmyk", "palette")


def _stored(photo: np.ndarray, kind: str, orientation: int) -> bytes:
    """An upload file of which ``photo`` (H, W, 3) is the upright picture, as nearly as the format can say."""
    way = INVERSE[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = Image.fromarray(photo) if way is None else Image.fromarray(photo).transpose(way)
    buffer = io.BytesIO()
    if kind in ("jpeg", "cmyk"):
        (lying.convert("CMYK") if kind == "cmyk" else lying).save(buffer, "JPEG", quality=92, exif=exif)
    elif kind == "webp":
        lying.save(buffer, "WEBP", quality=90, method=0, exif=exif)
    elif kind == "16 bit":  # colour of 16 bits is beyond Pillow's writer
        return cv2.imencode(".png", cv2.cvtColor(photo, cv2.COLOR_RGB2BGR).astype(np.uint16) * 257)[1].tobytes()
    elif kind == "16 bit grey":
        Image.fromarray(np.asarray(lying.convert("L")).astype(np.uint16) * 257).save(buffer, "PNG", exif=exif)
    else:
        mode = {"png": "RGB", "alpha": "RGBA", "palette": "P"}[kind]
        lying.convert(mode).save(buffer, "PNG", compress_level=1, exif=exif)
    return buffer.getvalue()


def preservation_story(tryon: TryOn, reference: np.ndarray, count: int, largest: int, seed: int) -> None:
    """Random uploads: the answer has the upright upload's size, and outside its mask not one byte is another."""
    rng = np.random.default_rng(seed)
    head = _portrait(7)
    painted = 0
    for number in range(count):
        kind, orientation = KINDS[number % len(KINDS)], 1 + (number // len(KINDS) + number) % 8
        orientation = 1 if kind == "16 bit" else orientation
        width = int(300 * (largest / 300) ** rng.uniform())
        height = int(np.clip(width * rng.uniform(0.6, 1.6), 300, min(largest, 24e6 / width)))
        side = int(min(width, height) * rng.uniform(0.7, 1.0))
        photo = np.full((height, width, 3), rng.integers(40, 216, 3), np.uint8)
        x, y = rng.integers(0, width - side + 1), rng.integers(0, height - side + 1)
        photo[y : y + side, x : x + side] = cv2.resize(head, (side, side), interpolation=cv2.INTER_CUBIC)
        noise = rng.integers(0, 5, (height, width, 3), dtype=np.uint8)
        photo = cv2.subtract(cv2.add(photo, noise), np.full_like(noise, 2))
        content = _stored(photo, kind, orientation)
        upright = decode_upload(content, max_pixels=25_000_000)
        assert upright.shape == photo.shape, (kind, orientation)
        if kind in ("png", "alpha", "16 bit"):
            assert np.array_equal(upright, photo), (kind, orientation)
        try:
            result = tryon.run(TryOnRequest(upright, reference, seed=number, steps=1))
        except TryOnError:  # an explained refusal is no picture, so there is nothing to be kept
            continue
        painted += 1
        answer = decode_upload(encode_png(result.image, compression=1), max_pixels=25_000_000)
        difference = np.where(result.mask > 0, 0, np.abs(answer.astype(np.int16) - upright).max(axis=2))
        assert answer.shape == upright.shape and difference.max() == 0, (number, kind, orientation, photo.shape)
        assert (result.mask > 0).any()
    print(f"{painted} of {count} painted, the others refused in words")
    assert painted >= count / 2


def test_uploads_of_any_kind_and_size_are_kept_outside_the_mask(tryon: TryOn, reference: np.ndarray) -> None:
    preservation_story(tryon, reference, 8, largest=900, seed=0)


@pytest.mark.long
def test_two_hundred_uploads_are_kept_outside_the_mask(tryon: TryOn, reference: np.ndarray) -> None:
    preservation_story(tryon, reference, 200, largest=6000, seed=1)


def test_in_a_full_body_photo_the_head_is_found_and_pasted_back(tryon: TryOn, reference: np.ndarray) -> None:
    photo = np.random.default_rng(2).integers(100, 140, (2400, 1500, 3), dtype=np.uint8)
    photo[900:, 500:1000] = (60, 70, 110)  # a body
    photo[300:1000, 400:1100] = cv2.resize(_portrait(7), (700, 700), interpolation=cv2.INTER_CUBIC)
    result = tryon.run(TryOnRequest(photo, reference, steps=1))
    left, top, right, bottom = tryon.preview(photo).faces[0].box
    assert 400 < left < right < 1100 and 300 < top < bottom < 1000 and right - left < 500
    assert np.array_equal(result.image[result.mask == 0], photo[result.mask == 0]) and (result.mask > 0.9).any()
    assert not result.mask[1800:].any()  # legs


@pytest.mark.long  # make test must stay well below its eight minutes
def test_a_job_over_http_gives_the_pipelines_picture(config: Config, tryon: TryOn, upload: np.ndarray, reference: np.ndarray) -> None:
    """The whole contract once, with the real model: post, poll, fetch; the answer is what the pipeline paints."""
    from backend.app.api import create_app

    with TestClient(create_app(config), base_url="http://localhost") as client:
        files = {"target": ("me.png", encode_png(upload), "image/png"), "reference": ("hair.png", encode_png(reference), "image/png")}
        for _ in range(600):
            if client.get("/readyz").status_code == 200:
                break
            time.sleep(0.1)
        posted = client.post("/api/v1/jobs", files=files, data={"seed": "3"})
        assert posted.status_code == 202, posted.text
        place = posted.headers["location"]
        state = {}
        for _ in range(600):
            state = client.get(place).json()
            if state["state"] in ("succeeded", "failed", "cancelled"):
                break
            time.sleep(0.2)
        assert state["state"] == "succeeded", json.dumps(state)
        picture = client.get(f"{place}/result")
        assert picture.headers["content-type"] == "image/png"
        image = decode_upload(picture.content, max_pixels=10**8)
        mask = cv2.imdecode(np.frombuffer(client.get(f"{place}/mask").content, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert image.shape == upload.shape
    assert np.array_equal(image[mask == 0], upload[mask == 0])
    assert np.array_equal(image, tryon.run(TryOnRequest(upload, reference, None, seed=3)).image)


@pytest.mark.long
def test_a_bundle_with_nan_is_refused_over_http_and_the_old_one_serves_on(
    finished_world: World, tmp_path: Path, upload: np.ndarray, reference: np.ndarray
) -> None:
    """Worth its time: the real check, in the real process, behind the real address."""
    from backend.app.api import create_app
    from backend.training.models.bundle import contents_of, load_bundle, write_bundle

    config = finished_world.copy(tmp_path / "world", "models").config()
    files = {"target": ("me.png", encode_png(upload)), "reference": ("hair.png", encode_png(reference))}
    with TestClient(create_app(config), base_url="http://localhost") as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.1)
        before = client.get("/api/v1/models").json()["bundle_sha256"]
        bundle = load_bundle(config.paths.bundle)
        whole = config.paths.bundle.read_bytes()
        with torch.no_grad():
            bundle.model.unet.conv_in.bias[0] = torch.nan
        write_bundle(config.paths.bundle, contents_of(bundle.model, bundle.texture_encoder), bundle.header)
        refused = client.post("/api/v1/models/reload")
        assert (refused.status_code, refused.json()["code"]) == (503, "reload_failed") and "invalid_artifact" in refused.json()["detail"]
        assert client.get("/api/v1/models").json()["bundle_sha256"] == before
        place = client.post("/api/v1/jobs", files=files).headers["location"]
        while (job := client.get(place).json())["state"] in ("queued", "running"):
            time.sleep(0.1)
        assert job["state"] == "succeeded" and job["result"]["bundle_sha256"] == before
        config.paths.bundle.write_bytes(whole)
        assert client.post("/api/v1/models/reload").json()["bundle_sha256"] == before


def test_the_command_does_a_folder_and_names_what_it_cannot(finished_world: World, tmp_path: Path, upload: np.ndarray) -> None:
    from backend.cli import main

    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "me.png").write_bytes(encode_png(upload))
    (photos / "wall.png").write_bytes(encode_png(np.full((400, 400, 3), 120, np.uint8)))
    (photos / "notes.txt").write_text("not a picture")
    arguments = finished_world.arguments()
    settings = [word for setting in arguments[2:] for word in ("--set", setting)]
    command = ["tryon", str(photos), "-o", str(tmp_path / "done"), "--color", "black", "--steps", "1", *arguments[:2], *settings]
    assert main(command) == 3  # done, with rejected items
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["me.png"]
    assert decode_upload((tmp_path / "done" / "me.png").read_bytes(), max_pixels=10**8).shape == upload.shape
    assert main([*command, "--mask", str(photos / "me.png")]) == 2
    assert main(["tryon", str(photos / "me.png"), "-o", str(tmp_path / "x.png"), "--color", "purple", *arguments[:2], *settings]) == 2


@pytest.mark.long
def test_the_command_writes_the_same_picture(
    finished_world: World, tryon: TryOn, tmp_path: Path, upload: np.ndarray, reference: np.ndarray
) -> None:
    for name, image in (("me.png", upload), ("hair.png", reference)):
        (tmp_path / name).write_bytes(encode_png(image))
    arguments = finished_world.arguments()
    settings = [word for setting in arguments[2:] for word in ("--set", setting)]
    command = [sys.executable, "-m", "backend.cli", "tryon", str(tmp_path / "me.png"), str(tmp_path / "hair.png"), "-o", "-", "--seed", "3"]
    done = subprocess.run([*command, *arguments[:2], *settings], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    image = decode_upload(io.BytesIO(done.stdout).read(), max_pixels=10**8)
    here = tryon.run(TryOnRequest(upload, reference, None, seed=3))
    assert np.array_equal(image[here.mask == 0], upload[here.mask == 0])
    # another process may run on another number of threads, which adds in another order
    assert np.abs(image.astype(int) - here.image).max() <= 3
