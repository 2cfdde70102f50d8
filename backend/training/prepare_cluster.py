"""Stage 0 beyond one machine: the same function for one photo, on the workers of a dask scheduler (docs/scale.md).

Every machine must see photos, weights and the processed folder under the same paths and run the same code; each worker checks both
before its first photo. Files are written where they belong by the workers, rows come back and are kept by the caller.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import cv2

from backend.errors import DeepHairError, MissingInputError, UsageError
from backend.training.data_processing.labels import Pair
from backend.training.prepare_photo import PhotoSettings, process
from backend.training.prepare_state import processing_digest
from backend.training.training_face import FaceAnalyzer, forgo_torch
from backend.training.workers import Casualty

if TYPE_CHECKING:
    from distributed import Client

CONNECT_S = 30
AHEAD = 4  # photos per worker thread that are under way, so that none waits for the next

_thread = threading.local()  # of a dask worker: one analyzer per thread and settings


def run_on_cluster(pairs: list[Pair], settings: PhotoSettings, address: str) -> Iterator[tuple[Pair, dict[str, Any] | Casualty[Pair]]]:
    """Yields (pair, row) as rows come, like ``run_in_workers``.

    A photo whose worker died is given to others by dask; one that took down as many as dask's ``allowed-failures`` comes back as a
    Casualty. Raises UsageError when dask is not installed, DeepHairError when the scheduler cannot be reached, has no worker, or a
    worker lacks the folders or runs other code.
    """
    try:
        import distributed
    except ImportError as error:
        raise UsageError("data.scheduler needs dask.distributed", hint="pip install 'deephair[cluster]' on every machine") from error
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise DeepHairError(f"no dask scheduler answers at {address}: {error}", hint="start one: dask scheduler") from error
    with client:
        yield from _map(client, pairs, settings)


def _map(client: Client, pairs: list[Pair], settings: PhotoSettings) -> Iterator[tuple[Pair, dict[str, Any] | Casualty[Pair]]]:
    import distributed

    threads = sum(client.nthreads().values())
    if not threads:
        raise DeepHairError("the dask scheduler has no workers", hint="start some: dask worker ADDRESS --nthreads 1 --nworkers -1")
    digest = processing_digest()
    waiting = iter(pairs)
    under_way: dict[Any, Pair] = {}

    def submit(pair: Pair) -> Any:
        future = client.submit(process_on_worker, pair, settings, digest, pure=False)
        under_way[future] = pair
        return future

    finished = distributed.as_completed([submit(pair) for pair in islice(waiting, AHEAD * threads)], loop=client.loop)
    for future in finished:
        pair = under_way.pop(future)
        try:
            row = future.result()
        except distributed.KilledWorker as error:  # how they died dask does not say: lost machines are likelier than a bad photo
            row = Casualty(pair, error.allowed_failures + 1, -signal.SIGKILL)
        for following in islice(waiting, 1):
            finished.add(submit(following))
        yield pair, row


def process_on_worker(pair: Pair, settings: PhotoSettings, digest: str) -> dict[str, Any]:
    """``prepare_photo.process`` in a dask worker, whose networks are loaded once per thread."""
    if getattr(_thread, "settings", None) != settings:
        _check_worker(settings, digest)
        forgo_torch()
        cv2.setNumThreads(1)
        _thread.faces = FaceAnalyzer(settings.weights, settings.identity_model, threads=1)
        _thread.settings = settings
    return process(pair, settings, _thread.faces)


def _check_worker(settings: PhotoSettings, digest: str) -> None:
    host = socket.gethostname()
    for folder in (settings.images, settings.processed):
        if not folder.is_dir():
            raise MissingInputError(f"the dask worker on {host} has no {folder}", hint="mount it there under the same path")
    if processing_digest() != digest:
        raise DeepHairError(
            f"the dask worker on {host} runs other code or libraries than this machine, and its pictures would differ",
            hint="install the same commit and requirements.lock there, and start its workers anew",
        )
