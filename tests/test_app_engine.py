"""The model in a process of its own: the same answers as in this one, and a death that costs one attempt; reloading under load."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.app import engine_process
from backend.app.engine import EngineDied, Finished, LocalEngine
from backend.app.engine_process import ProcessEngine
from backend.app.worker import ModelSlot
from backend.config import Config
from backend.errors import DeepHairError, InvalidArtifactError
from backend.tryon.values import Cancelled
from tests import app_standin
from tests.app_standin import StandIn, app_config, picture, png, serving

UPLOADS = {"target.png": png(150, 110, seed=1), "reference.png": png(80, 90, seed=2)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessEngine]:
    started = ProcessEngine.start(app_config(tmp_path_factory.mktemp("engine")), app_standin.stand_in)
    yield started
    started.close()


def never() -> bool:
    return False


def run(engine: Any, **options: Any) -> tuple[Finished, list[tuple[int, int]]]:
    steps: list[tuple[int, int]] = []
    return engine.run(options, UPLOADS, on_step=lambda *step: steps.append(step), cancelled=never), steps


def test_another_process_answers_as_this_one_does(engine: ProcessEngine) -> None:
    here = LocalEngine(StandIn())  # type: ignore[arg-type]
    assert (engine.bundle_sha256, engine.header) == (here.bundle_sha256, here.header) and engine.pid != os.getpid()
    options = {"seed": 4, "steps": 5, "mode": "shape"}
    assert run(engine, **options) == run(here, **options)
    photo = picture(90, 70)
    there, local = engine.preview(photo), here.preview(photo)
    assert there.faces == local.faces and np.array_equal(there.hair_mask, local.hair_mask)
    for prompt, code in (("oom", "out_of_memory"), ("bug", "internal"), ("no face", "no_face")):
        told = []
        for one in (engine, here):
            with pytest.raises(DeepHairError) as caught:
                run(one, prompt=prompt)
            told.append((caught.value.code, caught.value.message, caught.value.hint))
        assert told[0] == told[1] and told[0][0] == code and "secret detail" not in str(told)


def test_a_cancelled_job_stops_there_and_the_next_is_not_touched(engine: ProcessEngine) -> None:
    steps: list[int] = []
    with pytest.raises(Cancelled):
        engine.run({"steps": 200}, UPLOADS, on_step=lambda done, _: steps.append(done), cancelled=lambda: len(steps) >= 2)
    assert 2 <= len(steps) < 100
    assert run(engine)[1] == [(1, 3), (2, 3), (3, 3)]


def test_a_model_that_does_not_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(DeepHairError, match="weights hold NaN") as caught:
        ProcessEngine.start(app_config(tmp_path), app_standin.broken_model)
    assert (caught.value.code, caught.value.hint) == (InvalidArtifactError.code, "deploy another")


def test_a_closed_process_ends_its_preview_and_then_in_order(tmp_path: Path) -> None:
    config = app_config(tmp_path)
    config.paths.jobs.mkdir()
    engine = ProcessEngine.start(config, app_standin.slow_looker)
    photo = picture(90, 70)
    engine_process._send(engine._previews, {"shape": photo.shape}, [photo.tobytes()])
    while not (config.paths.jobs / "begun").exists():
        threading.Event().wait(0.005)
    engine.close()
    assert engine._process.exitcode == 0 and (config.paths.jobs / "looked").exists()


def test_neither_process_leaves_an_image_of_its_memory(engine: ProcessEngine) -> None:
    (limit,) = (line for line in Path(f"/proc/{engine.pid}/limits").read_text().splitlines() if line.startswith("Max core file size"))
    assert limit.split()[4:6] in (["1", "1"], ["0", "0"])  # 0 where it was 0 before, and cannot be raised


def test_a_killed_process_is_noticed_in_mid_job_and_another_takes_its_place(tmp_path: Path) -> None:
    started: list[ProcessEngine] = []

    def load(config: Config) -> ProcessEngine:
        started.append(ProcessEngine.start(config, app_standin.stand_in))
        return started[-1]

    with serving(app_config(tmp_path), load=load) as live:
        job = live.post(prompt="bob", steps=150).json()["id"]
        live.wait(job, "running", seconds=60)
        os.kill(started[0].pid, signal.SIGKILL)
        assert live.wait(job, seconds=60)["state"] == "succeeded" and len(started) == 2
        assert live.client.get("/readyz").status_code == 200
        with pytest.raises(EngineDied):
            run(started[0])


class Dying:
    """An engine whose process dies at every job."""

    bundle_sha256, header = "d" * 64, {"miniature": True}

    def run(self, *_: Any, **__: Any) -> Finished:
        raise EngineDied("gone")

    preview = run

    def close(self) -> None:
        """Nothing is left."""


def test_a_job_that_kills_every_process_is_given_up_and_a_preview_does_not_end_the_server(tmp_path: Path) -> None:
    loads: list[Config] = []

    def load(config: Config) -> Any:
        loads.append(config)
        return Dying() if len(loads) <= 4 else LocalEngine(StandIn())  # type: ignore[arg-type]

    with serving(app_config(tmp_path), load=load) as live:
        job = live.wait(live.post(prompt="bob").json()["id"])
        assert (job["state"], job["error"]["code"]) == ("failed", "crashed") and len(loads) >= 3
        answer = live.client.post("/api/v1/preview", files={"target": png()})
        assert answer.status_code in (200, 503) and (answer.status_code == 200 or answer.json()["code"] == "starting")
        assert live.wait(live.post(prompt="bob").json()["id"])["state"] == "succeeded"


def test_the_last_to_leave_an_old_model_closes_it(tmp_path: Path) -> None:
    closed: list[str] = []

    class Noted(LocalEngine):
        def close(self) -> None:
            closed.append(self.bundle_sha256[0])

    offers = [Noted(StandIn(bundle_sha256=letter * 64)) for letter in "abc"]  # type: ignore[arg-type]
    slot = ModelSlot(app_config(tmp_path), lambda _: offers.pop(0))
    slot.load()
    with slot.borrowed() as held:
        slot.load()
        assert held.bundle_sha256[0] == "a" and slot.current is not None and slot.current.bundle_sha256[0] == "b" and closed == []
    assert closed == ["a"]
    slot.load()
    assert closed == ["a", "b"]
    slot.close()
    assert closed == ["a", "b", "c"] and slot.current is None


def test_reloading_under_load_fails_no_job_and_each_result_names_its_maker(tmp_path: Path) -> None:
    engines = [StandIn(bundle_sha256=f"{number:064d}", step_s=0.002) for number in range(6)]
    waiting = list(engines)
    refuse = threading.Event()

    def factory(config: Config) -> StandIn:
        if refuse.is_set():
            raise InvalidArtifactError("weights hold NaN")
        return waiting.pop(0)

    with serving(app_config(tmp_path, queue_size=200), factory=factory) as live:
        while live.client.get("/readyz").status_code != 200:
            threading.Event().wait(0.005)
        jobs: list[str] = []
        posted = threading.Event()

        def post() -> None:
            for seed in range(60):
                jobs.append(live.post(prompt="bob", seed=seed).raise_for_status().json()["id"])
            posted.set()

        poster = threading.Thread(target=post)
        poster.start()
        for engine in engines[1:]:
            refuse.set()
            refused = live.client.post("/api/v1/models/reload")
            assert (refused.status_code, refused.json()["code"]) == (503, "reload_failed")
            refuse.clear()
            seen = sum(len(one.seen) for one in engines)
            assert live.client.post("/api/v1/models/reload").json()["bundle_sha256"] == engine.bundle_sha256
            for _ in range(1000):  # some jobs by each
                if sum(len(one.seen) for one in engines) > seen + 2 or posted.is_set():
                    break
                threading.Event().wait(0.005)
        poster.join()
        ended = [live.wait(job, seconds=60) for job in jobs]
    assert [job["state"] for job in ended] == ["succeeded"] * 60
    maker = {request.seed: engine.bundle_sha256 for engine in engines for request in engine.seen}
    assert [job["result"]["bundle_sha256"] for job in ended] == [maker[seed] for seed in range(60)]
    assert sum(len(engine.seen) for engine in engines) == 60 and len(set(maker.values())) > 2
