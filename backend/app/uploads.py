"""Uploads: read within limits, checked field by field, decoded from sniffed bytes, kept only as PNGs of our own (DESIGN 5.1)."""

from __future__ import annotations

import asyncio
import contextlib
import re
import unicodedata
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeAlias, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.app.problems import Problem
from backend.config import AppConfig
from backend.errors import DeepHairError
from backend.imaging.decode import Photo, decode_mask, decode_portrait, decode_reference, decode_upload, encode_png
from backend.training.data_processing.prompts import choices
from backend.tryon.values import SEEDS, Mode, check_mask

TARGET_FILE, REFERENCE_FILE, BRUSH_FILE = "target.png", "reference.png", "brush.png"  # what came
RESULT_FILE, MASK_FILE = "result.png", "mask.png"  # what was made
MAX_FIELD_BYTES = 16 * 1024
PLAIN_BYTES = 16 * 2**20  # uploads up to this size, in pixels' bytes, are kept without compression
MAX_PROMPT = 500  # characters; the text encoders read 77 tokens of it

Pixels = NDArray[np.uint8]
T = TypeVar("T")
Options = TypeVar("Options", bound=BaseModel)


def _attribute(keys: tuple[str, ...], description: str) -> Any:
    """The type of a field that takes one of ``keys``, the choices of Stage 0's prompts (``prompts.choices``)."""

    def known(value: str | None) -> str | None:
        if value is not None and value not in keys:
            raise ValueError(f"'{value[:40]}' is none of {', '.join(keys)}")
        return value

    listed = WithJsonSchema({"enum": list(keys), "type": "string"})
    return Annotated[Annotated[str, listed] | None, AfterValidator(known), Field(description=description)]


if TYPE_CHECKING:
    Length: TypeAlias = str | None
    Curl: TypeAlias = str | None
    Color: TypeAlias = str | None
    Bangs: TypeAlias = str | None
else:
    Length = _attribute(choices()["length"], "The wanted length, in Stage 0's own words")
    Curl = _attribute(choices()["curl"], "The wanted curl")
    Color = _attribute(choices()["colour"], "The wanted colour")
    Bangs = _attribute(choices()["bangs"], "The wanted bangs")


class PreviewOptions(BaseModel):
    """The form fields of a preview beside its picture: none."""

    model_config = ConfigDict(extra="forbid")


class JobOptions(BaseModel):
    """The form fields of a job beside its pictures."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str | None = Field(None, max_length=MAX_PROMPT, description="The hairstyle in words")
    seed: int = Field(0, ge=0, le=SEEDS - 1, description="The same seed gives the same picture")
    steps: int | None = Field(None, ge=1, le=200, description="Sampling steps; the server's own number when absent")
    guidance: float | None = Field(None, ge=1, le=20, description="How closely the reference and words are followed")
    face: int | None = Field(None, ge=0, le=99, description="Which face, as numbered by /api/v1/preview")
    mode: Mode = Field("full", description="full: the wanted hair; colour: only its colour; shape: all but its colour")
    strength: float = Field(1.0, ge=0, le=1, description="How far to leave the present hair; 1 begins with noise alone")
    length: Length = None
    curl: Curl = None
    color: Color = None
    bangs: Bangs = None

    @field_validator("prompt")
    @classmethod
    def _tidy(cls, prompt: str | None) -> str | None:
        if prompt is None:
            return None
        plain = "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in unicodedata.normalize("NFC", prompt))
        return re.sub(r"\s+", " ", plain).strip() or None

    def describes_hair(self) -> bool:
        """Whether there are words or attributes that say what hair is wanted."""
        return any((self.prompt, self.length, self.curl, self.color, self.bangs))


def max_body_bytes(settings: AppConfig, files: int = 3) -> int:
    """The largest body that can be valid: the files, and room for the fields and the boundaries."""
    return files * settings.max_upload_mb * 2**20 + 8 * MAX_FIELD_BYTES


async def read_form(
    request: Request, settings: AppConfig, files: tuple[str, ...], options: type[Options]
) -> tuple[dict[str, bytes], Options]:
    """Parses a multipart body into the bytes of ``files`` (absent ones are left out) and validated ``options``.

    Raises Problem: not_multipart, malformed_request, upload_too_large, invalid_form.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Problem("not_multipart", f"The content type is '{kind[:80]}'.", hint="send the photos as multipart/form-data")
    try:
        async with _parsed(request, settings, len(files), len(options.model_fields) + len(files)) as form:
            _refuse_wrong_parts(form, files, options)
            received = {name: await _file_bytes(form, name, settings) for name in files}
            fields = {name: value for name, value in form.multi_items() if isinstance(value, str) and value.strip() and name not in files}
    except MultiPartException as error:
        code = "upload_too_large" if "maximum size" in error.message else "malformed_request"
        raise Problem(code, error.message, hint="see /api/v1/openapi.json for the fields") from error
    try:
        return {name: content for name, content in received.items() if content is not None}, options.model_validate(fields)
    except ValidationError as error:
        errors = [{"field": ".".join(map(str, item["loc"])), "message": item["msg"]} for item in error.errors()]
        detail = "; ".join(f"{item['field']}: {item['message']}" for item in errors)
        raise Problem("invalid_form", detail, errors=errors) from error


@contextlib.asynccontextmanager
async def _parsed(request: Request, settings: AppConfig, max_files: int, max_fields: int) -> AsyncIterator[FormData]:
    """The body's parts, all of them in memory: ``request.form`` would write a photo of more than 1 MiB to a file in /tmp."""
    async with contextlib.aclosing(request.stream()) as stream:
        parser = MultiPartParser(request.headers, stream, max_files=max_files, max_fields=max_fields, max_part_size=MAX_FIELD_BYTES)
        parser.spool_max_size = max_body_bytes(settings)  # no part is larger; ``BodyLimit`` has seen to that
        form = await parser.parse()
    try:
        yield form
    finally:
        await form.close()


