"""The durable queue: one SQLite table of jobs and a folder of pictures for each (DESIGN 4.6).

A job is one row from its acceptance to its deletion, and every change of its state is one transaction, so a killed server loses no
job and ends none twice: what was running is queued again at the next start. (Huey's SQLite storage deletes a task's row when a worker
takes it, which loses that job to a kill, keeps neither position nor cancellation, and pickles its messages.)

Rows hold no picture and no file name; a folder holds pictures under a random name that cannot be guessed.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from backend import artifacts
from backend.errors import DeepHairError

MAX_ATTEMPTS = 3  # a job that was running when the server died this often is not tried again: it may be what kills it

_SCHEMA = """
create table if not exists jobs (
    seq integer primary key autoincrement,
    id text not null unique,
    state text not null,
    options text not null,
    created real not null,
    started real,
    ended real,
    attempts integer not null default 0,
    error text,
    result text,
    erased integer not null default 0
);
create index if not exists jobs_by_state on jobs (state, seq);
"""


class State(StrEnum):
    """Where a job stands. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing comes after it."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class QueueFull(DeepHairError):
    """As many jobs wait as the server takes."""

    code = "queue_full"


@dataclass(frozen=True)
class Job:
    """One job as stored. Times are seconds since 1970; ``error`` is {code, message, hint}; ``erased``: the photos were deleted."""

    seq: int
    id: str
    state: State
    options: dict[str, Any]
    created: float
    started: float | None
    ended: float | None
    attempts: int
    error: dict[str, str] | None
    result: dict[str, Any] | None
    erased: bool


def _job(row: tuple[Any, ...]) -> Job:
    seq, job_id, state, options, created, started, ended, attempts, error, result, erased = row
    return Job(
        seq,
        job_id,
        State(state),
        json.loads(options),
        created,
        started,
        ended,
        attempts,
        json.loads(error) if error else None,
        json.loads(result) if result else None,
        bool(erased),
    )


