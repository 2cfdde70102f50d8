"""The parts of a running server, wired: queue, worker, model, events. What the routes call and what the start and stop do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

from backend.app.events import EventHub
from backend.app.jobs import Job, JobStore, QueueFull, State
from backend.app.problems import Problem
from backend.app.schemas import JobView, ProgressView
from backend.app.telemetry import Metrics, log_event, resident_bytes
from backend.app.uploads import Decoder, Pixels
from backend.app.worker import ModelSlot, Progress, Worker, is_out_of_memory
from backend.config import Config
from backend.errors import DeepHairError

if TYPE_CHECKING:
    from backend.tryon.pipeline import TryOn
    from backend.tryon.values import Preview

logger = logging.getLogger(__name__)

MAX_WAITING_PREVIEWS = 4
STARTING_RETRY_S = 5


class Service:
    """One server's state. Create it, then hold ``running()`` open while it serves."""

    def __init__(self, config: Config, factory: Callable[[Config], TryOn]) -> None:
        self.config, self.settings = config, config.app
        self.metrics, self.hub, self.decoder = Metrics(), EventHub(), Decoder(config.app)
        self.slot = ModelSlot(config, factory)
        self.load_error: DeepHairError | None = None
        self.on_load_failed: Callable[[], None] = lambda: None
        self._previews = threading.Semaphore(MAX_WAITING_PREVIEWS)
        self._preview_turn = threading.Lock()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Opens the queue, takes up what an earlier server left, loads the model in a thread, works; ends in order."""
        self.store = JobStore(self.config.paths.jobs, self.settings.queue_size)
        self.worker = Worker(self.store, self.slot, self.publish, self._publish_progress)
        for job in self.store.recover():
            log_event(logger, "job_given_up", job=job.id[:6])
        for job in self.store.all():
            self._announce(job)
        self.worker.start()
        threading.Thread(target=self._load_first, name="model-loader", daemon=True).start()
        sweeper = asyncio.create_task(self._sweep_for_ever())
        try:
            yield
        finally:
            self.hub.close()
            sweeper.cancel()
            await asyncio.to_thread(self.worker.stop, 10.0)
            if not self.worker.is_alive():
                self.store.close()

    def _load_first(self) -> None:
        try:
            self.slot.load()
            self.worker.wake()
        except Exception as error:  # the thread's boundary: serve() turns it into a message and an exit code
            if not isinstance(error, DeepHairError):
                logger.exception("the model does not load")
            self.load_error = error if isinstance(error, DeepHairError) else DeepHairError(f"the model does not load: {error}")
            self.on_load_failed()

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(min(60.0, self.settings.ttl_s / 4))
            try:
                swept = await asyncio.to_thread(self.store.sweep, time.time() - self.settings.ttl_s)
            except Exception:  # the task's boundary: a sweep that fails once (a full disk) is tried again
                logger.exception("old photos could not be deleted")
                continue
            for job_id in swept:
                self.hub.forget(job_id)

    def ready(self) -> bool:
        """Whether a job that comes now would run."""
        return self.slot.current is not None and self.worker.is_alive()

    def model(self) -> TryOn:
        """The loaded model; Problem 503 while there is none."""
        if self.slot.current is None:
            raise Problem(
                "starting",
                "The model is being loaded.",
                hint="try again in a moment",
                headers={"Retry-After": str(STARTING_RETRY_S)},
            )
        return self.slot.current

    def refuse_when_full(self) -> None:
        """Raises Problem 429 with the time until a place is free."""
        if self.store.full():
            raise self._full()

    def _full(self) -> Problem:
        wait = max(1, math.ceil(self.worker.seconds_per_job))
        detail = f"{self.settings.queue_size} jobs are waiting already."
        return Problem("queue_full", detail, hint=f"try again in {wait} seconds", headers={"Retry-After": str(wait)})

    def submit(self, options: Mapping[str, Any], pictures: Mapping[str, bytes]) -> JobView:
        """Stores and queues a job. Raises Problem 429 or 503."""
        try:
            job = self.store.add(options, pictures)
        except QueueFull as error:
            raise self._full() from error
        except OSError as error:
            logger.exception("an upload could not be stored")
            raise Problem("storage", "The server could not store the photos.", hint="its disk may be full; try again later") from error
        self.metrics.job("accepted")
        self.publish(job.id)
        self.worker.wake()
        return self.view(job)

    def job(self, job_id: str) -> Job:
        """The job; Problem 404 when there is none (any more)."""
        job = self.store.get(job_id)
        if job is None:
            raise Problem(
                "not_found",
                "There is no such job.",
                hint="photos and results are deleted some time after a job has ended",
            )
        return job

    def erase(self, job_id: str) -> None:
        """Cancels the job and deletes its photos. Problem 404 when there is none."""
        before = self.job(job_id)
        self.store.erase(job_id)
        self.worker.cancel(job_id)
        if not before.state.final:
            self.publish(job_id)

    def picture(self, job_id: str, name: str) -> bytes:
        """A finished job's file. Problem 404, 409 or 410 when there is none."""
        job = self.job(job_id)
        if job.erased:
            raise Problem("gone", "The photos of this job were deleted.")
        if not job.state.final:
            raise Problem("not_finished", f"The job is {job.state}.", headers={"Retry-After": "1"})
        if job.state is not State.SUCCEEDED:
            raise Problem("no_result", f"The job {job.state}; its reason is in the job itself.")
        try:
            return (self.store.folder(job_id) / name).read_bytes()
        except FileNotFoundError as error:  # deleted between the two lines above
            raise Problem("gone", "The photos of this job were deleted.") from error

    def preview(self, image: Pixels) -> Preview:
        """Faces and hair of a photo; one at a time, a few may wait, more are asked to come back. Raises Problem."""
        if not self._previews.acquire(blocking=False):
            raise Problem("busy", "Several previews are being made.", hint="try again in a moment", headers={"Retry-After": "2"})
        try:
            with self._preview_turn:
                return self.model().preview(image)
        except DeepHairError as error:
            raise Problem.of(error) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise Problem(
                "busy",
                "There is not enough memory for a preview now.",
                hint="try again later",
                headers={"Retry-After": "10"},
            ) from error
        finally:
            self._previews.release()

    def reload(self) -> None:
        """Loads the deployed bundle anew and swaps; Problem 503 (and the old model stays) when it does not load."""
        self.model()
        try:
            self.slot.load()
        except Exception as error:  # whatever is wrong with the new one must not touch the server
            logger.exception("the new model does not load; the old one stays")
            known = isinstance(error, DeepHairError)
            reason = f" Its check says: {error.code}." if isinstance(error, DeepHairError) else ""
            detail = f"The deployed bundle does not load, so the old one is kept.{reason}"
            raise Problem(
                "reload_failed", detail, hint="run 'deephair verify' on the bundle" if known else "see the server's log"
            ) from error

    def view(self, job: Job) -> JobView:
        """The job as a client sees it."""
        position = self.store.position(job) if job.state is State.QUEUED else None
        running = self.worker.progress
        progress = running[1] if running is not None and running[0] == job.id and job.state is State.RUNNING else None
        return JobView.of(job, ttl_s=self.settings.ttl_s, position=position, progress=progress)

    def publish(self, job_id: str) -> None:
        """Tells a job's followers where it stands now; when it left the queue, the waiting ones learn their new positions."""
        job = self.store.get(job_id)
        if job is None:
            return
        announced = self._announce(job)
        if announced and job.state.final and job.ended:
            self.metrics.job(job.state, job.ended - job.started if job.started else None)
        if job.state is not State.QUEUED:
            for waiting in self.store.all(State.QUEUED):
                self._announce(waiting)

    def _announce(self, job: Job) -> bool:
        return self.hub.publish(job.id, "state", self.view(job).model_dump(mode="json"), last=job.state.final)

    def _publish_progress(self, job_id: str, progress: Progress) -> None:
        self.hub.publish(job_id, "progress", ProgressView.of(progress).model_dump(mode="json"))

    def metrics_text(self) -> str:
        """What Prometheus reads."""
        gauges = {
            "jobs_waiting": self.store.count(State.QUEUED),
            "jobs_running": self.store.count(State.RUNNING),
            "queue_size": self.settings.queue_size,
            "ready": float(self.ready()),
            "resident_bytes": resident_bytes(),
        }
        current = self.slot.current
        return self.metrics.text(gauges, current.bundle_sha256 if current else None)
