"""What a job is, and what every queue promises (DESIGN 4.6): ``sqlite_store`` for one server, ``redis_store`` for several.

A job is one record from its acceptance to its deletion, and every change of its state is one transaction, so a killed server loses no
job and ends none twice: what it was running is queued again. (Huey's storages delete a task's record when a worker takes it, which
loses that job to a kill, keep neither position nor cancellation, and pickle their messages.)

Records hold no picture and no file name; pictures are kept under a random name that cannot be guessed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from backend.config import Config
from backend.errors import DeepHairError, MissingInputError

MAX_ATTEMPTS = 3  # a job that was running when its server died this often is not tried again: it may be what kills it

Listener = Callable[[str, str, dict[str, Any], bool], None]  # job id, event name, data, whether it is the job's last


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
    """As many jobs wait as the queue takes."""

    code = "queue_full"


class StoreError(DeepHairError):
    """The queue cannot be reached or does not take what it is given."""

    code = "storage"


@dataclass(frozen=True)
class Progress:
    """Denoising steps of a running job. ``eta_s`` is None until the first step has been timed."""

    done: int
    total: int
    eta_s: float | None


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
    progress: Progress | None = None


def crashed(job: Job) -> dict[str, str]:
    """The error of a job that was running each time when its server died."""
    return {
        "code": "crashed",
        "message": f"the server stopped {job.attempts} times while working on it",
        "hint": "try another photo",
    }


class JobStore(Protocol):
    """All jobs, at most a given number of them waiting at a time. Thread-safe. Methods raise StoreError where the store fails."""

    def close(self) -> None:
        """Ends this process's part in it; the store is not used afterwards."""

    def full(self) -> bool:
        """Whether the next job would be refused."""

    def count(self, state: State) -> int:
        """How many jobs are in ``state``, which is QUEUED or RUNNING."""

    def add(self, options: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Job:
        """Stores the pictures ({file name: bytes}), then queues the job. Raises QueueFull."""

    def get(self, job_id: str) -> Job | None:
        """The job, or None when there is none of that id."""

    def waiting(self) -> list[Job]:
        """The queued jobs, the next one first."""

    def position(self, job: Job) -> int:
        """Place in the queue; 1 is the next to run."""

    def claim(self) -> Job | None:
        """Takes the oldest waiting job and marks it running, here; None when none waits."""

    def is_mine(self, job: Job) -> bool:
        """Whether the job still runs here: neither cancelled nor, this process taken for dead, given to another."""

    def release(self, job: Job, *, counted: bool = False) -> None:
        """Puts a job that runs here back at its old place; as no attempt unless ``counted``."""

    def note(self, job: Job, progress: Progress) -> None:
        """Stores where a running job stands."""

    def succeed(self, job: Job, result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> bool:
        """Ends a job that runs here with its pictures, and deletes the uploads; False (and nothing kept) when it is not mine any more."""

    def fail(self, job: Job, error: Mapping[str, str]) -> bool:
        """Ends a job that runs here with the reason; False when it is not mine any more."""

    def erase(self, job_id: str) -> Job | None:
        """Cancels a job that has not ended and deletes its photos, result and prompt now. Returns it as it was, None when there is none.

        The bare record stays until its time is up, so that the answer to a second look is "cancelled" and not "never heard of it".
        """

    def read(self, job_id: str, name: str) -> bytes | None:
        """A picture of a known job; None when it is not there (any more)."""

    def recover(self) -> list[Job]:
        """Queues again what runs at a process that has died; returns the jobs that are given up, having died MAX_ATTEMPTS times.

        Called at the start and from time to time.
        """

    def sweep(self, older_than: float) -> list[str]:
        """Deletes every job that ended before the time ``older_than`` with all its pictures; returns their ids."""

    def publish(self, job_id: str, name: str, data: dict[str, Any], *, last: bool = False) -> None:
        """Tells the listeners of all processes what happened to a job."""


def open_store(config: Config, listener: Listener) -> JobStore:
    """The queue that ``app.queue`` names: ``sqlite``, or the address of a Redis. Raises StoreError, MissingInputError."""
    if config.app.queue == "sqlite":
        from backend.app.sqlite_store import SqliteStore

        return SqliteStore(config.paths.jobs, config.app.queue_size, listener)
    if importlib.util.find_spec("redis") is None:
        hint = "install it with python -m pip install 'deephair[redis]', or set app.queue=sqlite"
        raise MissingInputError("app.queue names a Redis, and the library 'redis' is not installed", hint=hint)
    from backend.app.redis_store import RedisStore

    return RedisStore(config.app.queue, config.app.queue_size, listener)