class JobStore:
    """All jobs below ``folder``; at most ``capacity`` of them wait at a time. Thread-safe; one process at a time."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder, self._capacity = folder, capacity
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=full")  # an accepted job survives a power cut, not only a kill
        self._db.execute("pragma secure_delete=on")  # a deleted job's prompt does not stay in a free page
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Closes the database; the store is not used afterwards."""
        with self._lock:
            self._db.close()

    def folder(self, job_id: str) -> Path:
        """Where a job's pictures lie. Only ids of known jobs may come here."""
        return self._folder / job_id

    def full(self) -> bool:
        """Whether the next job would be refused."""
        return self.count(State.QUEUED) >= self._capacity

    def count(self, state: State) -> int:
        """How many jobs are in ``state``."""
        with self._lock:
            return int(self._db.execute("select count(*) from jobs where state = ?", (state,)).fetchone()[0])

    def add(self, options: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Job:
        """Stores the pictures ({file name: bytes}), then queues the job. Raises QueueFull, or OSError when the disk does not take them."""
        job_id = secrets.token_urlsafe(24)
        folder = self.folder(job_id)
        folder.mkdir(mode=0o700)
        try:
            for name, content in pictures.items():
                artifacts.write_bytes(folder / name, content)
            return self._insert(job_id, options)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _insert(self, job_id: str, options: Mapping[str, Any]) -> Job:
        with self._lock:
            if self.full():
                raise QueueFull(f"{self._capacity} jobs are waiting already", hint="try again in a moment")
            row = (job_id, State.QUEUED, json.dumps(dict(options)), time.time())
            self._db.execute("insert into jobs (id, state, options, created) values (?, ?, ?, ?)", row)
            job = self.get(job_id)
            assert job is not None
            return job

    def get(self, job_id: str) -> Job | None:
        """The job, or None when there is none of that id."""
        with self._lock:
            row = self._db.execute("select * from jobs where id = ?", (job_id,)).fetchone()
        return _job(row) if row else None

    def all(self, state: State | None = None) -> list[Job]:
        """The jobs in ``state`` (all when None) in the order of their acceptance."""
        with self._lock:
            every = self._db.execute("select * from jobs order by seq")
            jobs = [_job(row) for row in every]
        return jobs if state is None else [job for job in jobs if job.state is state]

    def position(self, job: Job) -> int:
        """Place in the queue; 1 is the next to run."""
        with self._lock:
            query = "select count(*) from jobs where state = ? and seq <= ?"
            return int(self._db.execute(query, (State.QUEUED, job.seq)).fetchone()[0])

    def claim(self) -> Job | None:
        """Takes the oldest waiting job and marks it running; None when none waits."""
        with self._lock:
            row = self._db.execute("select id from jobs where state = ? order by seq limit 1", (State.QUEUED,)).fetchone()
            if row is None:
                return None
            self._db.execute(
                "update jobs set state = ?, started = ?, attempts = attempts + 1 where id = ?",
                (State.RUNNING, time.time(), row[0]),
            )
            return self.get(row[0])

    def release(self, job: Job) -> None:
        """Puts a running job back at its old place; the server is stopping and the next one runs it. Counts as no attempt."""
        with self._lock:
            query = "update jobs set state = ?, started = null, attempts = attempts - 1 where id = ? and state = ?"
            self._db.execute(query, (State.QUEUED, job.id, State.RUNNING))

    def succeed(self, job: Job, result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> bool:
        """Ends a running job with its pictures; False (and nothing kept) when it was cancelled meanwhile."""
        with self._lock:
            current = self.get(job.id)
            if current is None or current.state is not State.RUNNING:
                return False
            for name, content in pictures.items():
                artifacts.write_bytes(self.folder(job.id) / name, content)
            return self._end(job.id, State.SUCCEEDED, result=result, keep=pictures)

    def fail(self, job: Job, error: Mapping[str, str]) -> bool:
        """Ends a running job with the reason; False when it was cancelled meanwhile."""
        return self._end(job.id, State.FAILED, error=error)

    def _end(
        self,
        job_id: str,
        state: State,
        *,
        error: Mapping[str, str] | None = None,
        result: Mapping[str, Any] | None = None,
        keep: Container[str] = (),
    ) -> bool:
        with self._lock:
            query = "update jobs set state = ?, ended = ?, error = ?, result = ? where id = ? and state = ?"
            values = (
                state,
                time.time(),
                json.dumps(dict(error)) if error else None,
                json.dumps(dict(result)) if result else None,
                job_id,
                State.RUNNING,
            )
            if self._db.execute(query, values).rowcount != 1:
                return False
            for path in self.folder(job_id).glob("*"):  # the uploads have done their work; only the result waits for its person
                if path.name not in keep:
                    path.unlink(missing_ok=True)
            return True

    def erase(self, job_id: str) -> Job | None:
        """Cancels a job that has not ended and deletes its photos, result and prompt now. The bare row stays until its time is up, so
        that the answer to a second look is "cancelled" and not "never heard of it". None when there is no such job."""
        with self._lock:
            job = self.get(job_id)
            if job is None:
                return None
            state = job.state if job.state.final else State.CANCELLED
            query = "update jobs set state = ?, ended = coalesce(ended, ?), options = '{}', result = null, erased = 1 where id = ?"
            self._db.execute(query, (state, time.time(), job_id))
            shutil.rmtree(self.folder(job_id), ignore_errors=True)
            self._db.execute("pragma wal_checkpoint(truncate)")  # else the prompt stays readable in the log file
            return self.get(job_id)

    def recover(self) -> list[Job]:
        """Call once at the start: queues again what a killed server was running, and removes folders that belong to no job.

        Returns the jobs that are given up because the server died under them MAX_ATTEMPTS times.
        """
        with self._lock:
            given_up = [job for job in self.all(State.RUNNING) if job.attempts >= MAX_ATTEMPTS]
            for job in given_up:
                self.fail(
                    job,
                    {
                        "code": "crashed",
                        "message": f"the server stopped {job.attempts} times while working on it",
                        "hint": "try another photo",
                    },
                )
            self._db.execute("update jobs set state = ?, started = null where state = ?", (State.QUEUED, State.RUNNING))
            known = {job.id for job in self.all() if not job.erased}
            for path in self._folder.iterdir():
                if path.is_dir() and path.name not in known:
                    shutil.rmtree(path, ignore_errors=True)
            return given_up

    def sweep(self, older_than: float) -> list[str]:
        """Deletes every job that ended before the time ``older_than`` with all its pictures; returns their ids."""
        with self._lock:
            ids = [row[0] for row in self._db.execute("select id from jobs where ended < ?", (older_than,))]
            for job_id in ids:
                shutil.rmtree(self.folder(job_id), ignore_errors=True)
                self._db.execute("delete from jobs where id = ?", (job_id,))
            return ids
