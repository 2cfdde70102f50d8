"""The parts of a running server, wired: queue, worker, model, events. What the routes call and what the start and stop do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from backend.app.engine import Engine, EngineDied
from backend.app.events import EventHub
from backend.app.gallery import Offered
from backend.app.jobs import Job, Progress, QueueFull, State, StoreError, open_store
from backend.app.problems import Problem
from backend.app.schemas import JobView, ProgressView
from backend.app.telemetry import Metrics, log_event, resident_bytes
from backend.app.uploads import Decoder, Pixels
from backend.app.worker import ModelSlot, Worker
from backend.config import Config
from backend.errors import DeepHairError
from backend.tryon.values import Preview

logger = logging.getLogger(__name__)

MAX_WAITING_PREVIEWS = 4
STARTING_RETRY_S = 5
RECOVER_S = 2.0  # how often one looks for jobs of servers that have died


class Service:
    """One server's state. Create it, then hold ``running()`` open while it serves."""

    def __init__(self, config: Config, factory: Callable[[Config], Engine]) -> None:
        self.config, self.settings = config, config.app
        self.metrics, self.hub, self.decoder = Metrics(), EventHub(), Decoder(config.app)
        self.slot, self.offered = ModelSlot(config, factory), Offered(config.app.gallery)
        self.load_error: DeepHairError | None = None
        self.on_load_failed: Callable[[], None] = lambda: None
        self._previews = threading.Semaphore(MAX_WAITING_PREVIEWS)
        self._preview_turn, self._wake = threading.Lock(), threading.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Opens the queue, takes up what an earlier server left, loads the model in a thread, works; ends in order."""
        try:
            self.store = open_store(self.config, self._heard)
        except DeepHairError as error:
            self.load_error = error  # uvicorn keeps the reason to itself
            raise
        self.worker = Worker(self.store, self.slot, self.publish, self._publish_progress, self.metrics.job, self._wake)
        self._recover()
        self.worker.start()
        threading.Thread(target=self._load_first, name="model-loader", daemon=True).start()
        tasks = [asyncio.create_task(work) for work in (
            self._repeat(self._sweep, min(60.0, self.settings.ttl_s / 4)), self._repeat(self._recover, RECOVER_S)
        )]  # fmt: skip
        try:
            yield
        finally:
            self.hub.close()
            for task in tasks:
                task.cancel()
            await asyncio.to_thread(self.worker.stop, 10.0)
            if not self.worker.is_alive():
                await asyncio.to_thread(self.slot.close)
                await asyncio.to_thread(self.store.close)

    def _heard(self, job_id: str, name: str, data: dict[str, Any], last: bool) -> None:
        """What happened to a job, here or at another server. Of an erased one nothing that was told before is kept."""
        tell = self.hub.replace if data.get("photos_deleted") else self.hub.publish
        tell(job_id, name, data, last=last)
        if name == "state" and data["state"] == State.QUEUED:
            self._wake.set()

    def _recover(self) -> None:
        for job in self.store.recover():
            self.metrics.job(State.FAILED)
            log_event(logger, "job_given_up", job=job.id[:6])
            self.publish(job.id)

    def _load_first(self) -> None:
        try:
            self.slot.load()
            self._wake.set()
        except Exception as error:  # the thread's boundary: serve() turns it into a message and an exit code
            if not isinstance(error, DeepHairError):
                logger.exception("the model does not load")
            self.load_error = error if isinstance(error, DeepHairError) else DeepHairError(f"the model does not load: {error}")
            self.on_load_failed()

    async def _repeat(self, work: Callable[[], None], pause_s: float) -> None:
        while True:
            await asyncio.sleep(pause_s)
            try:
                await asyncio.to_thread(work)
            except Exception:  # the task's boundary: what fails once (a full disk, a queue that is down) is tried again
                logger.exception("housekeeping failed; it is tried again")

    def _sweep(self) -> None:
        self.store.sweep(time.time() - self.settings.ttl_s)
        for job_id in self.hub.jobs():
            if self.store.get(job_id) is None:  # swept, here or by another server
                self.hub.forget(job_id)

    def ready(self) -> bool:
        """Whether a job that comes now would run."""
        return self.slot.current is not None and self.worker.is_alive()

    def require_model(self) -> None:
        """Problem 503 while no model is loaded."""
        if self.slot.current is None:
            raise self._starting()

    def _starting(self) -> Problem:
        wait = {"Retry-After": str(STARTING_RETRY_S)}
        return Problem("starting", "The model is being loaded.", hint="try again in a moment", headers=wait)

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
        except StoreError:
            logger.exception("an upload could not be stored")
            raise
        self.metrics.job("accepted")
        self.publish(job.id)
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
        before = self.store.erase(job_id)
        if before is None:
            self.job(job_id)
        elif not before.state.final:
            self.metrics.job(State.CANCELLED, time.time() - before.started if before.started else None)
            self.publish(job_id)
        elif not before.erased:
            self._announce(self.job(job_id))

    def picture(self, job_id: str, name: str) -> bytes:
        """A finished job's file. Problem 404, 409 or 410 when there is none."""
        job = self.job(job_id)
        if job.erased:
            raise Problem("gone", "The photos of this job were deleted.")
        if not job.state.final:
            raise Problem("not_finished", f"The job is {job.state}.", headers={"Retry-After": "1"})
        if job.state is not State.SUCCEEDED:
            raise Problem("no_result", f"The job {job.state}; its reason is in the job itself.")
        content = self.store.read(job_id, name)
        if content is None:  # deleted between the lines above
            raise Problem("gone", "The photos of this job were deleted.")
        return content

    def preview(self, image: Pixels) -> Preview:
        """Faces and hair of a photo; one at a time, a few may wait, more are asked to come back. Raises Problem."""
        if not self._previews.acquire(blocking=False):
            raise Problem("busy", "Several previews are being made.", hint="try again in a moment", headers={"Retry-After": "2"})
        try:
            with self._preview_turn, self.slot.borrowed() as engine:
                return self._preview_by(engine, image)
        except EngineDied as error:
            raise self._starting() from error
        except DeepHairError as error:
            if error.code != "out_of_memory":
                raise Problem.of(error) from error
            wait = {"Retry-After": "10"}
            raise Problem("busy", "There is not enough memory for a preview now.", hint="try again later", headers=wait) from error
        finally:
            self._previews.release()

    def _preview_by(self, engine: Engine, image: Pixels) -> Preview:
        try:
            return engine.preview(image)
        except EngineDied:
            self.slot.discard(engine)
            self._wake.set()
            raise

    def reload(self) -> None:
        """Loads the deployed bundle anew and swaps; Problem 503 (and the old model stays) when it does not load."""
        self.require_model()
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
        return JobView.of(job, ttl_s=self.settings.ttl_s, position=position)

    def ensure_story(self, job_id: str) -> None:
        """Makes sure that a follower of the job hears where it stands, also of what ended before this server started. Problem 404."""
        job = self.job(job_id)
        if job_id not in self.hub:
            self.hub.publish(job_id, "state", self.view(job).model_dump(mode="json"), last=job.state.final)

    def publish(self, job_id: str) -> None:
        """Tells a job's followers where it stands now; when it left the queue, the waiting ones learn their new positions."""
        job = self.store.get(job_id)
        if job is None:
            return
        self._announce(job)
        if job.state is not State.QUEUED:
            for waiting in self.store.waiting():
                self._announce(waiting)

    def _announce(self, job: Job) -> None:
        self.store.publish(job.id, "state", self.view(job).model_dump(mode="json"), last=job.state.final)

    def _publish_progress(self, job_id: str, progress: Progress) -> None:
        self.store.publish(job_id, "progress", ProgressView.of(progress).model_dump(mode="json"))

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
