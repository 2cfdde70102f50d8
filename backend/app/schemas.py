"""What the server answers, as typed models; they are the OpenAPI document's schemas."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, Field

from backend.app.jobs import Job, Progress, State


class ProblemView(BaseModel):
    """RFC 9457 problem details; ``code`` is stable, ``detail`` and ``hint`` are for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str | None = None
    errors: list[dict[str, str]] | None = None


class ProgressView(BaseModel):
    """Denoising steps done; ``eta_s`` seconds are left, null until the first steps have been timed."""

    done: int
    total: int
    fraction: float
    eta_s: float | None

    @classmethod
    def of(cls, progress: Progress) -> ProgressView:
        """The view of a worker's progress."""
        return cls(
            done=progress.done,
            total=progress.total,
            fraction=round(progress.done / max(progress.total, 1), 4),
            eta_s=progress.eta_s,
        )


class ErrorView(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    hint: str


class ResultView(BaseModel):
    """A finished picture. Where the mask is 0, every byte of the result equals the upload's."""

    url: str
    mask_url: str
    width: int
    height: int
    bundle_sha256: str = Field(description="The model bundle that made it")
    info: dict[str, Any]


class JobView(BaseModel):
    """A job. ``position`` (1 runs next) while queued, ``progress`` while running, ``result`` or ``error`` at the end."""

    id: str
    state: State
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    expires_at: datetime | None = Field(None, description="When the pictures are deleted")
    position: int | None = None
    progress: ProgressView | None = None
    result: ResultView | None = None
    error: ErrorView | None = None
    photos_deleted: bool = False
    events_url: str

    @classmethod
    def of(cls, job: Job, *, ttl_s: float, position: int | None) -> JobView:
        """The view of a stored job; ``ttl_s`` seconds after its end it is deleted."""
        here = f"/api/v1/jobs/{job.id}"
        return cls(
            id=job.id,
            state=job.state,
            created_at=_time(job.created),
            started_at=_time(job.started) if job.started else None,
            ended_at=_time(job.ended) if job.ended else None,
            expires_at=_time(job.ended + ttl_s) if job.ended else None,
            position=position,
            progress=ProgressView.of(job.progress) if job.progress and job.state is State.RUNNING else None,
            result=ResultView(url=f"{here}/result", mask_url=f"{here}/mask", **job.result) if job.result else None,
            error=ErrorView(**job.error) if job.error else None,
            photos_deleted=job.erased,
            events_url=f"{here}/events",
        )


class FaceView(BaseModel):
    """One face: box (left, top, right, bottom) and landmarks (x, y) in pixels of the upright upload."""

    index: int
    box: tuple[float, float, float, float]
    confidence: float
    landmarks: list[list[float]]


class PreviewView(BaseModel):
    """What the server sees in a photo: its upright size, the faces, and the hair as an 8-bit PNG mask of that size (255 is hair)."""

    width: int
    height: int
    faces: list[FaceView]
    hair_fraction: float
    hair_mask_png: str = Field(description="base64")


class ModelsView(BaseModel):
    """The loaded model. ``miniature`` is true when the small weights of the demo are loaded, which make small pictures."""

    loaded: bool
    bundle_sha256: str | None
    miniature: bool | None
    weights: dict[str, str] = Field(description="The pretrained parts under it")
    bundle: dict[str, Any] = Field(description="The public part of the bundle's header")
    sampling: dict[str, Any] = Field(description="Steps and guidance of a job that names none; the few-step LoRA and its sha256, or null")


class GalleryEntry(BaseModel):
    """A reference picture that the operator offers; its bytes are at ``url``."""

    name: str
    title: str
    url: str


class StatusView(BaseModel):
    """A probe's answer."""

    status: str


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
