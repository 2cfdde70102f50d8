"""A process pool that loses a worker without losing the work (reliability.md C1.7: the standard pool gives up everything)."""

from __future__ import annotations

import logging
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Row = TypeVar("Row")


class Casualty(Generic[Item]):
    """An item that killed its worker twice, the second time alone in it."""

    def __init__(self, item: Item) -> None:
        self.item = item


def run_in_workers(
    items: Iterable[Item], work: Callable[[Item], Row], *, workers: int, start: Callable[..., None], start_args: tuple[object, ...]
) -> Iterator[tuple[Item, Row | Casualty[Item]]]:
    """Yields (item, result) as results come, in no particular order.

    At most two items per worker are in flight, so a dead worker costs no more than those. They are then tried again one at a time in
    a worker of their own; the one that kills that too comes back as a Casualty.
    """
    waiting, suspects = deque(items), deque[Item]()
    while waiting or suspects:
        alone = bool(suspects)
        queue, size = (deque([suspects.popleft()]), 1) if alone else (waiting, workers)
        in_flight: dict[Future[Row], Item] = {}
        with _pool(size, start, start_args) as pool:
            try:
                yield from _drain(pool, queue, in_flight, work, size)
            except BrokenProcessPool:
                lost = list(in_flight.values())
                if alone:
                    yield lost[0], Casualty(lost[0])
                    continue
                logger.warning("a worker died; its %d photos are tried again one by one", len(lost))
                suspects.extend(lost)


def _pool(size: int, start: Callable[..., None], start_args: tuple[object, ...]) -> ProcessPoolExecutor:
    # spawn: a forked child would inherit locks and network sessions of a parent that has threads
    return ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn"), initializer=start, initargs=start_args)


def _drain(
    pool: ProcessPoolExecutor, queue: deque[Item], in_flight: dict[Future[Row], Item], work: Callable[[Item], Row], size: int
) -> Iterator[tuple[Item, Row]]:
    while queue or in_flight:
        while queue and len(in_flight) < 2 * size:
            item = queue.popleft()
            try:
                in_flight[pool.submit(work, item)] = item
            except BrokenProcessPool:
                queue.appendleft(item)
                raise
        done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
        for future in done:
            row = future.result()  # raises BrokenProcessPool while the item is still listed as in flight
            yield in_flight.pop(future), row
