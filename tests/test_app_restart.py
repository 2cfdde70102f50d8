"""Jobs over a stop or a kill of the server and under load: none lost, none ended twice, order kept (reliability.md C2, queue)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis

from backend import artifacts
from backend.app.api import create_app
from backend.app.engine import Finished, LocalEngine
from backend.app.jobs import MAX_ATTEMPTS, JobStore, Progress, QueueFull, State, StoreError, open_store
from backend.app.server import run_app
from backend.app.sqlite_store import SqliteStore
from backend.app.worker import ModelSlot, Worker
from backend.errors import DeepHairError
from backend.tryon.values import TryOnRequest
from tests import app_standin
from tests.app_standin import StandIn, app_config, composite, decoded, picture, png, serving


def ignore(job_id: str, name: str, data: dict[str, Any], last: bool) -> None:
    """A listener that is told of events and does nothing."""


@pytest.fixture(params=["sqlite", "redis"])
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], JobStore]]:
    """Opens a queue as a newly started server does; all that one test opens are of the same jobs."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        config = app_config(tmp_path, queue=url, queue_size=3)
    else:
        config = app_config(tmp_path, queue_size=3)
    opened: list[JobStore] = []

    def new() -> JobStore:
        opened.append(open_store(config, ignore))
        return opened[-1]

    yield new
    for store in opened:
        with contextlib.suppress(Exception):
            store.close()


def test_a_job_ends_once_and_its_uploads_with_it(new_store: Callable[[], JobStore]) -> None:
    store = new_store()
    jobs = [store.add({"seed": seed}, {"target.png": bytes([seed])}) for seed in (1, 2, 3)]
    with pytest.raises(QueueFull):
        store.add({}, {"target.png": b"x"})
    assert [job.id for job in store.waiting()] == [job.id for job in jobs] and [store.position(job) for job in jobs] == [1, 2, 3]
    taken = store.claim()
    assert taken is not None and (taken.id, taken.options, taken.state, taken.attempts) == (jobs[0].id, {"seed": 1}, State.RUNNING, 1)
    assert store.is_mine(taken) and not store.is_mine(jobs[1]) and store.position(jobs[1]) == 1
    store.note(taken, Progress(1, 4, 2.5))
    running = store.get(taken.id)
    assert running is not None and running.progress == Progress(1, 4, 2.5)
    assert (store.count(State.QUEUED), store.count(State.RUNNING), store.full()) == (2, 1, False)
    assert store.succeed(taken, {"width": 5}, {"result.png": b"done"})
    assert not store.succeed(taken, {"width": 6}, {"result.png": b"again"}) and not store.fail(taken, {"code": "x"})
    ended = store.get(taken.id)
    assert ended is not None and (ended.state, ended.result, ended.error, ended.progress) == (State.SUCCEEDED, {"width": 5}, None, None)
    assert (store.read(taken.id, "result.png"), store.read(taken.id, "target.png")) == (b"done", None)
    assert store.get("nobody") is None and store.read("nobody", "result.png") is None and store.erase("nobody") is None


def test_a_cancelled_job_is_nobodys_and_an_erased_one_keeps_nothing(new_store: Callable[[], JobStore]) -> None:
    store = new_store()
    first, second = (store.add({"prompt": "private"}, {"target.png": b"1"}) for _ in range(2))
    taken = store.claim()
    assert taken is not None
    before = store.erase(first.id)
    assert before is not None and before.state is State.RUNNING and not store.is_mine(taken)
    assert not store.succeed(taken, {}, {"result.png": b"late"}) and store.read(first.id, "result.png") is None
    store.release(taken)
    cancelled = store.get(first.id)
    assert cancelled is not None and (cancelled.state, cancelled.erased, cancelled.options) == (State.CANCELLED, True, {})
    assert [job.id for job in store.waiting()] == [second.id]
    taken = store.claim()
    assert taken is not None and store.succeed(taken, {"width": 1}, {"result.png": b"2"})
    before = store.erase(second.id)
    assert before is not None and before.state is State.SUCCEEDED
    after = store.get(second.id)
    assert after is not None and (after.state, after.result, store.read(second.id, "result.png")) == (State.SUCCEEDED, None, None)
    assert store.sweep(0.0) == [] and sorted(store.sweep(time.time() + 1)) == sorted([first.id, second.id])
    assert store.get(first.id) is None and store.sweep(time.time() + 1) == []


