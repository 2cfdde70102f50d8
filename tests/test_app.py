"""The server: the HTTP contract, the queue's promises, events, restart (DESIGN 4.6). Run against a stand-in that composites in a known
way; the real pipeline behind HTTP is tested end to end elsewhere."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from backend import weights as pretrained
from backend.app import uploads
from backend.app.api import create_app
from backend.app.engine import is_out_of_memory, mask_to_bytes
from backend.app.events import EventHub
from backend.errors import DeepHairError
from backend.imaging.decode import decode_png, encode_png
from backend.tryon.values import TryOnRequest
from tests.app_standin import Live, StandIn, app_config, composite, decoded, picture, png, serving

SNAPSHOT = Path(__file__).parent / "openapi.json"


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with serving(app_config(tmp_path)) as server:
        yield server


@pytest.fixture
def gated(tmp_path: Path) -> Iterator[Live]:
    """A server whose jobs make a step only when the test releases the gate; three jobs may wait."""
    with serving(app_config(tmp_path, queue_size=3), StandIn(gate=threading.Semaphore(0))) as server:
        yield server


def read_events(text: str) -> list[dict[str, Any]]:
    """SSE text as [{id, event, data}]."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith((":", "retry")))
        if fields:
            events.append({**fields, "data": json.loads(fields["data"])})
    return events


# One job, end to end


def test_a_job_from_upload_to_picture_and_mask(live: Live) -> None:
    target, reference = png(150, 110, seed=1), png(80, 90, seed=2)
    answer = live.post(target=target, reference=reference, prompt=" long\n curly  hair ", seed=7, steps=4, guidance=3.5, face=0)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/api/v1/jobs/{job['id']}" and len(job["id"]) >= 32
    done = live.wait(job["id"])
    assert done["state"] == "succeeded" and done["result"]["bundle_sha256"] == live.engine.bundle_sha256
    assert (done["result"]["width"], done["result"]["height"]) == (150, 110)
    request = TryOnRequest(picture(150, 110, 1), picture(80, 90, 2), "long curly hair", 7, 4, 3.5, 0)
    assert_same(live.engine.seen[0], request)
    result, mask = live.client.get(done["result"]["url"]), live.client.get(done["result"]["mask_url"])
    assert result.headers["content-type"] == mask.headers["content-type"] == "image/png"
    assert np.array_equal(decoded(result.content), composite(request).image)
    outside = decoded(mask.content) == 0
    assert outside.any() and np.array_equal(decoded(result.content)[outside], request.target[outside])


def assert_same(seen: TryOnRequest, wanted: TryOnRequest) -> None:
    for name, value in vars(wanted).items():
        assert np.array_equal(getattr(seen, name), value), name


def test_mask_mode_strength_and_attributes_reach_the_pipeline(live: Live) -> None:
    brush = np.zeros((110, 150), np.uint8)
    brush[20:40, 30:50] = 7
    settings = {"mode": "colour", "strength": 0.25, "length": "long", "curl": "wavy", "color": "black", "bangs": "full"}
    answer = live.post(target=png(150, 110, seed=1), mask=encode_png(brush), **settings)  # the attributes are description enough
    assert answer.status_code == 202, answer.text
    live.wait(answer.json()["id"])
    assert_same(live.engine.seen[0], TryOnRequest(picture(150, 110, 1), None, mask=np.where(brush > 0, 255, 0), **settings))
    layers = np.zeros((110, 150, 4), np.uint8)
    layers[..., :3] = 200  # a canvas: painted where it is not transparent
    layers[20:40, 30:50, 3] = 90
    live.wait(live.post(target=png(150, 110), prompt="bob", mask=encode_png(layers)).json()["id"])
    assert np.array_equal(live.engine.seen[1].mask, live.engine.seen[0].mask)


