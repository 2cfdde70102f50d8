"""The one thread that hands jobs to the engine, outside the event loop, and the slot that holds the loaded model (DESIGN 4.6, 5)."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from backend import weights as pretrained
from backend.app.engine import Engine, EngineDied, as_failure
from backend.app.jobs import MAX_ATTEMPTS, Job, JobStore, Progress, State, StoreError, crashed
from backend.app.telemetry import log_event
from backend.app.uploads import BRUSH_FILE, REFERENCE_FILE, TARGET_FILE
from backend.config import Config
from backend.errors import DeepHairError

logger = logging.getLogger(__name__)

IDLE_S = 5.0  # a queue that other servers fill, too, is looked at this often at least; news of a job come earlier
RETRY_S = 1.0


@dataclass
class _Held:
    engine: Engine
    users: int = 0
    retired: bool = False


class ModelSlot:
    """The loaded engine. A job keeps the one it started with, so a swap never touches a job; the last to leave an old one closes it."""

    def __init__(self, config: Config, factory: Callable[[Config], Engine]) -> None:
        self._config, self._factory = config, factory
        self._loading, self._lock = threading.Lock(), threading.Lock()
        self._held: _Held | None = None
        self.died = False  # there was a model, and its process has ended
        self.weights: dict[str, str] = {}  # the pretrained parts under it: name -> what it is
        self.miniature = False

    @property
    def current(self) -> Engine | None:
        """The engine that the next job gets; to work with it, ``borrowed`` it."""
        held = self._held
        return held.engine if held is not None else None

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[Engine]:
        """The current engine, not closed while it is held. Raises EngineDied when there is none."""
        with self._lock:
            held = self._held
            if held is None:
                raise EngineDied("no model is loaded", hint="try again in a moment")
            held.users += 1
        try:
            yield held.engine
        finally:
            self._leave(held)

    def load(self) -> Engine:
        """Loads the deployed bundle beside the current one, then swaps; whatever is raised, the current one stays."""
        with self._loading:
            start = time.monotonic()
            engine = self._factory(self._config)
            self.weights = pretrained.describe(self._config.paths.weights)
            self.miniature = pretrained.is_miniature(self._config.paths.weights)
            self._swap(_Held(engine))
            log_event(logger, "model_loaded", bundle=engine.bundle_sha256, seconds=round(time.monotonic() - start, 2))
            return engine

    def discard(self, engine: Engine) -> None:
        """Says that the engine's process has ended; the worker loads another one."""
        with self._lock:
            if self._held is None or self._held.engine is not engine:
                return
            self.died = True
        self._swap(None)
        logger.error("the process that held the model has ended; it is started again")

    def close(self) -> None:
        """Gives the model back once nobody works with it."""
        self._swap(None)

    def _swap(self, new: _Held | None) -> None:
        with self._lock:
            old, self._held = self._held, new
            if new is not None:
                self.died = False
            if old is not None:
                old.retired, old.users = True, old.users + 1
        if old is not None:
            self._leave(old)

    def _leave(self, held: _Held) -> None:
        with self._lock:
            held.users -= 1
            last = held.retired and held.users == 0
        if last:
            held.engine.close()


