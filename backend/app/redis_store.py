"""The queue of several servers on several machines: everything in one Redis (``jobs`` says what it promises).

Each change of state is one Lua script, so it happens once and wholly. Who runs a job keeps a key alive; when that key expires, the
others queue the job again, and whatever the lost process still reports of it is refused, since it is not the job's owner any more.

Pictures lie in Redis too, so that servers need no common disk: room for ``app.queue_size`` uploads, and for the results of the last
``app.ttl_s``. An accepted job is as safe as Redis is: with ``appendonly yes`` and ``appendfsync always`` it survives a power cut.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar, cast

import redis

from backend.app.jobs import MAX_ATTEMPTS, Job, Listener, Progress, QueueFull, State, StoreError, crashed
from backend.app.redis_scripts import PREFIX, SCRIPTS

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

ALIVE_S = 10  # a process that has not been heard of for so long is taken for dead
BEAT_S = 2.0
UNCLAIMED_S = 600  # a picture that no job came to own is gone after this
OLDEST = (6, 2)  # XTRIM by time and open ranges of a stream
EVENTS = 10_000  # kept at most, and no longer than the jobs, for servers that were cut off for a moment


def _reported(method: F) -> F:
    """What Redis raises, as a StoreError."""

    @functools.wraps(method)
    def reporting(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except redis.RedisError as error:
            hint = "see whether the Redis that app.queue names runs and has room"
            raise StoreError("the queue cannot be reached, or takes no more", hint=hint) from error

    return cast(F, reporting)


class RedisStore:
    """All jobs in the Redis at ``url``; at most ``capacity`` of them wait at a time, over all servers."""

    def __init__(self, url: str, capacity: int, listener: Listener) -> None:
        self._capacity, self._listener = capacity, listener
        self._owner = secrets.token_hex(8)
        self._taken: set[str] = set()  # what the worker here knows that it runs
        self._redis = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5, health_check_interval=30)
        self._scripts = {name: self._redis.register_script(body) for name, body in SCRIPTS.items()}
        self._closing = threading.Event()
        try:
            self._beat()
            version = str(self._redis.info("server")["redis_version"])
        except redis.RedisError as error:
            hint = "start it, or set app.queue=sqlite where one machine serves"
            raise StoreError(f"the Redis that app.queue names does not answer: {type(error).__name__}", hint=hint) from error
        if tuple(map(int, version.split(".")[:2])) < OLDEST:
            raise StoreError(
                f"the Redis that app.queue names is {version}; what has ended could not be deleted in it",
                hint=f"it takes Redis {OLDEST[0]}.{OLDEST[1]} or newer",
            )
        self._threads = [
            threading.Thread(target=self._repeat, args=(work, pause), name=name, daemon=True)
            for name, work, pause in (("queue-beat", self._beat, BEAT_S), ("queue-news", self._hear, 0.0))
        ]
        self._heard = "0"  # from the first event that Redis still has: who follows a job here misses nothing
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(Exception):
            self._redis.delete(f"{PREFIX}alive:{self._owner}")  # else the others wait for it to expire
        for thread in self._threads:
            thread.join(3)
        self._redis.close()

    def _repeat(self, work: Callable[[], None], pause: float) -> None:
        while not self._closing.is_set():
            try:
                work()
            except redis.RedisError:
                if not self._closing.is_set():
                    logger.warning("the queue cannot be reached; trying again")
                    self._closing.wait(1.0)
            self._closing.wait(pause)

    def _beat(self) -> None:
        self._redis.set(f"{PREFIX}alive:{self._owner}", 1, ex=ALIVE_S)

    def _hear(self) -> None:
        for _, events in self._redis.xread({f"{PREFIX}events": self._heard}, count=200, block=1000) or []:
            for number, fields in events:
                self._heard = number
                self._listener(fields[b"job"].decode(), fields[b"name"].decode(), json.loads(fields[b"data"]), fields[b"last"] == b"1")

    def _run(self, script: str, job_id: str, *arguments: object) -> Any:
        return self._scripts[script](keys=[f"{PREFIX}job:{job_id}"], args=list(arguments))

    @_reported
    def full(self) -> bool:
        return self.count(State.QUEUED) >= self._capacity

    @_reported
    def count(self, state: State) -> int:
        return int(self._redis.zcard(PREFIX + state))

    @_reported
    def add(self, options: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Job:
        job_id = secrets.token_urlsafe(24)
        for name, content in pictures.items():
            self._redis.set(f"{PREFIX}file:{job_id}:{name}", content, ex=UNCLAIMED_S)
        if not self._run("add", job_id, job_id, self._capacity, json.dumps(dict(options)), time.time(), *pictures):
            self._redis.delete(*(f"{PREFIX}file:{job_id}:{name}" for name in pictures))
            raise QueueFull(f"{self._capacity} jobs are waiting already", hint="try again in a moment")
        job = self.get(job_id)
        assert job is not None
        return job

    @_reported
    def get(self, job_id: str) -> Job | None:
        fields = self._redis.hgetall(f"{PREFIX}job:{job_id}")
        return _job({name.decode(): value.decode() for name, value in fields.items()}) if fields else None

    @_reported
    def waiting(self) -> list[Job]:
        return self._jobs(self._redis.zrange(f"{PREFIX}queued", 0, -1))

    def _jobs(self, ids: Iterable[bytes]) -> list[Job]:
        found = (self.get(job_id.decode()) for job_id in ids)
        return [job for job in found if job is not None]

    @_reported
    def position(self, job: Job) -> int:
        return int(self._redis.zcount(f"{PREFIX}queued", "-inf", job.seq))

    @_reported
    def claim(self) -> Job | None:
        taken = self._run("claim", "", self._owner, time.time())
        if not taken:
            return None
        self._taken.add(taken.decode())
        return self.get(taken.decode())

    @_reported
    def is_mine(self, job: Job) -> bool:
        state, owner, attempts = self._redis.hmget(f"{PREFIX}job:{job.id}", "state", "owner", "attempts")
        return (state, owner, attempts) == (b"running", self._owner.encode(), str(job.attempts).encode())

    @_reported
    def release(self, job: Job, *, counted: bool = False) -> None:
        self._run("release", job.id, job.id, self._owner, job.attempts, 0 if counted else 1)
        self._taken.discard(job.id)

    @_reported
    def note(self, job: Job, progress: Progress) -> None:
        self._run("note", job.id, self._owner, job.attempts, json.dumps(asdict(progress)))

    @_reported
    def succeed(self, job: Job, result: Mapping[str, Any], pictures: Mapping[str, bytes]) -> bool:
        suffix = f":{self._owner}:{job.attempts}"  # two processes may have run it; only the owner's pictures get the name
        for name, content in pictures.items():
            self._redis.set(f"{PREFIX}file:{job.id}:{name}{suffix}", content, ex=UNCLAIMED_S)
        return self._finish(job, self._owner, State.SUCCEEDED, "result", result, suffix, pictures)

    @_reported
    def fail(self, job: Job, error: Mapping[str, str]) -> bool:
        return self._finish(job, self._owner, State.FAILED, "error", error)

    def _finish(
        self, job: Job, owner: str, state: State, field: str, value: Mapping[str, Any], suffix: str = "", names: Iterable[str] = ()
    ) -> bool:
        self._taken.discard(job.id)
        about = (job.id, owner, job.attempts, state, time.time(), field, json.dumps(dict(value)), suffix)
        return bool(self._run("finish", job.id, *about, *names))

    @_reported
    def erase(self, job_id: str) -> Job | None:
        job = self.get(job_id)
        state = self._run("erase", job_id, job_id, time.time()) if job is not None else None
        if state:
            self._unpublish(job_id)
        return replace(job, state=State(state.decode())) if job is not None and state else None

    def _unpublish(self, job_id: str) -> None:
        """Takes the events of a job out of the stream: they hold its settings."""
        start = "-"
        while events := self._redis.xrange(f"{PREFIX}events", min=start, count=1000):
            of_job = [number for number, fields in events if fields[b"job"].decode() == job_id]
            if of_job:
                self._redis.xdel(f"{PREFIX}events", *of_job)
            start = f"({events[-1][0].decode()}"

    @_reported
    def read(self, job_id: str, name: str) -> bytes | None:
        content: bytes | None = self._redis.get(f"{PREFIX}file:{job_id}:{name}")
        return content

    @_reported
    def recover(self) -> list[Job]:
        given_up = []
        for job in self._jobs(self._redis.zrange(f"{PREFIX}running", 0, -1)):
            owner = (self._redis.hget(f"{PREFIX}job:{job.id}", "owner") or b"").decode()
            # one's own, too, where the answer to claim() was lost on its way
            lost = owner == self._owner and job.id not in self._taken and time.time() - (job.started or 0.0) > ALIVE_S
            if not lost and self._redis.exists(f"{PREFIX}alive:{owner}"):
                continue
            # both scripts look again whether it is still that owner's, so two servers that come here together do it once
            if job.attempts < MAX_ATTEMPTS:
                self._run("release", job.id, job.id, owner, job.attempts, 0)
            elif self._finish(job, owner, State.FAILED, "error", crashed(job)):
                given_up.append(job)
        return given_up

    @_reported
    def sweep(self, older_than: float) -> list[str]:
        ids = [job_id.decode() for job_id in self._redis.zrangebyscore(f"{PREFIX}ended", "-inf", older_than)]
        forgotten = [job_id for job_id in ids if self._run("forget", job_id, job_id)]
        # a stream's ids begin with the time in ms; without this a quiet server would tell of its last jobs for ever
        self._redis.xtrim(f"{PREFIX}events", minid=int(max(older_than, 0.0) * 1000), approximate=False)
        return forgotten

    @_reported
    def publish(self, job_id: str, name: str, data: dict[str, Any], *, last: bool = False) -> None:
        event = {"job": job_id, "name": name, "data": json.dumps(data), "last": int(last)}
        self._redis.xadd(f"{PREFIX}events", event, maxlen=EVENTS, approximate=True)


def _job(fields: Mapping[str, str]) -> Job:
    return Job(
        seq=int(fields["seq"]),
        id=fields["id"],
        state=State(fields["state"]),
        options=json.loads(fields["options"]),
        created=float(fields["created"]),
        started=float(fields["started"]) if "started" in fields else None,
        ended=float(fields["ended"]) if "ended" in fields else None,
        attempts=int(fields["attempts"]),
        error=json.loads(fields["error"]) if "error" in fields else None,
        result=json.loads(fields["result"]) if "result" in fields else None,
        erased=fields["erased"] == "1",
        progress=Progress(**json.loads(fields["progress"])) if "progress" in fields else None,
    )
