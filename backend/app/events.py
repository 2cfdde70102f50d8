"""What happened to each job, in order, for server-sent events with replay (DESIGN 4.6).

Events are published from worker and request threads and followed from the event loop. An id is ``<boot>-<number>``: numbers start
anew when the server does, so an id of an earlier boot replays from the start instead of skipping what it never sent.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

HEARTBEAT_S = 15.0


@dataclass(frozen=True)
class Event:
    """One event: its number within the job (from 1), the SSE event name, the JSON data, and whether it is the job's last."""

    number: int
    name: str
    data: dict[str, Any]
    last: bool


@dataclass
class _Log:
    events: list[Event] = field(default_factory=list)
    followers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=set)

    def wake(self) -> None:
        for loop, flag in self.followers:
            if not loop.is_closed():
                loop.call_soon_threadsafe(flag.set)

    def newest(self) -> int:
        """The number of the last event, 0 where there is none."""
        return self.events[-1].number if self.events else 0


def _has_ended(log: _Log, number: int) -> bool:
    return 0 < log.newest() <= number and log.events[-1].last


class EventHub:
    """One growing list of events per job; it shrinks to one when the job is erased. Thread-safe."""

    def __init__(self) -> None:
        self._boot = secrets.token_hex(4)
        self._logs: dict[str, _Log] = {}
        self._lock = threading.Lock()
        self._closed = False

    def publish(self, job_id: str, name: str, data: dict[str, Any], *, last: bool = False) -> bool:
        """Appends an event. False after a job's last one, when nothing is added: progress that comes late cannot follow the end."""
        with self._lock:
            log = self._logs.setdefault(job_id, _Log())
            if log.events and log.events[-1].last:
                return False
            log.events.append(Event(log.newest() + 1, name, data, last))
            log.wake()
            return True

    def replace(self, job_id: str, name: str, data: dict[str, Any], *, last: bool = False) -> None:
        """Drops what has been told of a job and tells this alone. Its number goes on from theirs, so that who follows hears it, too."""
        with self._lock:
            log = self._logs.setdefault(job_id, _Log())
            log.events = [Event(log.newest() + 1, name, data, last)]
            log.wake()

    def jobs(self) -> list[str]:
        """The ids of the jobs of which there are events."""
        with self._lock:
            return list(self._logs)

    def forget(self, job_id: str) -> None:
        """Drops a job's events and ends its streams."""
        with self._lock:
            log = self._logs.pop(job_id, None)
            if log is not None:
                log.wake()

    def close(self) -> None:
        """Ends all streams; the server is stopping."""
        with self._lock:
            self._closed = True
            for log in self._logs.values():
                log.wake()

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._logs

    def __len__(self) -> int:
        return len(self._logs)

    async def follow(self, job_id: str, last_event_id: str | None, *, heartbeat_s: float = HEARTBEAT_S) -> AsyncIterator[str]:
        """SSE text: everything after ``last_event_id``, then what comes, a comment line when nothing came for ``heartbeat_s``;
        ends after the job's last event."""
        flag = asyncio.Event()
        follower = (asyncio.get_running_loop(), flag)
        number = self._number_of(last_event_id)
        with self._lock:
            log = self._logs.get(job_id)
            if log is None:
                return
            log.followers.add(follower)
        try:
            yield "retry: 2000\n\n"
            while True:
                flag.clear()
                for event in [event for event in log.events if event.number > number]:
                    yield self._text(event)
                    number = event.number
                    if event.last:
                        return
                if self._closed or self._logs.get(job_id) is not log or _has_ended(log, number):
                    return
                try:
                    await asyncio.wait_for(flag.wait(), heartbeat_s)
                except TimeoutError:
                    yield ": still here\n\n"
        finally:
            with self._lock:
                log.followers.discard(follower)

    def _number_of(self, event_id: str | None) -> int:
        boot, _, number = (event_id or "").partition("-")
        return int(number) if boot == self._boot and number.isascii() and number.isdigit() and len(number) < 10 else 0

    def _text(self, event: Event) -> str:
        return f"id: {self._boot}-{event.number}\nevent: {event.name}\ndata: {json.dumps(event.data)}\n\n"