def test_a_mask_that_cannot_be_the_portraits_is_refused(live: Live) -> None:
    cases = {"mask_size": encode_png(np.full((128, 97), 255, np.uint8)), "empty_mask": encode_png(np.zeros((128, 96), np.uint8))}
    for code, mask in cases.items():
        answer = live.post(prompt="bob", mask=mask)
        assert (answer.status_code, answer.json()["code"]) == (422, code) and answer.json()["hint"]
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture(120, 80)).save(turned, "JPEG", exif=exif)
    lying, upright = (encode_png(np.full(shape, 255, np.uint8)) for shape in ((80, 120), (120, 80)))
    assert live.post(target=turned.getvalue(), prompt="bob", mask=lying).json()["code"] == "mask_size"
    assert live.post(target=turned.getvalue(), prompt="bob", mask=upright).status_code == 202


def test_the_gallery_lists_its_folder_and_serves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "gallery"
    folder.mkdir()
    (folder / "long-wavy_black.png").write_bytes(png())
    (folder / "notes.txt").write_text("secret")
    (folder / "no picture.png").write_text("secret")
    (tmp_path / "outside.png").write_bytes(png())
    with serving(app_config(tmp_path, gallery=folder)) as live:
        listed = live.client.get("/api/v1/gallery").json()
        wanted = {"name": "long-wavy_black.png", "title": "long wavy black", "url": "/api/v1/gallery/long-wavy_black.png"}
        assert wanted in listed and "notes.txt" not in str(listed)
        shown = live.client.get(wanted["url"])
        assert (shown.headers["content-type"], shown.content) == ("image/png", png())
        for name in (
            "notes.txt",
            "no picture.png",
            "..%2foutside.png",
            "%2e%2e%2foutside.png",
            "..",
            "x",
            "long-wavy_black.PNG",
            "%00",
            "a" * 5000,
        ):
            answer = live.client.get(f"/api/v1/gallery/{name}")
            assert answer.status_code == 404 and "secret" not in answer.text
    with serving(app_config(tmp_path, gallery=tmp_path / "none")) as live:
        assert live.client.get("/api/v1/gallery").json() == []


def test_only_the_operators_own_references_may_be_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "gallery"
    folder.mkdir()
    offered, own = png(80, 90, seed=2), png(80, 90, seed=3)
    (folder / "look.png").write_bytes(offered)
    with serving(app_config(tmp_path, gallery=folder)) as live:

        def remembered(reference: bytes) -> bool:
            live.wait(live.post(reference=reference).json()["id"])
            return live.engine.seen[-1].remember

        assert len(own) == len(offered) and live.client.get("/api/v1/gallery/look.png").content == offered
        assert remembered(offered) and not remembered(own) and not remembered(offered + b"\0")
        (folder / "look.png").write_bytes(own)
        os.utime(folder / "look.png", ns=(1, 1))  # the same size, another time
        assert remembered(own) and not remembered(offered)
        live.wait(live.post(prompt="bob").json()["id"])
        assert not live.engine.seen[-1].remember
        refused = live.post(reference=own, remember="true")
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_form")


def test_the_mask_is_rounded_up_so_that_zero_means_untouched() -> None:
    assert mask_to_bytes(np.array([0.0, 1e-6, 1 / 255, 0.5, 1.0], np.float32)).tolist() == [0, 1, 1, 128, 255]


def test_exif_orientation_is_applied_once(live: Live) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6  # stored lying on its side
    Image.fromarray(picture(120, 80)).save(buffer, "JPEG", exif=exif)
    done = live.wait(live.post(target=buffer.getvalue(), prompt="bob").json()["id"])
    assert (done["result"]["width"], done["result"]["height"]) == (80, 120)


def test_uploads_are_gone_once_the_job_has_ended_and_names_are_never_stored(live: Live, tmp_path: Path) -> None:
    files = {"target": ("my-holiday-secret.png", png())}
    job = live.client.post("/api/v1/jobs", files=files, data={"prompt": "bob"}).json()
    live.wait(job["id"])
    assert sorted(path.name for path in (tmp_path / "jobs" / job["id"]).iterdir()) == ["mask.png", "result.png"]
    assert not any(b"holiday" in path.read_bytes() for path in (tmp_path / "jobs").rglob("*") if path.is_file())


