"""Work that runs ahead of its consumer in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def ahead(function: Callable[[Item], Value], items: Iterable[Item], *, workers: int) -> Generator[Value, None, None]:
    """``map`` in order, with at most twice ``workers`` results waiting; 0 workers compute when they are asked. Errors come in their turn."""
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead")
    try:
        coming = iter(items)
        pending: deque[Future[Value]] = deque(pool.submit(function, item) for _, item in zip(range(2 * workers), coming, strict=False))
        while pending:
            value = pending.popleft().result()
            for item in coming:
                pending.append(pool.submit(function, item))
                break
            yield value
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