def test_a_killed_servers_jobs_are_queued_again_in_order_and_given_up_after_some_tries(
    new_store: Callable[[], JobStore], tmp_path: Path
) -> None:
    store = new_store()
    first, second = store.add({"seed": 1}, {"target.png": b"1"}), store.add({"seed": 2}, {"target.png": b"2"})
    for attempt in range(1, MAX_ATTEMPTS + 1):
        taken = store.claim()
        assert taken is not None and (taken.id, taken.attempts) == (first.id, attempt)
        assert store.recover() == [] and store.is_mine(taken)  # what runs here is no orphan
        (tmp_path / "jobs" / "orphan").mkdir(parents=True)
        store.close()
        dead, store = store, new_store()  # what a new server finds
        assert [job.id for job in store.recover()] == ([first.id] if attempt == MAX_ATTEMPTS else [])
        if isinstance(store, SqliteStore):
            assert not (tmp_path / "jobs" / "orphan").exists()
        else:
            (tmp_path / "jobs" / "orphan").rmdir()
            assert not dead.succeed(taken, {}, {"result.png": b"from the grave"})  # it was only paused, and comes back
    given_up = store.get(first.id)
    assert given_up is not None and given_up.state is State.FAILED and given_up.error["code"] == "crashed"
    taken = store.claim()
    assert taken is not None and taken.id == second.id
    store.release(taken)
    again = store.get(second.id)
    assert again is not None and (again.state, again.attempts) == (State.QUEUED, 0)


def test_a_swept_jobs_words_are_in_no_file(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "jobs", 3, ignore)
    store.add({"prompt": "a very private wish"}, {"target.png": b"1"})
    taken = store.claim()
    assert taken is not None and store.succeed(taken, {"info": "a private figure"}, {"result.png": b"2"})
    written = lambda: b"".join(path.read_bytes() for path in (tmp_path / "jobs").rglob("*") if path.is_file())  # noqa: E731
    assert b"private wish" in written() and b"private figure" in written()
    assert store.sweep(time.time() + 1) == [taken.id]
    assert b"private" not in written() and taken.id.encode() not in written()
    store.close()


def test_redis_keeps_no_event_of_an_erased_job_and_none_longer_than_the_jobs(redis_url: str, tmp_path: Path) -> None:
    with serving(app_config(tmp_path, queue=redis_url)) as one, serving(app_config(tmp_path, queue=redis_url)) as other:
        erased, kept = (one.post(prompt="bob", seed=seed).json()["id"] for seed in (4711, 4712))
        for job in (erased, kept):
            one.wait(job)
        for server in (one, other):  # both have heard the whole story
            for job in (erased, kept):
                assert '"result": {' in server.client.get(f"/api/v1/jobs/{job}/events").text
        one.client.delete(f"/api/v1/jobs/{erased}").raise_for_status()
        deadline = time.monotonic() + 60
        for server in (one, other):
            while '"seed": 4711' in (story := server.client.get(f"/api/v1/jobs/{erased}/events").text):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert story.count("event: ") == 1 and '"photos_deleted": true' in story
            assert '"seed": 4712' in server.client.get(f"/api/v1/jobs/{kept}/events").text
        queue = redis.Redis.from_url(redis_url)
        stream = str(queue.xrange("deephair:events"))
        assert '"seed": 4711' not in stream and erased in stream and '"seed": 4712' in stream
        store = one.app.state.service.store
        store.sweep(time.time() - 3600)
        assert str(queue.xrange("deephair:events")) == stream  # nothing is as old as that
        assert set(store.sweep(time.time() + 1)) == {erased, kept}
        assert not [name for name in queue.keys("deephair:*") if name.startswith((b"deephair:job", b"deephair:f"))]
        assert queue.xlen("deephair:events") == 0


class Stuck:
    """An engine that does not look whether it shall stop before ``go`` is set."""

    bundle_sha256, header = "e" * 64, {"miniature": True}

    def __init__(self) -> None:
        self.go = threading.Event()

    def run(self, *_: Any, **__: Any) -> Finished:
        assert self.go.wait(60)
        return Finished({"result.png": b"late"}, {"width": 1})

    def close(self) -> None:
        """Nothing is left."""