@pytest.mark.parametrize("plain_bytes", [2**30, 0])
def test_a_kept_upload_is_its_pixels_plain_when_small_and_packed_when_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_bytes: int
) -> None:
    monkeypatch.setattr(uploads, "PLAIN_BYTES", plain_bytes)
    flat = np.full((70, 90, 3), 77, np.uint8)
    kept = asyncio.run(uploads.Decoder(app_config(tmp_path).app).as_png(encode_png(flat)))
    assert (kept.height, kept.width) == (70, 90) and np.array_equal(decode_png(kept.png), flat)
    assert (len(kept.png) > flat.nbytes) == bool(plain_bytes)


def test_progress_runs_to_the_end_with_a_time_left(gated: Live) -> None:
    job = gated.post(prompt="bob", steps=4).json()
    gated.wait(job["id"], "running")
    for _ in range(3):
        gated.engine.gate.release()
        time.sleep(0.03)
    progress = gated.wait(job["id"], "running")["progress"]
    assert (progress["done"], progress["total"], progress["fraction"]) == (3, 4, 0.75) and progress["eta_s"] >= 0
    gated.engine.gate.release()
    assert gated.wait(job["id"])["progress"] is None


# The queue


def test_order_is_kept_positions_are_told_and_a_full_queue_is_429(gated: Live) -> None:
    jobs = [gated.post(prompt="bob", seed=0).json()]
    gated.wait(jobs[0]["id"], "running")
    jobs += [gated.post(prompt="bob", seed=seed).json() for seed in (1, 2, 3)]
    assert [job["position"] for job in jobs[1:]] == [1, 2, 3]
    refused = gated.post(prompt="bob", seed=4)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1 and refused.json()["code"] == "queue_full"
    gated.client.delete(f"/api/v1/jobs/{jobs[1]['id']}").raise_for_status()
    assert gated.client.get(f"/api/v1/jobs/{jobs[3]['id']}").json()["position"] == 2
    jobs.append(gated.post(prompt="bob", seed=5).json())
    gated.engine.gate.release(100)
    assert [gated.wait(job["id"])["state"] for job in jobs] == ["succeeded", "cancelled", "succeeded", "succeeded", "succeeded"]
    assert [request.seed for request in gated.engine.seen] == [0, 2, 3, 5]


def test_cancel_of_a_running_job_ends_it_within_a_step_and_the_next_one_runs(gated: Live, tmp_path: Path) -> None:
    first, second = (gated.post(prompt="bob", steps=2).json()["id"] for _ in range(2))
    gated.wait(first, "running")
    for _ in range(2):  # a second time changes nothing
        assert gated.client.delete(f"/api/v1/jobs/{first}").status_code == 204
    assert gated.wait(first)["state"] == "cancelled" and not (tmp_path / "jobs" / first).exists()
    gated.wait(second, "running")
    gated.engine.gate.release(2)
    assert gated.wait(second)["state"] == "succeeded" and gated.wait(first)["state"] == "cancelled"


def test_delete_erases_a_finished_job_at_once(live: Live, tmp_path: Path) -> None:
    job = live.wait(live.post(prompt="a very private wish").json()["id"])
    assert live.client.delete(f"/api/v1/jobs/{job['id']}").status_code == 204
    after = live.client.get(f"/api/v1/jobs/{job['id']}").json()
    assert after["state"] == "succeeded" and after["photos_deleted"] and after["result"] is None
    assert live.client.get(job["result"]["url"]).status_code == 410
    assert not (tmp_path / "jobs" / job["id"]).exists()
    assert not any(b"private wish" in path.read_bytes() for path in (tmp_path / "jobs").iterdir() if path.is_file())