class Worker(threading.Thread):
    """Runs the waiting jobs one after the other. ``on_change(job_id)`` is called after every change of a job's state,
    ``on_progress(job_id, progress)`` after every step, ``on_end(state, seconds)`` when a job has succeeded or failed here.

    wake: set where there may be something to do, such as a new job or a loaded model.
    """

    def __init__(
        self,
        store: JobStore,
        slot: ModelSlot,
        on_change: Callable[[str], None],
        on_progress: Callable[[str, Progress], None],
        on_end: Callable[[State, float], None],
        wake: threading.Event,
    ) -> None:
        super().__init__(name="tryon-worker", daemon=True)
        self._store, self._slot = store, slot
        self._on_change, self._on_progress, self._on_end = on_change, on_progress, on_end
        self._wake, self._stopping = wake, threading.Event()
        self._claimed: Job | None = None  # what must not be left marked as running here
        self.seconds_per_job = 10.0  # smoothed; for the time that a refused client is asked to wait

    def stop(self, timeout_s: float) -> None:
        """Ends the thread; the running job goes back to the queue, as no attempt. A thread that does not end in time (a step may take longer) is
        left to die with the process; what it still reports of the job is refused."""
        self._stopping.set()
        self._wake.set()
        self.join(timeout_s)
        job = self._claimed
        if not self.is_alive() or job is None:
            return
        try:
            self._store.release(job)
            self._on_change(job.id)
        except StoreError:
            logger.exception("the running job could not be handed back; the next start counts this stop as an attempt")

    def run(self) -> None:
        """The thread: jobs in order until ``stop``."""
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                if self._claimed is not None:  # the store failed under it
                    self._store.release(self._claimed, counted=True)
                    self._claimed = None
                if self._slot.died:
                    self._slot.load()
                busy = self._slot.current is not None and self._run_next()
            except Exception:  # the thread's boundary: whatever it was (a full disk, say), later jobs still want a worker
                logger.exception("the worker failed outside a job")
                busy = False
                self._stopping.wait(RETRY_S)
            if not busy:
                self._wake.wait(IDLE_S)

    def _run_next(self) -> bool:
        with self._slot.borrowed() as engine:
            job = self._claimed = self._store.claim()
            if job is None:
                return False
            self._on_change(job.id)
            start = time.monotonic()
            state, error = self._run_job(job, engine)
            self._claimed = None
            seconds = time.monotonic() - start
        if state is State.SUCCEEDED:
            self.seconds_per_job += 0.3 * (seconds - self.seconds_per_job)
        if state is not None:
            self._on_end(state, seconds)
        code = error.code if error is not None else None
        if state is None:
            now = self._store.get(job.id)
            state = now.state if now is not None else State.CANCELLED
        log_event(logger, "job_ended", job=job.id[:6], state=state, code=code, seconds=round(seconds, 3))
        self._on_change(job.id)
        return True

    def _run_job(self, job: Job, engine: Engine) -> tuple[State | None, DeepHairError | None]:
        """How the job ended by this run; None when it did not (cancelled, given to another, or queued again)."""
        from backend.tryon.values import Cancelled

        try:
            finished = engine.run(
                job.options, self._pictures(job), on_step=self._step_listener(job), cancelled=lambda: self._must_stop(job)
            )
            return (State.SUCCEEDED if self._store.succeed(job, finished.facts, finished.pictures) else None), None
        except Cancelled:
            self._store.release(job)  # the server stops; what its person cancelled is not this worker's any more and stays so
            return None, None
        except EngineDied as died:
            self._slot.discard(engine)
            if job.attempts < MAX_ATTEMPTS:
                self._store.release(job, counted=True)
                return None, died
            error: DeepHairError = died
            told = crashed(job)
        except Exception as unexpected:  # noqa: BLE001 - the job's boundary: one job's failure is its own
            error = as_failure(unexpected)
            told = {"code": error.code, "message": error.message, "hint": error.hint}
        return (State.FAILED if self._store.fail(job, told) else None), error

    def _pictures(self, job: Job) -> dict[str, bytes]:
        found = {name: self._store.read(job.id, name) for name in (TARGET_FILE, REFERENCE_FILE, BRUSH_FILE)}
        if found[TARGET_FILE] is None and self._store.is_mine(job):
            raise StoreError("the stored photo is gone", hint="send it again")
        return {name: content for name, content in found.items() if content is not None}

    def _must_stop(self, job: Job) -> bool:
        try:
            return self._stopping.is_set() or not self._store.is_mine(job)
        except StoreError:  # a queue that cannot be reached for a moment says nothing about the job
            return False

    def _step_listener(self, job: Job) -> Callable[[int, int], None]:
        first: list[tuple[int, float]] = []  # when the first step ended; it alone pays for warming up

        def on_step(done: int, total: int) -> None:
            now = time.monotonic()
            if not first:
                first.append((done, now))
            timed = done - first[0][0]
            eta = round((now - first[0][1]) / timed * (total - done), 1) if timed > 0 else None
            progress = Progress(done, total, eta)
            with contextlib.suppress(StoreError):  # news of a job are not worth the job
                self._store.note(job, progress)
                self._on_progress(job.id, progress)

        return on_step