def test_a_stop_in_mid_step_hands_the_job_back_as_no_attempt(new_store: Callable[[], JobStore], tmp_path: Path) -> None:
    store, engine, changes = new_store(), Stuck(), []
    slot = ModelSlot(app_config(tmp_path), lambda _: engine)  # type: ignore[arg-type, return-value]
    slot.load()
    job = store.add({"seed": 1}, {"target.png": b"1"})

    def note_change(job_id: str) -> None:
        changes.append(state_of(store, job_id))

    worker = Worker(store, slot, note_change, lambda *_: None, lambda *_: None, threading.Event())
    worker.start()
    while store.count(State.RUNNING) == 0:
        time.sleep(0.005)
    worker.stop(0.05)
    assert worker.is_alive() and state_of(store, job.id) == (State.QUEUED, 0) and changes == [(State.RUNNING, 1), (State.QUEUED, 0)]
    engine.go.set()
    worker.join(60)
    assert not worker.is_alive() and state_of(store, job.id) == (State.QUEUED, 0)  # what comes late is not taken
    assert store.read(job.id, "result.png") is None and store.read(job.id, "target.png") == b"1"
    again = new_store().claim()
    assert again is not None and (again.id, again.attempts) == (job.id, 1)


def state_of(store: JobStore, job_id: str) -> tuple[State, int]:
    job = store.get(job_id)
    assert job is not None
    return job.state, job.attempts


def test_two_servers_share_a_redis(redis_url: str, tmp_path: Path) -> None:
    """What is posted to one can run at the other; either tells the whole story, cancels and hands out the picture."""
    engines = [StandIn(gate=threading.Semaphore(0), bundle_sha256=letter * 64) for letter in "ab"]
    config = app_config(tmp_path, queue=redis_url, queue_size=8)
    with serving(config, engines[0]) as one, serving(config, engines[1]) as other:
        jobs = [one.post(prompt="bob", seed=seed, steps=2).json()["id"] for seed in range(3)]
        for _ in range(200):
            states = [other.client.get(f"/api/v1/jobs/{job}").json()["state"] for job in jobs]
            if states.count("running") == 2:
                break
            time.sleep(0.02)
        assert states == ["running", "running", "queued"]
        for server in (one, other):  # whoever runs the first one, the other must be able to cancel it
            server.client.delete(f"/api/v1/jobs/{jobs[0]}").raise_for_status()
        assert one.wait(jobs[0])["state"] == other.wait(jobs[0])["state"] == "cancelled"
        for engine in engines:
            engine.gate.release(100)
        done = [other.wait(job) for job in jobs[1:]]
        assert [job["state"] for job in done] == ["succeeded", "succeeded"]
        for number, job in zip((1, 2), jobs[1:], strict=True):
            pictures = [server.client.get(f"/api/v1/jobs/{job}/result").content for server in (one, other)]
            assert pictures[0] == pictures[1]
            assert np.array_equal(decoded(pictures[0]), composite(TryOnRequest(picture(), None, "bob", number)).image)
            stories = [server.client.get(f"/api/v1/jobs/{job}/events").text for server in (one, other)]
            assert all(story.count("event: progress") == 2 and '"succeeded"' in story for story in stories)
        ran = [request.seed for engine in engines for request in engine.seen]
        assert sorted(ran) == [0, 1, 2]


