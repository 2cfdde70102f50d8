"""Jobs over a stop or a kill of the server and under load: none lost, none ended twice, order kept (reliability.md C2, queue)."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from backend import artifacts
from backend.app.api import create_app
from backend.app.jobs import MAX_ATTEMPTS, JobStore, State
from backend.app.server import run_app
from backend.errors import DeepHairError
from backend.tryon.values import TryOnRequest
from tests import app_standin
from tests.app_standin import StandIn, app_config, composite, decoded, picture, png, serving


def test_a_killed_servers_jobs_are_queued_again_in_order_and_given_up_after_some_tries(tmp_path: Path) -> None:
    store = JobStore(tmp_path, 10)
    first, second = store.add({"seed": 1}, {"target.png": b"1"}), store.add({"seed": 2}, {"target.png": b"2"})
    for attempt in range(1, MAX_ATTEMPTS + 1):
        taken = store.claim()
        assert taken is not None and (taken.id, taken.attempts) == (first.id, attempt)
        (tmp_path / "orphan").mkdir()
        store.close()
        store = JobStore(tmp_path, 10)  # what a new server finds
        assert [job.id for job in store.recover()] == ([first.id] if attempt == MAX_ATTEMPTS else [])
        assert not (tmp_path / "orphan").exists()
    given_up = store.get(first.id)
    assert given_up is not None and given_up.state is State.FAILED and given_up.error["code"] == "crashed"
    taken = store.claim()
    assert taken is not None and taken.id == second.id
    store.release(taken)
    again = store.get(second.id)
    assert again is not None and (again.state, again.attempts) == (State.QUEUED, 0)


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
    for _ in range(kills):
        process, client = start_server(folder, processes)
        for _ in range(3):
            number = len(accepted)
            files, data = {"target": png(seed=number)}, {"prompt": "bob", "seed": str(number), "steps": "4"}
            accepted.append((client.post("/api/v1/jobs", files=files, data=data).raise_for_status().json()["id"], number))
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


def start_server(folder: Path, processes: Any, *, queue_size: int = 64) -> tuple[Any, httpx.Client]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = processes.Process(target=app_standin.main, args=(folder, port, folder / "ledger", queue_size))
    with pytest.MonkeyPatch.context() as patch:  # what the first one starts does not know sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        process.start()
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return process, client
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.02)


def test_a_second_server_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = app_config(tmp_path, port=0)
    with artifacts.folder_lock(config.paths.jobs), pytest.raises(DeepHairError, match="another run"):
        run_app(config, create_app(config, lambda _: StandIn()))  # type: ignore[arg-type, return-value]


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
    # The allocator's arenas fill until about 80 jobs (30 to 47 MB) and stay: seen flat to 3 % from 100 jobs to 200. A leak of one
    # 0.9 MB picture a job would add 90 MB there.
    assert memory[-1] < memory[len(memory) // 2] * 1.1, memory
    print(
        f"{len(refused)} refused; healthz p50 {np.median(waited) * 1e3:.1f} ms, p99 {np.quantile(waited, 0.99) * 1e3:.1f} ms; pages {memory}"
    )


def wait_for_end(client: httpx.Client, job: str, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while (state := client.get(f"/api/v1/jobs/{job}").json()["state"]) not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return str(state)


def resident_of(pid: int) -> int:
    """Memory of a process in pages."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