def test_the_events_of_an_erased_job_tell_that_it_is_erased_and_nothing_else(live: Live) -> None:
    job = live.wait(live.post(prompt="bob", steps=2).json()["id"])
    story = f"/api/v1/jobs/{job['id']}/events"
    before = read_events(live.client.get(story).text)
    for _ in range(2):  # a second time changes nothing
        live.client.delete(f"/api/v1/jobs/{job['id']}").raise_for_status()
        for last_seen in ("", before[0]["id"], before[-1]["id"]):
            (told,) = read_events(live.client.get(story, headers={"Last-Event-ID": last_seen}).text)
            assert (told["event"], told["data"]["state"], told["data"]["photos_deleted"]) == ("state", "succeeded", True)
            assert told["data"]["result"] is None and "seed" not in json.dumps(told["data"])
        assert read_events(live.client.get(story, headers={"Last-Event-ID": told["id"]}).text) == []


def test_who_follows_a_running_job_hears_that_it_is_cancelled(gated: Live) -> None:
    job = gated.post(prompt="bob", steps=5).json()["id"]
    gated.wait(job, "running")
    told = []
    with gated.client.stream("GET", f"/api/v1/jobs/{job}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("event: progress"):
                httpx.delete(f"http://127.0.0.1:{gated.port}/api/v1/jobs/{job}").raise_for_status()
            elif line.startswith("event: state"):
                gated.engine.gate.release()
            elif line.startswith("data: "):
                told.append(json.loads(line[6:]).get("state"))
    assert told[-1] == "cancelled" and told[:2] == ["queued", "running"]
    (left,) = read_events(gated.client.get(f"/api/v1/jobs/{job}/events").text)
    assert left["data"]["state"] == "cancelled" and left["data"]["photos_deleted"]


def test_an_upload_is_never_written_before_it_is_decoded(live: Live, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))  # whatever wants a temporary file fails
    large = png(1200, 900)
    assert len(large) > 2 * 2**20
    job = live.post(target=large, reference=large, prompt="bob")
    assert job.status_code == 202, job.text
    assert live.client.post("/api/v1/preview", files={"target": large}).status_code == 200
    assert live.post(target=large + bytes(30 * 2**20), prompt="bob").status_code == 413


def test_ended_jobs_are_deleted_when_their_time_is_up(tmp_path: Path) -> None:
    with serving(app_config(tmp_path, ttl_s=1)) as live:
        job = live.post(prompt="bob").json()["id"]
        deadline = time.monotonic() + 60
        while live.client.get(f"/api/v1/jobs/{job}").status_code != 404 or len(live.app.state.service.hub) > 0:  # events go last
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not (tmp_path / "jobs" / job).exists() and len(live.engine.seen) == 1


@pytest.mark.parametrize(("prompt", "code"), [("oom", "out_of_memory"), ("bug", "internal"), ("no face", "no_face")])
def test_a_failed_job_says_why_and_the_next_one_is_fine(live: Live, tmp_path: Path, prompt: str, code: str) -> None:
    failed = live.wait(live.post(prompt=prompt).json()["id"])
    assert failed["state"] == "failed" and failed["error"]["code"] == code and failed["error"]["message"] and failed["error"]["hint"]
    assert "secret detail" not in str(failed) and not list((tmp_path / "jobs" / failed["id"]).iterdir())
    assert live.client.get(f"/api/v1/jobs/{failed['id']}/result").json()["code"] == "no_result"
    assert live.wait(live.post(prompt="bob").json()["id"])["state"] == "succeeded"


