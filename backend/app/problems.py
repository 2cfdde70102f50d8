"""Errors over HTTP: RFC 9457 problem+json with a stable ``code``, never a stack trace (DESIGN 4.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match

from backend.app.jobs import StoreError
from backend.errors import DeepHairError

MEDIA_TYPE = "application/problem+json"

# code -> (status, title). A title never changes with the request; ``detail`` does.
PROBLEMS: dict[str, tuple[int, str]] = {
    "malformed_request": (400, "The request cannot be read"),
    "bad_host": (400, "The Host header names another site"),
    "bad_api_key": (401, "The API key is missing or wrong"),
    "foreign_origin": (403, "Another web site may not use this server"),
    "not_found": (404, "There is nothing here"),
    "method_not_allowed": (405, "This address does not take that method"),
    "slow_upload": (408, "The upload took too long"),
    "not_finished": (409, "The job has no picture yet"),
    "no_result": (409, "The job ended without a picture"),
    "gone": (410, "The photos of this job were deleted"),
    "upload_too_large": (413, "The upload is too large"),
    "too_many_pixels": (413, "The picture has too many pixels"),
    "not_multipart": (415, "The body must be multipart/form-data"),
    "not_an_image": (415, "The file is not a picture"),
    "unsupported_format": (415, "This picture format is not taken"),
    "truncated": (422, "The picture is damaged or cut off"),
    "too_small": (422, "The picture or the face in it is too small"),
    "mask_size": (422, "The mask is not of the portrait's size"),
    "empty_mask": (422, "The mask lets nothing change"),
    "few_step": (422, "The few-step model that is loaded cannot do that"),
    "invalid_form": (422, "A field of the form is missing or not valid"),
    "queue_full": (429, "The queue is full"),
    "busy": (429, "The server is busy"),
    "internal": (500, "The server failed"),
    "starting": (503, "The model is not loaded yet"),
    "storage": (503, "The server cannot store the photos"),
    "reload_failed": (503, "The new model does not load; the old one stays"),
}


class Problem(Exception):
    """An answer that is not the wanted one. ``code`` is a key of PROBLEMS, or any other code together with a ``status``."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        hint: str = "",
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        errors: list[dict[str, str]] | None = None,
    ) -> None:
        super().__init__(detail)
        known_status, self.title = PROBLEMS.get(code, (422, "The photo cannot be used"))
        self.status = status or known_status
        self.code, self.detail, self.hint = code, detail, hint
        self.headers = dict(headers or {})
        self.errors = errors or []

    @classmethod
    def of(cls, error: DeepHairError) -> Problem:
        """The problem for an error for people: its code is kept, an unknown one answers 422."""
        return cls(error.code, error.message, hint=error.hint)

    def response(self) -> Response:
        """The answer: type, title, status, detail (RFC 9457) and the extensions code, hint, errors."""
        body: dict[str, Any] = {
            "type": f"urn:problem-type:deephair:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        if self.hint:
            body["hint"] = self.hint
        if self.errors:
            body["errors"] = self.errors
        return JSONResponse(body, status_code=self.status, headers=self.headers, media_type=MEDIA_TYPE)


_BY_STATUS = {400: "malformed_request", 404: "not_found", 405: "method_not_allowed"}


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Makes every error answer of ``app`` a problem (``security.Envelope`` does it for what nobody expected). routes: all of the app's."""
    app.state.routes = routes
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(StoreError, _on_store_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _on_store_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StoreError)
    return Problem("storage", "The server cannot keep jobs now.", hint="try again later", headers={"Retry-After": "5"}).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _BY_STATUS.get(error.status_code, "malformed_request")
    detail = "No such address." if code == "not_found" else str(error.detail)
    headers = {**(error.headers or {}), "Allow": _allowed(request)} if error.status_code == 405 else error.headers
    return Problem(code, detail, status=error.status_code, headers=headers).response()


def _allowed(request: Request) -> str:
    """The methods of all routes of the address; Starlette names those of the first one only."""
    fitting = (route for route in request.app.state.routes if route.matches(request.scope)[0] is not Match.NONE)
    return ", ".join(sorted({method for route in fitting for method in getattr(route, "methods", None) or ()}))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [{"field": ".".join(map(str, item["loc"])), "message": str(item["msg"])} for item in error.errors()]
    return Problem("invalid_form", "A value of the request is not valid.", errors=errors).response()


async def _on_disconnect(request: Request, error: Exception) -> Response:
    # Nobody reads this: the client went away in mid-upload. Without a handler it would be logged as a server error.
    return Problem("malformed_request", "The connection was closed before the upload was complete.").response()
