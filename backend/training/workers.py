"""A process pool that loses a worker without losing the work (reliability.md C1.7: the standard pool gives up everything).

Every worker has a pipe of its own and holds one item at a time, so a dead worker costs the item that it held and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from backend.errors import DeepHairError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Row = TypeVar("Row")

CRASHES = 2  # times that an item may take its worker down by a crash of its own (SIGSEGV, SIGABRT, exit) before it is given up
KILLS = 3  # the same for SIGKILL, which comes from outside: the out-of-memory killer, or a person who meant the process and not the item
STARTS = 3  # workers in a row that may die before they are ready

_READY, _ROW, _ERROR = "ready", "row", "error"


@dataclass(frozen=True)
class Casualty(Generic[Item]):
    """An item that took its workers down: how often, and the last one's exit code (negative: the signal)."""

    item: Item
    deaths: int
    exitcode: int

    @property
    def killed(self) -> bool:
        """Whether the worker was killed from outside, so that another time it may go well."""
        return self.exitcode == -signal.SIGKILL


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    held: tuple[int, Any] | None = None  # the item's number and the item


def run_in_workers(
    items: Iterable[Item], work: Callable[[Item], Row], *, workers: int, start: Callable[..., None], start_args: tuple[object, ...]
) -> Iterator[tuple[Item, Row | Casualty[Item]]]:
    """Yields (item, result) as results come, in no particular order.

    ``start(*start_args)`` runs once in each worker. An item whose worker died is tried again after all others, and comes back as a
    Casualty when that happens CRASHES (or KILLS) times. What ``work`` raises is raised here. Raises DeepHairError when workers cannot
    be started. Leaving the iterator early lets the workers finish what they hold and ends them; the death of this process ends them too.
    """
    waiting = deque(enumerate(items))
    deaths: Counter[int] = Counter()
    failed_starts = 0
    pool: list[_Worker] = []
    try:
        pool += [_new_worker(work, start, start_args) for _ in range(min(workers, len(waiting)))]
        while waiting or any(worker.held for worker in pool):
            for pipe in wait_for_any([worker.pipe for worker in pool]):
                worker = next(worker for worker in pool if worker.pipe is pipe)
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError):
                    pool.remove(worker)
                    exitcode = _end(worker)
                    failed_starts = 0 if worker.ready else failed_starts + 1
                    if failed_starts >= STARTS:
                        raise _cannot_start(exitcode) from None
                    if worker.held:
                        number, item = worker.held
                        deaths[number] += 1
                        logger.warning("a worker died (exit code %d); the item that it held is tried again at the end", exitcode)
                        if deaths[number] >= (KILLS if exitcode == -signal.SIGKILL else CRASHES):
                            yield item, Casualty(item, deaths[number], exitcode)
                        else:
                            waiting.append(worker.held)
                    if waiting:
                        pool.append(_new_worker(work, start, start_args))
                    continue
                if kind == _ERROR:
                    raise content
                worker.ready, done, worker.held = True, worker.held, None
                if waiting:
                    worker.held = waiting.popleft()
                    with contextlib.suppress(OSError):  # it has just died; its end of the pipe says so next time round
                        worker.pipe.send(worker.held[1])
                if kind == _ROW and done is not None:
                    yield done[1], content
    finally:
        for worker in pool:
            worker.pipe.close()
        for worker in pool:
            _end(worker)


def _cannot_start(exitcode: int) -> DeepHairError:
    return DeepHairError(
        f"{STARTS} workers in a row died while starting (exit code {exitcode})",
        hint="is there enough memory? fewer workers need less: data.workers=1",
    )


def _new_worker(work: Callable[[Any], Any], start: Callable[..., None], start_args: tuple[object, ...]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # a forked child would inherit locks and network sessions of a parent that has threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, start, start_args), daemon=True)
    process.start()
    theirs.close()  # so that the death of the only other holder is the end of the pipe
    return _Worker(process, ours)


def _end(worker: _Worker) -> int:
    worker.pipe.close()
    worker.process.join(timeout=60)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    return worker.process.exitcode or 0


def _serve(pipe: Connection, work: Callable[[Any], Any], start: Callable[..., None], start_args: tuple[object, ...]) -> None:
    """A worker's life: started, then one item after the other until its pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone decides
    reply = _reply(_READY, lambda: start(*start_args))
    with contextlib.suppress(EOFError, OSError):  # the parent has gone, or wants no more
        while True:
            pipe.send(reply)
            item = pipe.recv()
            reply = _reply(_ROW, functools.partial(work, item))


def _reply(kind: str, action: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return kind, action()
    except Exception as error:  # noqa: BLE001  a process boundary: it is raised again in the parent
        return _ERROR, error
