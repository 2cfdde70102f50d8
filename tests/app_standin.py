"""A try-on without networks for the tests of queue and HTTP: it really composites, in a known way, and can be made slow or to fail."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from backend.app.api import create_app
from backend.app.engine import Engine, LocalEngine
from backend.app.server import listen, run_app, uvicorn_config
from backend.config import Config
from backend.errors import InvalidArtifactError
from backend.imaging.decode import encode_png
from backend.tryon.values import Cancelled, FaceInfo, Preview, TryOnError, TryOnRequest, TryOnResult


@dataclass
class StandIn:
    """Paints the upper half with the reference's mean colour (or one drawn from the prompt and seed) through a feathered mask.

    Words in the prompt make it fail: "oom", "bug", "no face". With ``gate`` set, each step waits for one release of it.
    """

    bundle_sha256: str = "a" * 64
    header: dict[str, Any] = field(default_factory=lambda: {"miniature": True, "gate": {"passed": True}, "config": {"secret": 1}})
    gate: threading.Semaphore | None = None
    step_s: float = 0.0
    remember: bool = True  # the pictures of the requests in ``seen``
    seen: list[TryOnRequest] = field(default_factory=list)
    ledger: Path | None = None

    def preview(self, image: np.ndarray) -> Preview:
        height, width = image.shape[:2]
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2] = 255
        return Preview([FaceInfo((width * 0.25, height * 0.25, width * 0.75, height * 0.75), 0.9, [[1.0, 2.0]] * 5)], mask)

    def run(
        self,
        request: TryOnRequest,
        *,
        on_step: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> TryOnResult:
        self.seen.append(request if self.remember else replace(request, target=None, reference=None))  # type: ignore[arg-type]
        prompt = request.prompt or ""
        if "oom" in prompt:
            raise MemoryError
        if "bug" in prompt:
            raise ZeroDivisionError("secret detail")
        if "no face" in prompt:
            raise TryOnError("there is no face in the photo", hint="send a portrait", code="no_face")
        steps = request.steps or 3
        for step in range(steps):
            while self.gate is not None and not self.gate.acquire(timeout=0.01):
                _stop_if(cancelled)
            time.sleep(self.step_s)
            _stop_if(cancelled)
            if on_step is not None:
                on_step(step + 1, steps)
        if self.ledger is not None:
            with self.ledger.open("a") as handle:
                handle.write(f"{request.seed}\n")
        return composite(request)


def _stop_if(cancelled: Callable[[], bool] | None) -> None:
    if cancelled is not None and cancelled():
        raise Cancelled


def composite(request: TryOnRequest) -> TryOnResult:
    """The stand-in's whole effect."""
    height, width = request.target.shape[:2]
    rows = np.clip((height / 2 - np.arange(height)) / 8, 0, 1).astype(np.float32)
    mask = np.repeat(rows[:, None], width, axis=1)
    colour = hashlib.sha256(f"{request.prompt} {request.seed}".encode()).digest()[:3]
    paint = request.reference.mean(axis=(0, 1)) if request.reference is not None else np.frombuffer(colour, np.uint8)
    blended = request.target * (1 - mask[..., None]) + paint * mask[..., None]
    return TryOnResult(np.where(mask[..., None] > 0, blended, request.target).astype(np.uint8), mask, {"seed": request.seed})


def picture(width: int = 96, height: int = 128, seed: int = 0) -> np.ndarray:
    """A photo-sized array of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width: int = 96, height: int = 128, seed: int = 0) -> bytes:
    """The same as a PNG file."""
    return encode_png(picture(width, height, seed))


def decoded(content: bytes) -> np.ndarray:
    """A picture file as an array."""
    return np.asarray(Image.open(io.BytesIO(content)))


def app_config(folder: Path, **settings: Any) -> Config:
    """The default configuration with jobs and weights below ``folder``; ``settings`` are those of ``app``."""
    base = Config()
    paths = base.paths.model_copy(update={"jobs": folder / "jobs", "weights": folder / "weights"})
    return base.model_copy(update={"paths": paths, "app": base.app.model_copy(update=settings)})


@dataclass
class Live:
    """A running server: its client, its stand-in and its address."""

    client: httpx.Client
    engine: StandIn
    app: Any
    port: int

    def post(self, **fields: Any) -> httpx.Response:
        """POSTs a job: files are bytes, the other fields text; a target is added."""
        fields = {"target": png()} | fields
        files = {name: (name, value) for name, value in fields.items() if isinstance(value, bytes)}
        return self.client.post("/api/v1/jobs", files=files, data={k: str(v) for k, v in fields.items() if not isinstance(v, bytes)})

    def wait(self, job_id: str, *states: str, seconds: float = 60.0) -> dict[str, Any]:
        """Polls until the job is in one of ``states`` (by default: has ended)."""
        wanted = states or ("succeeded", "failed", "cancelled")
        deadline = time.monotonic() + seconds
        while True:
            job: dict[str, Any] = self.client.get(f"/api/v1/jobs/{job_id}").json()
            if job.get("state") in wanted:
                return job
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job} did not become {wanted}")
            time.sleep(0.005)


@contextlib.contextmanager
def serving(
    config: Config,
    engine: StandIn | None = None,
    factory: Callable[[Config], Any] | None = None,
    load: Callable[[Config], Engine] | None = None,
) -> Iterator[Live]:
    """A server of this process on a free port, ready when it is yielded (unless ``factory`` does not get ready).

    ``factory`` makes stand-ins, ``load`` whole engines.
    """
    engine = engine or StandIn()
    app = create_app(config, load or (lambda config: LocalEngine((factory or (lambda _: engine))(config))))
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while factory is None and client.get("/readyz").status_code != 200:
                time.sleep(0.005)
            yield Live(client, engine, app, port)
    finally:
        app.state.service.hub.close()
        server.should_exit = True
        thread.join()
        listener.close()


def stand_in(config: Config) -> StandIn:
    """What a process of its own loads in tests."""
    return StandIn(remember=False, step_s=0.01)


class SlowLooker(StandIn):
    """Takes a while for a preview and says in ``ledger`` that it has ended."""

    def preview(self, image: np.ndarray) -> Preview:
        assert self.ledger is not None
        self.ledger.with_name("begun").touch()
        time.sleep(0.5)
        self.ledger.touch()
        return super().preview(image)


def slow_looker(config: Config) -> StandIn:
    """What another process loads for a preview that is still under way when it is closed."""
    return SlowLooker(ledger=config.paths.jobs / "looked", remember=False)


def broken_model(config: Config) -> StandIn:
    """The same with a bundle that does not load."""
    raise InvalidArtifactError("weights hold NaN", hint="deploy another")


def main(folder: Path, port: int, ledger: Path, queue_size: int, queue: str = "sqlite") -> None:
    """Serves a slow stand-in that notes each finished job's seed in ``ledger``; for the tests that kill a server."""
    engine = StandIn(step_s=0.02, ledger=ledger, remember=False)
    config = app_config(folder, port=port, queue_size=queue_size, queue=queue)
    run_app(config, create_app(config, lambda _: LocalEngine(engine)))  # type: ignore[arg-type]
