"""The HTTP contract (DESIGN 4.6): routes over ``Service``, and ``create_app``."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from backend import __version__
from backend.app import problems
from backend.app.engine import Engine
from backend.app.engine_process import ProcessEngine
from backend.app.gallery import gallery_names, gallery_picture, gallery_title
from backend.app.problems import Problem
from backend.app.schemas import FaceView, GalleryEntry, JobView, ModelsView, PreviewView, ProblemView, StatusView
from backend.app.security import Envelope, Guard
from backend.app.service import Service
from backend.app.uploads import (
    BRUSH_FILE,
    MASK_FILE,
    REFERENCE_FILE,
    RESULT_FILE,
    TARGET_FILE,
    BodyLimit,
    JobOptions,
    Pixels,
    PreviewOptions,
    form_schema,
    max_body_bytes,
    read_form,
)
from backend.config import Config
from backend.imaging.decode import encode_png
from backend.tryon.values import TryOnError, sampling_of

STATIC = Path(__file__).parent / "static"

_JOB_FORM = form_schema(
    {
        "target": "The portrait: JPEG, PNG or WebP",
        "reference": "A photo of the wanted hair; may be left out when there is a prompt or an attribute",
        "mask": "Where hair may change: a PNG of the upright portrait's size, not black and not transparent there",
    },
    ("target",),
    JobOptions,
)
_PREVIEW_FORM = form_schema({"target": "The portrait: JPEG, PNG or WebP"}, ("target",), PreviewOptions)
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "The events"}}
_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {f"image/{kind}": {} for kind in ("jpeg", "png", "webp")}, "description": "The picture"}
}
_PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}, "description": "The picture"}}


def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


Server = Annotated[Service, Depends(_service)]


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ProblemView, "content": {problems.MEDIA_TYPE: {}}} for code in codes}


api = APIRouter(prefix="/api/v1")


@api.post(
    "/jobs",
    status_code=202,
    response_model=JobView,
    openapi_extra=_JOB_FORM,
    responses=_errors(400, 408, 413, 415, 422, 429, 503),
)
async def create_job(request: Request, response: Response, service: Server) -> JobView:
    """Queues a try-on: the hair of ``reference``, or of the attributes and words, or of both, for the person of ``target``.

    A job that comes while the model is being loaded waits like any other.
    """
    # The body is read whatever the answer will be: a client that is still sending does not see an answer, but a broken connection.
    files, options = await read_form(request, service.settings, ("target", "reference", "mask"), JobOptions)
    await run_in_threadpool(service.refuse_when_full)  # before decoding for nothing; submit() checks again, for good
    if "target" not in files:
        raise Problem("invalid_form", "The field 'target' (the portrait) is missing.")
    if "reference" not in files and not options.describes_hair():
        hint = "fill the field 'reference', 'prompt', 'length', 'curl', 'color' or 'bangs'"
        raise Problem("invalid_form", "A reference photo or a description of the hair is needed.", hint=hint)
    try:
        sampling_of(service.config.sample, options.steps, options.guidance, options.strength)
    except TryOnError as error:
        raise Problem.of(error) from error
    decoding = {TARGET_FILE: service.decoder.as_png(files["target"])}
    if "reference" in files:
        decoding[REFERENCE_FILE] = service.decoder.reference_as_png(files["reference"])
    target, *others = await asyncio.gather(*decoding.values())  # side by side: a job waits for both
    pictures = {name: kept.png for name, kept in zip(decoding, (target, *others), strict=True)}
    if "mask" in files:
        pictures[BRUSH_FILE] = await service.decoder.mask_as_png(files["mask"], target)
    settings = options.model_dump(exclude_none=True)
    if "reference" in files and await run_in_threadpool(service.offered.holds, files["reference"]):
        settings["remember"] = True  # the operator's picture; what a person brings is forgotten with the job
    view = await run_in_threadpool(service.submit, settings, pictures)
    response.headers["Location"] = f"/api/v1/jobs/{view.id}"
    return view


@api.get("/jobs/{job_id}", responses=_errors(404))
def read_job(job_id: str, service: Server) -> JobView:
    """Where a job stands."""
    return service.view(service.job(job_id))


@api.get("/jobs/{job_id}/events", response_class=StreamingResponse, responses=_errors(404) | _EVENTS)
async def follow_job(job_id: str, service: Server, last_event_id: Annotated[str | None, Header()] = None) -> StreamingResponse:
    """Server-sent events: ``state`` (a whole job) at every change and ``progress`` at every step, until the job ends. A client that
    lost the connection sends the last id it saw and misses nothing."""
    await run_in_threadpool(service.ensure_story, job_id)
    return StreamingResponse(service.hub.follow(job_id, last_event_id), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


@api.get("/jobs/{job_id}/result", response_class=Response, responses=_errors(404, 409, 410) | _PNG)
def read_result(job_id: str, service: Server) -> Response:
    """The finished picture, a PNG of the upright upload's size."""
    return Response(service.picture(job_id, RESULT_FILE), media_type="image/png")


@api.get("/jobs/{job_id}/mask", response_class=Response, responses=_errors(404, 409, 410) | _PNG)
def read_mask(job_id: str, service: Server) -> Response:
    """How much of each pixel is new, an 8-bit PNG of the result's size; 0: the byte is the upload's own."""
    return Response(service.picture(job_id, MASK_FILE), media_type="image/png")