def test_a_redis_that_is_down_is_503_and_named_at_the_start(redis_url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not answer"):
        open_store(app_config(tmp_path, queue="redis://127.0.0.1:1/0"), ignore)
    with serving(app_config(tmp_path, queue=redis_url)) as live:
        store = live.app.state.service.store
        working, store._redis = store._redis, redis.Redis(port=1)
        answer = live.client.get("/api/v1/jobs/x")
        store._redis = working
        assert (answer.status_code, answer.json()["code"]) == (503, "storage")
        assert live.client.get("/api/v1/jobs/x").status_code == 404


def test_a_redis_that_cannot_delete_what_has_ended_is_refused(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ubuntu 22.04 has 6.0, in which housekeeping failed at its first command and results stayed for ever."""
    for version, accepted in (("6.0.16", False), ("5.0", False), ("6.2.0", True), ("7.0.15", True), ("10.1.2", True)):
        monkeypatch.setattr(redis.Redis, "info", lambda self, section, version=version: {"redis_version": version})
        if accepted:
            open_store(app_config(tmp_path, queue=redis_url), ignore).close()
        else:
            with pytest.raises(StoreError, match=f"is {version}"):
                open_store(app_config(tmp_path, queue=redis_url), ignore)


@pytest.mark.long
def test_redis_two_servers_one_killed_again_and_again(redis_url: str, tmp_path: Path, processes: Any) -> None:
    """Every accepted job ends exactly once while one of two servers is killed in mid-job, eight times."""
    rng = np.random.default_rng(3)
    steady, client = start_server(tmp_path, processes, queue=redis_url)
    accepted: list[tuple[str, int]] = []
    try:
        for _ in range(8):
            victim, other = start_server(tmp_path, processes, queue=redis_url)
            for number in range(len(accepted), len(accepted) + 4):
                data = {"prompt": "bob", "seed": str(number), "steps": "4"}
                answer = (client, other)[number % 2].post("/api/v1/jobs", files={"target": png(seed=number)}, data=data)
                accepted.append((answer.raise_for_status().json()["id"], number))
            time.sleep(float(rng.uniform(0.0, 0.3)))
            victim.kill()
            victim.join()
        for job, number in accepted:
            assert wait_for_end(client, job, 90) == "succeeded"
            result = client.get(f"/api/v1/jobs/{job}/result")
            assert np.array_equal(decoded(result.content), composite(TryOnRequest(picture(seed=number), None, "bob", number)).image)
        ends = [int(line) for line in (tmp_path / "ledger").read_text().split()]
        assert set(ends) == {number for _, number in accepted} and len(ends) - len(accepted) <= 8
    finally:
        steady.terminate()
        steady.join()


def test_a_stopped_server_hands_its_running_job_to_the_next(tmp_path: Path) -> None:
    with serving(app_config(tmp_path), StandIn(gate=threading.Semaphore(0))) as live:
        jobs = [live.post(prompt="bob", seed=seed).json()["id"] for seed in (1, 2)]
        live.wait(jobs[0], "running")
    with serving(app_config(tmp_path)) as live:
        assert [live.wait(job)["state"] for job in jobs] == ["succeeded", "succeeded"]
        assert [request.seed for request in live.engine.seen] == [1, 2]


def test_three_kills_lose_and_duplicate_no_job(tmp_path: Path, processes: Any) -> None:
    kill_story(tmp_path, processes, kills=3, seed=0)


@pytest.mark.long
def test_twenty_kills_lose_and_duplicate_no_job(tmp_path: Path, processes: Any) -> None:
    kill_story(tmp_path, processes, kills=20, seed=1)


def kill_story(folder: Path, processes: Any, *, kills: int, seed: int) -> None:
    """Posts jobs while the server is killed at random instants; in the end every accepted job has ended exactly once."""
    rng = np.random.default_rng(seed)
    accepted: list[tuple[str, int]] = []
    for kill in range(kills):
        process, client = start_server(folder, processes)
        for _ in range(3):
            number = len(accepted)
            files, data = {"target": png(seed=number)}, {"prompt": "bob", "seed": str(number), "steps": "4"}
            accepted.append((client.post("/api/v1/jobs", files=files, data=data).raise_for_status().json()["id"], number))
        # Every second server lives until the first in line has ended. On a slow machine it would else be running at MAX_ATTEMPTS kills,
        # and be given up, as it should.
        if kill % 2:
            states = (client.get(f"/api/v1/jobs/{job}").json()["state"] for job, _ in accepted)
            waiting = next((job for (job, _), state in zip(accepted, states, strict=True) if state in ("queued", "running")), None)
            if waiting is not None:
                wait_for_end(client, waiting)
        time.sleep(float(rng.uniform(0.0, 0.3)))
        process.kill()  # SIGKILL
        process.join()
    process, client = start_server(folder, processes)
    try:
        for job, number in accepted:
            assert wait_for_end(client, job) == "succeeded"
            result = client.get(f"/api/v1/jobs/{job}/result")
            assert np.array_equal(decoded(result.content), composite(TryOnRequest(picture(seed=number), None, "bob", number)).image)
        ends = [int(line) for line in (folder / "ledger").read_text().split()]
        # A kill between a job's last step and its commit runs it a second time, once for each kill at most; it ends once all the same.
        assert set(ends) == {number for _, number in accepted} and len(ends) - len(accepted) <= kills
    finally:
        process.terminate()
        process.join()


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Starts servers from a process that has paid for the imports once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.app_standin"])
    return context


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """An empty redis-server on loopback, killed at the end."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server on this machine (Debian: apt install redis-server)")
    address = tmp_path / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(address), "--save", "", "--appendonly", "no", "--dir", str(tmp_path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not address.exists():
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.01)
        yield f"unix://{address}"
    finally:
        server.kill()
        server.wait()


def start_server(folder: Path, processes: Any, *, queue_size: int = 64, queue: str = "sqlite") -> tuple[Any, httpx.Client]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = processes.Process(target=app_standin.main, args=(folder, port, folder / "ledger", queue_size, queue))
    with pytest.MonkeyPatch.context() as patch:  # what the first one starts does not know sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        process.start()
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return process, client
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.02)


