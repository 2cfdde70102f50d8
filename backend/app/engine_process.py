"""A try-on engine in a process of its own, behind two pipes: one for jobs, one for previews (``engine`` says why).

Messages are JSON, each followed by as many byte strings as it announces in ``blobs``; nothing but the start is pickled. The child ends
when its pipes do, so it never outlives the server by more than a step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from backend import console
from backend.app.engine import Cancelled, EngineDied, Finished, LocalEngine, OnStep, as_failure, load_tryon
from backend.app.uploads import Pixels
from backend.config import Config
from backend.errors import DeepHairError
from backend.machine import forbid_core_dumps
from backend.tryon.values import Cancelled as Stopped
from backend.tryon.values import FaceInfo, Preview

if TYPE_CHECKING:
    from backend.tryon.pipeline import TryOn

logger = logging.getLogger(__name__)

POLL_S = 0.05  # how often a running job asks whether it is cancelled, beside once a step
CLOSE_S = 5.0
END_S = 10.0  # that the child waits for its last preview; the server, where it lives, ends it after CLOSE_S
NICENESS = 5  # answers to people come before painting where they share cores

Message = tuple[dict[str, Any], list[bytes]]


class ProcessEngine:
    """An ``Engine`` whose model lives in a child process. ``start`` makes one."""

    def __init__(self, process: Any, jobs: Connection, previews: Connection, about: Mapping[str, Any]) -> None:
        self._process, self._jobs, self._previews = process, jobs, previews
        self._preview_turn, self._number = threading.Lock(), 0
        self.bundle_sha256: str = about["bundle_sha256"]
        self.header: dict[str, Any] = about["header"]

    @classmethod
    def start(cls, config: Config, factory: Callable[[Config], TryOn] = load_tryon) -> ProcessEngine:
        """Starts the child and waits until its model is loaded. Raises the DeepHairError of the load, or EngineDied."""
        context = multiprocessing.get_context("spawn")  # not fork: CUDA does not survive it, nor do locks that a thread holds
        (jobs, child_jobs), (previews, child_previews) = context.Pipe(), context.Pipe()
        process = context.Process(target=_serve, args=(config, factory, child_jobs, child_previews), name="tryon", daemon=True)
        process.start()
        child_jobs.close()
        child_previews.close()
        try:
            with _death_noticed():
                about, _ = _answer(jobs)
        except BaseException:
            jobs.close()
            previews.close()
            process.join(CLOSE_S)
            raise
        return cls(process, jobs, previews, about)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return int(self._process.pid)

    def run(self, options: Mapping[str, Any], pictures: Mapping[str, bytes], *, on_step: OnStep, cancelled: Cancelled) -> Finished:
        """See ``Engine``."""
        self._number += 1
        with _death_noticed():
            _send(self._jobs, {"number": self._number, "options": dict(options), "names": list(pictures)}, list(pictures.values()))
            try:
                said, blobs = self._followed(on_step, cancelled)
            except BaseException:
                _send(self._jobs, {"cancel": self._number})  # it may go on there; what it still says is not the next job's
                raise
        if "cancelled" in said:
            raise Stopped
        return Finished(dict(zip(said["names"], blobs, strict=True)), said["facts"])

    def _followed(self, on_step: OnStep, cancelled: Cancelled) -> Message:
        """The last message of the running job."""
        asked = False
        while True:
            if not asked and cancelled():
                _send(self._jobs, {"cancel": self._number})
                asked = True
            if not self._jobs.poll(POLL_S):
                continue
            said, blobs = _receive(self._jobs)
            if said["number"] != self._number:
                continue
            if "step" not in said:
                return _checked(said), blobs
            on_step(*said["step"])

    def preview(self, image: Pixels) -> Preview:
        """See ``Engine``."""
        with self._preview_turn, _death_noticed():
            _send(self._previews, {"shape": image.shape}, [np.ascontiguousarray(image).data.cast("B")])
            said, (mask,) = _answer(self._previews)
        faces = [FaceInfo(tuple(face["box"]), face["confidence"], face["landmarks"]) for face in said["faces"]]
        return Preview(faces, np.frombuffer(mask, np.uint8).reshape(image.shape[:2]))

    def close(self) -> None:
        """See ``Engine``: ends the child."""
        self._jobs.close()
        self._previews.close()
        self._process.join(CLOSE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _death_noticed() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise EngineDied("the process that holds the model has ended", hint="it is started again; see the log") from error


def _send(connection: Connection, message: Mapping[str, Any], blobs: Sequence[bytes | memoryview] = ()) -> None:
    connection.send_bytes(json.dumps({**message, "blobs": len(blobs)}).encode())
    for blob in blobs:
        connection.send_bytes(blob)


def _receive(connection: Connection) -> Message:
    message: dict[str, Any] = json.loads(connection.recv_bytes())
    return message, [connection.recv_bytes() for _ in range(message["blobs"])]


def _answer(connection: Connection) -> Message:
    message, blobs = _receive(connection)
    return _checked(message), blobs


def _checked(message: dict[str, Any]) -> dict[str, Any]:
    if "error" in message:
        told = message["error"]
        raise DeepHairError(told["message"], hint=told["hint"], code=told["code"])
    return message


# ---- the child ----


def _serve(config: Config, factory: Callable[[Config], TryOn], jobs: Connection, previews: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends this process in its own order
    os.nice(NICENESS)
    forbid_core_dumps()
    console.set_up_logging()
    looking = None
    with contextlib.suppress(EOFError, OSError):  # the pipes end with the server
        try:
            engine = LocalEngine(factory(config))
        except Exception as error:  # the process's boundary: the server reports it
            logger.exception("the model does not load")
            _send_error(jobs, error if isinstance(error, DeepHairError) else DeepHairError(f"the model does not load: {error}"))
            return
        _send(jobs, {"bundle_sha256": engine.bundle_sha256, "header": engine.header})
        looking = threading.Thread(target=_serve_previews, args=(engine, previews), name="previews", daemon=True)
        looking.start()
        while True:
            _serve_next(engine, jobs)
    if looking is not None:  # an interpreter that ends under a thread in the networks' libraries is aborted by them
        looking.join(END_S)


def _serve_next(engine: LocalEngine, jobs: Connection) -> None:
    """One message. In a function of its own, so that no photo stays referenced while the next message is waited for."""
    message, blobs = _receive(jobs)
    if "number" in message:  # else a cancellation that came when its job had ended
        _serve_job(engine, jobs, message, blobs)


def _serve_job(engine: LocalEngine, jobs: Connection, message: Mapping[str, Any], blobs: Sequence[bytes]) -> None:
    number, stopped = message["number"], False

    def cancelled() -> bool:
        nonlocal stopped
        while jobs.poll():
            said, _ = _receive(jobs)
            stopped = stopped or said.get("cancel") == number
        return stopped

    def on_step(done: int, total: int) -> None:
        _send(jobs, {"number": number, "step": [done, total]})

    pictures = dict(zip(message["names"], blobs, strict=True))
    try:
        finished = engine.run(message["options"], pictures, on_step=on_step, cancelled=cancelled)
    except Stopped:
        _send(jobs, {"number": number, "cancelled": True})
    except DeepHairError as error:
        _send_error(jobs, error, number)
    else:
        said = {"number": number, "names": list(finished.pictures), "facts": finished.facts}
        _send(jobs, said, list(finished.pictures.values()))


def _serve_previews(engine: LocalEngine, previews: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            _look_next(engine, previews)


def _look_next(engine: LocalEngine, previews: Connection) -> None:
    message, (pixels,) = _receive(previews)
    try:
        seen = engine.preview(np.frombuffer(pixels, np.uint8).reshape(message["shape"]))
    except DeepHairError as error:
        _send_error(previews, error)
        return
    _send(previews, {"faces": [asdict(face) for face in seen.faces]}, [seen.hair_mask.tobytes()])


def _send_error(connection: Connection, error: Exception, number: int = 0) -> None:
    failure = as_failure(error)
    _send(connection, {"number": number, "error": {"code": failure.code, "message": failure.message, "hint": failure.hint}})