def _refuse_wrong_parts(form: FormData, files: tuple[str, ...], options: type[BaseModel]) -> None:
    names = [name for name, _ in form.multi_items()]
    known = (*files, *options.model_fields)
    for name in names:
        if name not in known:
            raise Problem("invalid_form", f"There is no field '{name[:40]}'.", hint=f"the fields are {', '.join(known)}")
        if names.count(name) > 1:
            raise Problem("invalid_form", f"The field '{name}' is given {names.count(name)} times, once is wanted.")
        if name not in files and not isinstance(form[name], str):
            raise Problem("invalid_form", f"The field '{name}' is text, not a file.")


async def _file_bytes(form: FormData, name: str, settings: AppConfig) -> bytes | None:
    part = form.get(name)
    if part is None or part == "":
        return None
    if not isinstance(part, UploadFile):
        raise Problem("invalid_form", f"The field '{name}' must be a file.")
    if (part.size or 0) > settings.max_upload_mb * 2**20:
        raise Problem(
            "upload_too_large",
            f"'{name}' has {(part.size or 0) / 2**20:.1f} MiB, at most {settings.max_upload_mb} MiB are taken.",
        )
    if part.size == 0 and not part.filename:
        return None  # what a browser sends for a file field that was left empty
    return await part.read()


class Kept(NamedTuple):
    """An upload as it is kept: a PNG of our own, upright, and its size."""

    png: bytes
    height: int
    width: int


class Decoder:
    """Decodes uploads in threads, two at a time, so that many large ones at once cost no more memory than two."""

    def __init__(self, settings: AppConfig) -> None:
        self._max_pixels = int(settings.max_megapixels * 1e6)
        self._limiter: anyio.CapacityLimiter | None = None

    async def decode(self, data: bytes) -> Pixels:
        """(H, W, 3) uint8 RGB. Raises Problem with the code of the ImageError."""
        return await self._in_thread(_decode, data, self._max_pixels)

    async def as_png(self, data: bytes) -> Kept:
        """The portrait as a PNG of our own, without metadata but with its colour profile (``decode_portrait``)."""
        return await self._in_thread(_as_png, data, self._max_pixels)

    async def reference_as_png(self, data: bytes) -> Kept:
        """The reference as a PNG of our own, in sRGB and without metadata (``decode_reference``)."""
        return await self._in_thread(_reference_as_png, data, self._max_pixels)

    async def mask_as_png(self, data: bytes, target: Kept) -> bytes:
        """A painted mask as an 8-bit PNG of 0 and 255. Raises Problem mask_size or empty_mask where it is none for ``target``."""
        return await self._in_thread(_mask_as_png, data, self._max_pixels, target)

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        if self._limiter is None:  # it belongs to the running event loop
            self._limiter = anyio.CapacityLimiter(2)
        return await anyio.to_thread.run_sync(function, *arguments, limiter=self._limiter)


def _decode(data: bytes, max_pixels: int) -> Pixels:
    try:
        return decode_upload(data, max_pixels=max_pixels)
    except DeepHairError as error:
        raise Problem.of(error) from error


def _as_png(data: bytes, max_pixels: int) -> Kept:
    try:
        return _kept(decode_portrait(data, max_pixels=max_pixels))
    except DeepHairError as error:
        raise Problem.of(error) from error


def _reference_as_png(data: bytes, max_pixels: int) -> Kept:
    try:
        return _kept(Photo(decode_reference(data, max_pixels=max_pixels), None))
    except DeepHairError as error:
        raise Problem.of(error) from error


def _kept(photo: Photo) -> Kept:
    return Kept(_for_the_worker(photo.pixels, photo.profile), *photo.pixels.shape[:2])


def _for_the_worker(image: Pixels, profile: bytes | None = None) -> bytes:
    """A PNG that only the worker reads, minutes later at most: without compression, which would cost more than all else that the service does
    to a photo. Large ones are compressed, so that the most a full queue can hold stays what it was."""
    plain = image.nbytes <= PLAIN_BYTES
    return encode_png(image, compression=0, profile=profile) if plain else encode_png(image, quick=True, profile=profile)


def _mask_as_png(data: bytes, max_pixels: int, target: Kept) -> bytes:
    try:
        mask = decode_mask(data, max_pixels=max_pixels)
        check_mask(mask, target.height, target.width)
    except DeepHairError as error:
        raise Problem.of(error) from error
    return _for_the_worker(mask)


def form_schema(files: Mapping[str, str], required: tuple[str, ...], options: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI request body for ``read_form``; ``files`` maps field to description."""
    properties: dict[str, Any] = {name: {"type": "string", "format": "binary", "description": text} for name, text in files.items()}
    properties |= options.model_json_schema().get("properties", {})
    schema = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


class BodyLimit:
    """ASGI: counts the body while it comes in. More than the limit answers 413, by the announced length before a byte is read and by
    the count otherwise; a body that takes too long answers 408."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float = 120.0) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on with its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length[:20]) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        read, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def counting() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise Problem(
                    "slow_upload",
                    f"The body was not complete after {self._timeout_s:g} s.",
                    headers={"Connection": "close"},
                ) from error
            read += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if read > self._max_bytes:
                raise self._too_large()
            return message

        return counting

    def _too_large(self) -> Problem:
        return Problem(
            "upload_too_large",
            f"The body is larger than {self._max_bytes} bytes.",
            hint="send smaller photos",
            headers={"Connection": "close"},
        )