def test_out_of_memory_is_told_apart() -> None:
    class OutOfMemoryError(RuntimeError):
        """Named as torch names its own."""

    cpu = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes.")
    assert all(is_out_of_memory(error) for error in (OutOfMemoryError(), MemoryError(), cpu))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_the_event_loop_answers_while_a_job_and_a_preview_run(gated: Live) -> None:
    job = gated.post(prompt="bob").json()["id"]
    gated.wait(job, "running")
    held = threading.Event()
    gated.engine.preview = lambda image: held.wait(120)  # type: ignore[method-assign, assignment, return-value]
    asking = threading.Thread(
        target=lambda: httpx.post(f"http://127.0.0.1:{gated.port}/api/v1/preview", files={"target": png()}, timeout=180)
    )
    asking.start()
    time.sleep(0.1)
    assert gated.client.get("/healthz").json() == {"status": "ok"}  # a blocked loop would exceed the client's time limit
    assert gated.client.get(f"/api/v1/jobs/{job}").json()["state"] == "running"
    held.set()
    asking.join()


# Events


def test_events_tell_the_whole_story_and_replay_from_the_last_one_seen(live: Live) -> None:
    job = live.post(prompt="bob", steps=3).json()["id"]
    live.wait(job)
    answer = live.client.get(f"/api/v1/jobs/{job}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = read_events(answer.text)
    assert [event["data"]["state"] for event in events if event["event"] == "state"] == ["queued", "running", "succeeded"]
    assert [event["data"]["done"] for event in events if event["event"] == "progress"] == [1, 2, 3]
    assert len({event["id"] for event in events}) == len(events)
    replayed = live.client.get(f"/api/v1/jobs/{job}/events", headers={"Last-Event-ID": events[2]["id"]})
    assert read_events(replayed.text) == events[3:]
    for foreign in ("0-2", "nonsense", "-1", f"{events[0]['id'].split('-')[0]}-x"):
        assert read_events(live.client.get(f"/api/v1/jobs/{job}/events", headers={"Last-Event-ID": foreign}).text) == events


def test_events_arrive_while_the_job_runs(gated: Live) -> None:
    job = gated.post(prompt="bob", steps=2).json()["id"]
    gated.wait(job, "running")
    with gated.client.stream("GET", f"/api/v1/jobs/{job}/events") as answer:
        lines = answer.iter_lines()
        names = []
        for line in lines:
            if line.startswith("event: "):
                names.append(line[7:])
                gated.engine.gate.release()
    assert names == ["state", "state", "progress", "progress", "state"]


def test_a_quiet_stream_beats_and_ends_with_the_job() -> None:
    async def story() -> list[str]:
        hub, heard = EventHub(), []
        hub.publish("job", "state", {"n": 1})
        async for text in hub.follow("job", None, heartbeat_s=0.01):
            heard.append(text)
            if text.startswith(":"):
                hub.publish("job", "state", {"n": 2}, last=True)
        assert not hub.publish("job", "progress", {"n": 3})
        return heard

    heard = asyncio.run(story())
    assert [e["data"]["n"] for e in read_events("".join(heard))] == [1, 2] and any(text.startswith(":") for text in heard)


# Model


def test_preview_shows_faces_and_a_mask_of_the_photos_size(live: Live, tmp_path: Path) -> None:
    answer = live.client.post("/api/v1/preview", files={"target": png(140, 100)}).json()
    assert (answer["width"], answer["height"]) == (140, 100) and answer["faces"][0]["box"] == [35, 25, 105, 75]
    mask = decoded(base64.b64decode(answer["hair_mask_png"]))
    assert mask.shape == (100, 140) and (mask[:50] == 255).all() and not mask[50:].any() and answer["hair_fraction"] == 0.5
    assert [path.name for path in (tmp_path / "jobs").iterdir() if path.is_dir()] == []


def test_models_tell_what_is_loaded_and_nothing_of_the_machine(tmp_path: Path) -> None:
    config = app_config(tmp_path)
    (detector,) = pretrained.files(config.paths.weights, "face_detector")
    detector.parent.mkdir(parents=True)
    detector.write_bytes(b"")
    (detector.parent / f"{detector.stem}.card.json").write_text('{"name": "miniature", "trained": true, "steps": 9}')
    with serving(config) as live:
        assert live.client.get("/api/v1/models").json() == {
            "loaded": True,
            "bundle_sha256": "a" * 64,
            "miniature": True,
            "weights": {"face_detector": "miniature (trained, 9 steps)"},
            "bundle": {"gate": {"passed": True}},
            "sampling": {},
        }


def test_reload_swaps_between_jobs_and_keeps_the_old_model_when_the_new_one_is_broken(tmp_path: Path) -> None:
    old, new = StandIn(gate=threading.Semaphore(0)), StandIn(bundle_sha256="b" * 64)
    offers: list[Any] = [old, DeepHairError("weights hold NaN", code="invalid_artifact"), RuntimeError("boom"), new]

    def factory(config: Any) -> StandIn:
        offer = offers.pop(0)
        if isinstance(offer, Exception):
            raise offer
        return offer

    with serving(app_config(tmp_path), old, factory) as live:
        while live.client.get("/readyz").status_code != 200:
            time.sleep(0.005)
        jobs = [live.post(prompt="bob").json()["id"] for _ in range(2)]
        live.wait(jobs[0], "running")
        for _ in range(2):
            refused = live.client.post("/api/v1/models/reload")
            assert refused.status_code == 503 and refused.json()["code"] == "reload_failed"
            assert live.client.get("/api/v1/models").json()["bundle_sha256"] == old.bundle_sha256
        assert live.client.post("/api/v1/models/reload").json()["bundle_sha256"] == new.bundle_sha256
        old.gate.release(100)
        assert [live.wait(job)["result"]["bundle_sha256"][0] for job in jobs] == ["a", "b"]


def test_while_the_model_loads_jobs_wait_and_ready_says_no(tmp_path: Path) -> None:
    loading = threading.Event()

    def slow(config: Any) -> StandIn:
        loading.wait(10)
        return StandIn()

    with serving(app_config(tmp_path), factory=slow) as live:
        assert live.client.get("/healthz").status_code == 200
        for answer in (live.client.get("/readyz"), live.client.post("/api/v1/preview", files={"target": png()})):
            assert answer.status_code == 503 and answer.json()["code"] == "starting" and answer.headers["retry-after"]
        assert live.client.get("/api/v1/models").json()["loaded"] is False
        job = live.post(prompt="bob").json()
        assert (job["state"], job["position"]) == ("queued", 1)
        loading.set()
        assert live.wait(job["id"])["state"] == "succeeded"
        assert live.client.get("/readyz").status_code == 200


def test_metrics_count_jobs_and_requests(live: Live) -> None:
    live.wait(live.post(prompt="bob").json()["id"])
    live.wait(live.post(prompt="bug").json()["id"])
    live.client.get("/no/such/address")
    text = live.client.get("/metrics").text
    for line in (
        'deephair_jobs_total{state="accepted"} 2',
        'deephair_jobs_total{state="succeeded"} 1',
        'deephair_jobs_total{state="failed"} 1',
        'deephair_http_requests_total{method="POST",route="/api/v1/jobs",status="202"} 2',
        'deephair_http_requests_total{method="GET",route="none",status="404"} 1',
        "deephair_job_seconds_count 2",
        "deephair_ready 1",
    ):
        assert line in text.splitlines()


def test_logs_hold_neither_whole_ids_nor_words(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    job = live.wait(live.post(prompt="private words").json()["id"])["id"]
    live.client.get(f"/api/v1/jobs/{job}/result")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("backend")]
    assert any('"event": "job_ended"' in line for line in ours) and not any(job in line or "private" in line for line in ours)


# The document


def test_the_openapi_document_is_the_agreed_one(tmp_path: Path) -> None:
    """Changed on purpose? Then write it anew: python -c 'from tests import test_app; test_app.write_snapshot()'."""
    document = create_app(app_config(tmp_path)).openapi()
    assert document == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def write_snapshot() -> None:
    document = create_app(app_config(Path())).openapi()
    SNAPSHOT.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
