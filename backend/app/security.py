"""Who may ask, and what browsers may do with the answer: host, origin and key checks, security headers, the access log."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.app.problems import Problem
from backend.app.telemetry import Metrics, log_event
from backend.config import AppConfig

logger = logging.getLogger(__name__)

_HEADERS = {
    # Everything comes from this server, nothing is inline, and nobody frames the page; pictures may be the page's own blobs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
}
_OPEN = ("/healthz", "/readyz")
_PROTECTED = ("/api/", "/metrics")


class Guard:
    """ASGI: refuses what comes from another site, and, where a key is set, what comes without it.

    - Host: only the configured names and this machine's; with another name in it a page of another site has had its own name
      resolved to this address (DNS rebinding).
    - Origin: only this server itself and ``app.cors_origin``; else any page could post to a server on localhost.
    - Key: ``Authorization: Bearer`` or ``X-API-Key``, compared in constant time, for /api/ and /metrics.
    """

    def __init__(self, app: ASGIApp, settings: AppConfig) -> None:
        self._app, self._settings = app, settings
        self._any_address = settings.host in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
        self._names = {
            "localhost",
            "127.0.0.1",
            "::1",
            settings.host.lower(),
            *(name.lower() for name in settings.allowed_hosts),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers why not."""
        if scope["type"] == "http":
            problem = self._objection(scope["method"], scope["path"], Headers(scope=scope))
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _objection(self, method: str, path: str, headers: Headers) -> Problem | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._host_allowed(hosts[0]):
            hint = "a name that this server should answer to belongs into app.allowed_hosts"
            return Problem("bad_host", "This server does not answer to that name.", hint=hint)
        if path in _OPEN:
            return None
        origin = headers.get("origin")
        if origin is not None and not self._origin_allowed(origin, hosts[0]):
            return Problem("foreign_origin", "The request comes from another web site.", hint="allow it by app.cors_origin")
        if method != "OPTIONS" and path.startswith(_PROTECTED) and not self._key_matches(headers):
            hint = "send the key as 'Authorization: Bearer KEY'"
            return Problem("bad_api_key", "This server wants an API key.", hint=hint, headers={"WWW-Authenticate": "Bearer"})
        return None

    def _host_allowed(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or (self._any_address and _is_address(name))  # rebinding needs a name; an address is no name

    def _origin_allowed(self, origin: str, host: str) -> bool:
        return origin in (f"http://{host}", f"https://{host}") or (origin == self._settings.cors_origin != "")

    def _key_matches(self, headers: Headers) -> bool:
        if not self._settings.api_key:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode(), self._settings.api_key.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Envelope:
    """ASGI, outermost: puts the security headers on every answer, counts and logs it by its route, never by its full path (a job's id
    in a log would be its key)."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on and completes the answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        status = 0  # until the answer starts

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-cache" if scope["path"].startswith("/static/") else "no-store")
                # Until the response starts only; a stream that stays open for minutes is not a slow answer.
                self._metrics.request(_method(scope), _route(scope), status, time.monotonic() - start)
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:  # the request's boundary: whatever it was, the client gets an answer without its inside
            logger.exception("a request failed unexpectedly")
            if not status:
                detail = "The server met an error of its own; it is in the server's log."
                await Problem("internal", detail).response()(scope, receive, sending)
        finally:
            seconds = round(time.monotonic() - start, 4)
            log_event(logger, "request", method=_method(scope), route=_route(scope), status=status or None, seconds=seconds)


def _method(scope: Scope) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    method = str(scope["method"])
    return method if method in known else "other"


def _route(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path", None)  # FastAPI leaves the matched route here; a path of the client's is never logged
    return str(path) if path else "none"
