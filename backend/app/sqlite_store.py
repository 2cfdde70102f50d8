"""The queue of one server: one SQLite table of jobs and a folder of pictures for each (``jobs`` says what it promises)."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backend import artifacts
from backend.app.jobs import MAX_ATTEMPTS, Job, Listener, Progress, QueueFull, State, StoreError, crashed

logger = logging.getLogger(__name__)

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


def _make_private(folder: Path) -> None:
    """The folder with mode 0700, also where something else made it first."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        folder.chmod(0o700)
    except OSError as error:  # another user's folder, or a file system without modes
        logger.warning("%s holds people's photos and may be readable by other users: %s", folder, error.strerror)


class SqliteStore:
    """All jobs below ``folder``; at most ``capacity`` of them wait at a time. One process at a time."""

    def __init__(self, folder: Path, capacity: int, listener: Listener) -> None:
        self._folder, self._capacity, self._listener = folder, capacity, listener
        self._mine: dict[str, Progress | None] = {}  # what this process runs; the rest that is marked running ran in one that died
        _make_private(folder)
        self._lock, self._swept = threading.RLock(), False
        self._db = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=full")  # an accepted job survives a power cut, not only a kill
        self._db.execute("pragma secure_delete=on")  # a deleted job's prompt does not stay in a free page
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Closes the database."""
        with self._lock:
            self._db.close()

    def full(self) -> bool:
        return self.count(State.QUEUED) >= self._capacity

    def count(self, state: State) -> int:
        with self._lock:
            return int(self._db.execute("select count(*) from jobs where state = ?", (state,)).fetchone()[0])

    def add(self, options: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Job:
        job_id = secrets.token_urlsafe(24)
        folder = self._folder / job_id
        try:
            folder.mkdir(mode=0o700)
            for name, content in pictures.items():
                artifacts.write_bytes(folder / name, content)
            return self._insert(job_id, options)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise StoreError(f"the photos could not be stored: {error.strerror}", hint="the disk may be full") from error
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
        with self._lock:
            row = self._db.execute("select * from jobs where id = ?", (job_id,)).fetchone()
            return replace(_job(row), progress=self._mine.get(job_id)) if row else None

    def waiting(self) -> list[Job]:
        return self._in_state(State.QUEUED)

    def _in_state(self, state: State) -> list[Job]:
        with self._lock:
            return [_job(row) for row in self._db.execute("select * from jobs where state = ? order by seq", (state,))]

    def position(self, job: Job) -> int:
        with self._lock:
            query = "select count(*) from jobs where state = ? and seq <= ?"
            return int(self._db.execute(query, (State.QUEUED, job.seq)).fetchone()[0])

    def claim(self) -> Job | None:
        with self._lock:
            row = self._db.execute("select id from jobs where state = ? order by seq limit 1", (State.QUEUED,)).fetchone()
            if row is None:
                return None
            self._db.execute(
                "update jobs set state = ?, started = ?, attempts = attempts + 1 where id = ?",
                (State.RUNNING, time.time(), row[0]),
            )
            self._mine[row[0]] = None
            return self.get(row[0])

    def is_mine(self, job: Job) -> bool:
        return job.id in self._mine

    def release(self, job: Job, *, counted: bool = False) -> None:
        with self._lock:
            self._mine.pop(job.id, None)
            query = "update jobs set state = ?, started = null, attempts = attempts - ? where id = ? and state = ?"
            self._db.execute(query, (State.QUEUED, 0 if counted else 1, job.id, State.RUNNING))

    def note(self, job: Job, progress: Progress) -> None:
        """In memory: it is worth nothing once the process that runs the job has died."""
        with self._lock:
            if job.id in self._mine:
                self._mine[job.id] = progress

    def succeed(self, job: Job, result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> bool:
        with self._lock:
            if job.id not in self._mine:
                return False
            try:
                for name, content in pictures.items():
                    artifacts.write_bytes(self._folder / job.id / name, content)
            except OSError as error:
                raise StoreError("the result could not be stored", hint="the server's disk may be full; try again later") from error
            return self._end(job.id, State.SUCCEEDED, result=result, keep=pictures)

    def fail(self, job: Job, error: Mapping[str, str]) -> bool:
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
            self._mine.pop(job_id, None)
            if self._db.execute(query, values).rowcount != 1:
                return False
            for path in (self._folder / job_id).glob("*"):  # the uploads have done their work; only the result waits for its person
                if path.name not in keep:
                    path.unlink(missing_ok=True)
            return True

    def erase(self, job_id: str) -> Job | None:
        with self._lock:
            job = self.get(job_id)
            if job is None:
                return None
            state = job.state if job.state.final else State.CANCELLED
            query = "update jobs set state = ?, ended = coalesce(ended, ?), options = '{}', result = null, erased = 1 where id = ?"
            self._db.execute(query, (state, time.time(), job_id))
            self._mine.pop(job_id, None)
            shutil.rmtree(self._folder / job_id, ignore_errors=True)
            self._empty_log()
            return job

    def _empty_log(self) -> None:
        """Moves what SQLite's log file holds into the table and cuts it: else deleted prompts stay readable in it."""
        self._db.execute("pragma wal_checkpoint(truncate)")

    def read(self, job_id: str, name: str) -> bytes | None:
        if self.get(job_id) is None:  # only ids of known jobs become paths
            return None
        try:
            return (self._folder / job_id / name).read_bytes()
        except FileNotFoundError:
            return None

    def recover(self) -> list[Job]:
        """See ``JobStore``; the first time it also removes folders that belong to no job."""
        with self._lock:
            orphans = [job for job in self._in_state(State.RUNNING) if job.id not in self._mine]
            given_up = [job for job in orphans if job.attempts >= MAX_ATTEMPTS]
            for job in given_up:
                self._end(job.id, State.FAILED, error=crashed(job))
            for job in orphans:
                self.release(job, counted=True)
            if not self._swept:
                self._swept = True
                known = {row[0] for row in self._db.execute("select id from jobs where erased = 0")}
                for path in self._folder.iterdir():
                    if path.is_dir() and path.name not in known:
                        shutil.rmtree(path, ignore_errors=True)
            return given_up

    def sweep(self, older_than: float) -> list[str]:
        with self._lock:
            ids = [row[0] for row in self._db.execute("select id from jobs where ended < ?", (older_than,))]
            for job_id in ids:
                shutil.rmtree(self._folder / job_id, ignore_errors=True)
                self._db.execute("delete from jobs where id = ?", (job_id,))
            if ids:
                self._empty_log()
            return ids

    def publish(self, job_id: str, name: str, data: dict[str, Any], *, last: bool = False) -> None:
        self._listener(job_id, name, data, last)
