"""The one thread that runs try-ons, outside the event loop, and the slot that holds the loaded model (DESIGN 4.6, 5)."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from backend import weights as pretrained
from backend.app.jobs import Job, JobStore, State
from backend.app.telemetry import log_event
from backend.app.uploads import BRUSH_FILE, MASK_FILE, REFERENCE_FILE, RESULT_FILE, TARGET_FILE
from backend.config import Config
from backend.errors import DeepHairError
from backend.imaging.decode import ImageError, encode_png, read_png

if TYPE_CHECKING:
    from backend.tryon.pipeline import TryOn
    from backend.tryon.values import TryOnRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Denoising steps of the running job. ``eta_s`` is None until the first step has been timed."""

    done: int
    total: int
    eta_s: float | None


class ModelSlot:
    """The loaded model. A job keeps the one it started with, so a swap never touches a job."""

    def __init__(self, config: Config, factory: Callable[[Config], TryOn]) -> None:
        self._config, self._factory = config, factory
        self._loading = threading.Lock()
        self.current: TryOn | None = None
        self.weights: dict[str, str] = {}  # the pretrained parts under it: name -> what it is
        self.miniature = False

    def load(self) -> TryOn:
        """Loads the deployed bundle beside the current one, then swaps; whatever is raised, the current one stays."""
        with self._loading:
            start = time.monotonic()
            loaded = self._factory(self._config)
            self.weights = pretrained.describe(self._config.paths.weights)
            self.miniature = pretrained.is_miniature(self._config.paths.weights)
            self.current = loaded
            log_event(logger, "model_loaded", bundle=loaded.bundle_sha256, seconds=round(time.monotonic() - start, 2))
            return loaded


class Worker(threading.Thread):
    """Runs the waiting jobs one after the other. ``on_change(job_id)`` is called after every change of a job's state,
    ``on_progress(job_id, progress)`` after every step."""

    def __init__(
        self,
        store: JobStore,
        slot: ModelSlot,
        on_change: Callable[[str], None],
        on_progress: Callable[[str, Progress], None],
    ) -> None:
        super().__init__(name="tryon-worker", daemon=True)
        self._store, self._slot = store, slot
        self._on_change, self._on_progress = on_change, on_progress
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._running: tuple[str, threading.Event] | None = None
        self.progress: tuple[str, Progress] | None = None  # (job id, where it stands)
        self.seconds_per_job = 10.0  # smoothed; for the time that a refused client is asked to wait

    def wake(self) -> None:
        """Says that there may be something to do: a new job, or a loaded model."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Stops the job at its next step if it is the one that runs."""
        running = self._running
        if running is not None and running[0] == job_id:
            running[1].set()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; the running job goes back to the queue. A thread that does not end in time is left to die with the process,
        which the next start treats like a kill."""
        self._stopping.set()
        self._wake.set()
        self.join(timeout_s)

    def run(self) -> None:
        """The thread: jobs in order until ``stop``."""
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                busy = self._slot.current is not None and self._run_next(self._slot.current)
            except Exception:  # the thread's boundary: whatever it was (a full disk, say), later jobs still want a worker
                logger.exception("the worker failed outside a job")
                busy = False
                self._stopping.wait(1.0)
            if not busy:
                self._wake.wait(5.0)

    def _run_next(self, model: TryOn) -> bool:
        job = self._store.claim()
        if job is None:
            return False
        cancel = threading.Event()
        self._running = (job.id, cancel)
        current = self._store.get(job.id)
        if current is None or current.state is not State.RUNNING:  # erased between the claim and the line above
            cancel.set()
        self._on_change(job.id)
        start = time.monotonic()
        try:
            self._run_job(job, model, cancel)
        finally:
            self._running = self.progress = None
        seconds = time.monotonic() - start
        ended = self._store.get(job.id)
        state = ended.state if ended is not None else State.CANCELLED
        if state is State.SUCCEEDED:
            self.seconds_per_job += 0.3 * (seconds - self.seconds_per_job)
        code = (ended.error or {}).get("code") if ended is not None else None
        log_event(logger, "job_ended", job=job.id[:6], state=state, code=code, seconds=round(seconds, 3))
        self._on_change(job.id)
        return True

    def _run_job(self, job: Job, model: TryOn, cancel: threading.Event) -> None:
        error = self._attempt(job, model, cancel)
        if error is None:
            return
        self._store.fail(job, error)
        if error["code"] == "out_of_memory":
            _free_memory()  # only now have the frames that held the arrays gone

    def _attempt(self, job: Job, model: TryOn, cancel: threading.Event) -> dict[str, str] | None:
        """Runs the job and stores its pictures; returns {code, message, hint} when it fails."""
        from backend.tryon.values import Cancelled

        try:
            result = model.run(
                self._request(job),
                on_step=self._step_listener(job.id),
                cancelled=lambda: cancel.is_set() or self._stopping.is_set(),
            )
            pictures = {RESULT_FILE: encode_png(result.image), MASK_FILE: encode_png(mask_to_bytes(result.mask))}
            height, width = result.image.shape[:2]
            facts = {"width": width, "height": height, "bundle_sha256": model.bundle_sha256, "info": result.info}
            self._store.succeed(job, facts, pictures)
        except Cancelled:
            self._store.release(job)  # the server stops; what its person cancelled is not marked running and stays so
        except DeepHairError as error:
            return {"code": error.code, "message": error.message, "hint": error.hint}
        except Exception as error:  # the job's boundary: one job's failure is its own
            if is_out_of_memory(error):
                hint = "send a smaller photo or fewer steps, or try again later"
                return {"code": "out_of_memory", "message": "the server ran out of memory on this photo", "hint": hint}
            logger.exception("a job failed unexpectedly")
            hint = "the reason is in the server's log"
            return {"code": "internal", "message": "the try-on failed unexpectedly", "hint": hint}
        return None

    def _request(self, job: Job) -> TryOnRequest:
        from backend.tryon.values import TryOnRequest

        folder = self._store.folder(job.id)
        files = (TARGET_FILE, REFERENCE_FILE, BRUSH_FILE)
        try:
            pictures = {name: read_png(folder / name) for name in files if name == TARGET_FILE or (folder / name).is_file()}
        except ImageError as error:  # its message names a path of this machine, which is nobody else's business
            raise DeepHairError("the stored photo cannot be read back", hint="send it again", code="storage") from error
        return TryOnRequest(
            target=pictures[TARGET_FILE], reference=pictures.get(REFERENCE_FILE), mask=pictures.get(BRUSH_FILE), **job.options
        )

    def _step_listener(self, job_id: str) -> Callable[[int, int], None]:
        first: list[tuple[int, float]] = []  # when the first step ended; it alone pays for warming up

        def on_step(done: int, total: int) -> None:
            now = time.monotonic()
            if not first:
                first.append((done, now))
            timed = done - first[0][0]
            eta = round((now - first[0][1]) / timed * (total - done), 1) if timed > 0 else None
            progress = Progress(done, total, eta)
            self.progress = (job_id, progress)
            self._on_progress(job_id, progress)

        return on_step


def mask_to_bytes(mask: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A feathered mask, float 0..1, as uint8, rounded UP: 0 says that the pixel is the upload's own."""
    rounded: NDArray[np.uint8] = np.ceil(np.clip(mask, 0.0, 1.0) * 255.0).astype(np.uint8)
    return rounded


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python, on a card, or in a CPU allocator (which raises a bare RuntimeError)."""
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "not enough memory" in text or "failed to allocate memory" in text


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")  # not imported here: a worker without torch loaded has nothing to give back
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