@api.delete("/jobs/{job_id}", status_code=204, responses=_errors(404))
def delete_job(job_id: str, service: Server) -> None:
    """Cancels the job where it has not ended, and deletes its photos, result and words now. May be repeated."""
    service.erase(job_id)


@api.post(
    "/preview",
    response_model=PreviewView,
    openapi_extra=_PREVIEW_FORM,
    responses=_errors(400, 408, 413, 415, 422, 429, 503),
)
async def preview(request: Request, service: Server) -> PreviewView:
    """The faces and the hair that the server sees in a photo. Nothing is stored."""
    files, _ = await read_form(request, service.settings, ("target",), PreviewOptions)
    if "target" not in files:
        raise Problem("invalid_form", "The field 'target' (the portrait) is missing.")
    service.require_model()
    image = await service.decoder.decode(files["target"])
    return await run_in_threadpool(_preview, service, image)


def _preview(service: Service, image: Pixels) -> PreviewView:
    seen = service.preview(image)
    faces = [FaceView(index=i, box=face.box, confidence=face.confidence, landmarks=face.landmarks) for i, face in enumerate(seen.faces)]
    mask = base64.b64encode(encode_png(seen.hair_mask)).decode("ascii")
    height, width = image.shape[:2]
    return PreviewView(
        width=width,
        height=height,
        faces=faces,
        hair_fraction=round(float((seen.hair_mask > 0).mean()), 5),
        hair_mask_png=mask,
    )


@api.get("/gallery")
def read_gallery(service: Server) -> list[GalleryEntry]:
    """The reference pictures that the operator offers."""
    names = gallery_names(service.settings.gallery)
    return [GalleryEntry(name=name, title=gallery_title(name), url=f"/api/v1/gallery/{quote(name, safe='')}") for name in names]


@api.get("/gallery/{name}", response_class=Response, responses=_errors(404) | _PICTURE)
def read_gallery_picture(name: str, service: Server) -> Response:
    """One of them."""
    found = gallery_picture(service.settings.gallery, name)
    if found is None:
        raise Problem("not_found", "There is no such picture in the gallery.")
    content, media_type = found
    return Response(content, media_type=media_type, headers={"Cache-Control": "private, max-age=3600"})


# What a client may know of the bundle's header; the rest (configuration, paths) is the operator's.
_PUBLIC = ("format", "name", "step", "resolution", "base", "lora", "identity_model", "licences", "metrics", "gate", "git_commit",
           "data_digest")  # fmt: skip


def _models(service: Service) -> ModelsView:
    slot = service.slot
    if slot.current is None:
        return ModelsView(loaded=False, bundle_sha256=None, miniature=None, weights={}, bundle={}, sampling={})
    known = {key: slot.current.header[key] for key in _PUBLIC if key in slot.current.header}
    sha256 = slot.current.bundle_sha256
    sampling = slot.current.header.get("sampling", {})
    return ModelsView(loaded=True, bundle_sha256=sha256, miniature=slot.miniature, weights=slot.weights, bundle=known, sampling=sampling)


@api.get("/models")
def read_models(service: Server) -> ModelsView:
    """Which model is loaded."""
    return _models(service)


@api.post("/models/reload", responses=_errors(503))
def reload_model(service: Server) -> ModelsView:
    """Loads the deployed bundle anew, beside the running jobs. The old model stays where the new one does not load."""
    service.reload()
    return _models(service)


site = APIRouter()


@site.get("/healthz")
async def healthz() -> StatusView:
    """The process answers."""
    return StatusView(status="ok")


@site.get("/readyz", responses=_errors(503))
async def readyz(service: Server) -> StatusView:
    """A job that comes now would run."""
    service.require_model()
    if not service.ready():
        raise Problem("starting", "The worker is not running.")
    return StatusView(status="ready")


@site.get("/metrics", response_class=PlainTextResponse)
def metrics(service: Server) -> PlainTextResponse:
    """Prometheus text."""
    return PlainTextResponse(service.metrics_text(), media_type="text/plain; version=0.0.4")


@site.get("/", include_in_schema=False)
def page() -> FileResponse:
    """The page."""
    return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})


def create_app(config: Config, load_engine: Callable[[Config], Engine] = ProcessEngine.start) -> FastAPI:
    """The application. The model is loaded (by ``load_engine``) in the background once it starts; /readyz tells when it is there."""
    service = Service(config, load_engine)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    # No /docs: FastAPI's page loads its scripts from another site.
    app = FastAPI(
        title="DeepHair",
        version=__version__,
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    problems.install(app, [*api.routes, *site.routes])
    app.include_router(api)
    app.include_router(site)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    # Added inside out: the last one sees a request first.
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes(config.app))
    if config.app.cors_origin:
        headers = ["Authorization", "X-API-Key", "Last-Event-ID"]
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[config.app.cors_origin],
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=headers,
            expose_headers=["Location", "Retry-After"],
        )
    app.add_middleware(Guard, settings=config.app)
    app.add_middleware(Envelope, metrics=service.metrics)
    return app