def test_a_started_server_keeps_photos_and_prompts_from_other_users(tmp_path: Path, processes: Any) -> None:
    """Also in a folder that stands there with wider modes, as a lock or an earlier version left it."""
    (tmp_path / "jobs").mkdir(mode=0o755)
    process, client = start_server(tmp_path, processes)
    try:
        job = client.post("/api/v1/jobs", files={"target": png()}, data={"prompt": "bob"}).raise_for_status().json()["id"]
        assert wait_for_end(client, job) == "succeeded"
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "jobs", *(tmp_path / "jobs").rglob("*"))}
    finally:
        process.terminate()
        process.join()
    assert re.search(r"Max core file size +([01]) +\1 ", limits)  # a core dump would hold them, too
    assert modes["jobs"] == modes[job] == 0o700
    assert {"jobs.sqlite", "result.png", ".lock"} <= modes.keys() and all(mode & 0o077 == 0 for mode in modes.values()), modes


def test_a_second_server_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = app_config(tmp_path, port=0)
    with artifacts.folder_lock(config.paths.jobs), pytest.raises(DeepHairError, match="another run"):
        run_app(config, create_app(config, lambda _: LocalEngine(StandIn())))  # type: ignore[arg-type]


@pytest.mark.long
def test_two_hundred_jobs_from_twenty_clients(tmp_path: Path, processes: Any) -> None:
    """None lost, none run twice, each client's order kept, 429 with Retry-After in between, and no memory that stays. Worth its time: a
    leak of a photo for each job shows after many jobs only."""
    process, http = start_server(tmp_path, processes, queue_size=8)
    ids: dict[int, list[str]] = {client: [] for client in range(20)}
    refused: list[tuple[int, bool]] = []
    photo = png(640, 480)

    def post_ten(client: int) -> None:
        with httpx.Client(base_url=http.base_url, timeout=60) as own:
            while len(ids[client]) < 10:
                seed = str(client * 100 + len(ids[client]))
                answer = own.post("/api/v1/jobs", files={"target": photo}, data={"prompt": "bob", "seed": seed})
                if answer.status_code == 202:
                    ids[client].append(answer.json()["id"])
                else:
                    refused.append((answer.status_code, int(answer.headers["retry-after"]) >= 1))
                    time.sleep(0.3)

    clients = [threading.Thread(target=post_ten, args=(client,)) for client in ids]
    for thread in clients:
        thread.start()
    try:
        waited, memory = [], []
        while any(thread.is_alive() for thread in clients):
            start = time.monotonic()
            http.get("/healthz").raise_for_status()
            waited.append(time.monotonic() - start)
            if sum(map(len, ids.values())) >= 20 + 20 * len(memory):
                memory.append(resident_of(process.pid))
            time.sleep(0.02)
        states = [wait_for_end(http, job) for jobs in ids.values() for job in jobs]
        memory.append(resident_of(process.pid))
    finally:
        process.kill()
        process.join()
    seeds = [int(line) for line in (tmp_path / "ledger").read_text().split()]
    assert states == ["succeeded"] * 200 and len(seeds) == len(set(seeds)) == 200
    for client in ids:
        assert [seed for seed in seeds if seed // 100 == client] == [client * 100 + n for n in range(10)]
    assert refused and set(refused) == {(429, True)}
    print(
        f"{len(refused)} refused; healthz p50 {np.median(waited) * 1e3:.1f} ms, p99 {np.quantile(waited, 0.99) * 1e3:.1f} ms; pages {memory}"
    )
    # From 20 jobs to 200. A leak of one 0.9 MB picture a job would add 160 MB to about 95; how much the allocator keeps of what it was given
    # back differs from run to run: 0.2 and 7 % were seen.
    assert memory[-1] < memory[0] * 1.2, memory


def wait_for_end(client: httpx.Client, job: str, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while (state := client.get(f"/api/v1/jobs/{job}").json()["state"]) not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return str(state)


def resident_of(pid: int) -> int:
    """Memory of a process in pages."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
