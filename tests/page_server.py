"""A server for the page's tests that keeps what was posted, and offers what the page can use where the application under it does not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartParser
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FIELDS: dict[str, Any] = {
    "mask": {"type": "string", "format": "binary"},
    "mode": {"enum": ["full", "colour", "shape"], "default": "full", "type": "string"},
    "strength": {"type": "number", "minimum": 0, "maximum": 1, "default": 1},
    "length": {"anyOf": [{"enum": ["long", "medium", "bob", "short"], "type": "string"}, {"type": "null"}]},
    "curl": {"anyOf": [{"enum": ["straight", "wavy", "curly", "tightly curly"], "type": "string"}, {"type": "null"}]},
    "color": {"anyOf": [{"enum": ["black", "natural brown", "blonde", "teal"], "type": "string"}, {"type": "null"}]},
    "bangs": {"anyOf": [{"enum": ["full", "choppy"], "type": "string"}, {"type": "null"}]},
}
LOOKS = ("bob-straight-black", "long-wavy-copper")
Posted = dict[str, "str | bytes"]


class Offering:
    """ASGI around an application: ``posted`` keeps the fields of every job that is sent. Fields and the gallery that the application does
    not know are described in its OpenAPI document, taken, and not passed on (a wish in words takes the place of a picker)."""

    def __init__(self, app: ASGIApp, posted: list[Posted], known: Callable[[], dict[str, Any]]) -> None:
        self._app, self._posted, self._known = app, posted, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = (scope.get("method"), scope.get("path", ""))
        if request == ("POST", "/api/v1/jobs"):
            scope, receive = await self._record(scope, receive)
        elif request == ("GET", "/api/v1/openapi.json"):
            return await JSONResponse(self._described())(scope, receive, send)
        elif request[0] == "GET" and request[1].startswith("/api/v1/gallery") and "/api/v1/gallery" not in self._known()["paths"]:
            return await _gallery(request[1])(scope, receive, send)
        return await self._app(scope, receive, send)

    def _described(self) -> dict[str, Any]:
        document = json.loads(json.dumps(self._known()))
        properties = _properties(document)
        for name, schema in FIELDS.items():
            properties.setdefault(name, schema)
        document["paths"].setdefault("/api/v1/gallery", {})
        return document

    async def _record(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        headers = Headers(scope=scope)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        form = await MultiPartParser(headers, _chunks(body)).parse()
        fields: Posted = {k: await v.read() if isinstance(v, UploadFile) else v for k, v in form.multi_items()}
        self._posted.append(fields)
        known = _properties(self._known())
        kept = {name: value for name, value in fields.items() if name in known}
        if len(kept) < len(fields):
            kept.setdefault("prompt", "a wish")
        body, boundary = _multipart(kept)
        new = [(b"content-type", b"multipart/form-data; boundary=" + boundary), (b"content-length", str(len(body)).encode())]
        raw = [(name, value) for name, value in scope["headers"] if name not in (b"content-type", b"content-length")]
        return {**scope, "headers": raw + new}, _once(body)


def _properties(document: dict[str, Any]) -> dict[str, Any]:
    content = document["paths"]["/api/v1/jobs"]["post"]["requestBody"]["content"]["multipart/form-data"]
    properties: dict[str, Any] = content["schema"]["properties"]
    return properties


def _gallery(path: str) -> Response:
    name = path.removeprefix("/api/v1/gallery").strip("/")
    if not name:
        return JSONResponse([{"name": look, "title": look, "url": f"/api/v1/gallery/{look}"} for look in LOOKS])
    file = io.BytesIO()
    shade = np.full((64, 64, 3), 40 + 120 * LOOKS.index(name), np.uint8)
    Image.fromarray(shade).save(file, "WEBP")
    return Response(file.getvalue(), media_type="image/webp")


async def _chunks(body: bytes) -> Any:
    yield body


def _once(body: bytes) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    return receive


def _multipart(fields: Posted) -> tuple[bytes, bytes]:
    boundary = b"page-test-boundary"
    parts = []
    for name, value in fields.items():
        file = '; filename="photo"' if isinstance(value, bytes) else ""
        content = value if isinstance(value, bytes) else value.encode()
        parts.append(f'--page-test-boundary\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n")
    return b"".join(parts) + b"--page-test-boundary--\r\n", boundary


def offering(app: Starlette, posted: list[Posted]) -> Starlette:
    """The application with ``Offering`` outermost."""
    app.add_middleware(Offering, posted=posted, known=app.openapi)  # type: ignore[attr-defined]
    return app
