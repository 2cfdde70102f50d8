"""A stand-in for the Hugging Face hub on loopback: the few endpoints that a download uses, with the faults that a network has.

Small files are served at ``/{repository}/resolve/{revision}/{path}`` with git's blob id as ETag; large ones redirect to another host name,
as the hub's storage does, with ``X-Linked-ETag`` (sha256) and ``X-Linked-Size``.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 100_000  # bytes from which a file lies in the storage


@dataclass
class Hub:
    """What is served and how it misbehaves. files: (repository, path) -> bytes. cut: path -> bytes after which its next answer is cut off."""

    endpoint: str = ""
    storage: str = ""
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    garbled: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range

    def gets(self, name: str) -> list[str]:
        """The Range headers of all GET requests for files of this name."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith(name)]


@contextmanager
def serving() -> Iterator[Hub]:
    """Serves an empty hub in a thread."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            self.answer(head=False)

        def answer(self, *, head: bool) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range", "")))
            content = self.found()
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif "/resolve/" in self.path and len(content) >= LARGE:
                self.send_response(302)
                self.send_header("Location", hub.storage + self.path.replace("/resolve/", "/storage/"))
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("X-Linked-Size", str(len(content)))
                self.send_header("X-Linked-ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.send(content, head)

        def found(self) -> bytes | None:
            owner, name, _, _, *rest = self.path.lstrip("/").split("/")
            return hub.files.get((f"{owner}/{name}", "/".join(rest)))

        def send(self, content: bytes, head: bool) -> None:
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            start = int((self.headers.get("Range") or "bytes=0-")[len("bytes=") :].rstrip("-"))
            body = content[start:]
            if any(self.path.endswith(name) for name in hub.garbled):
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{etag}"')
            self.end_headers()
            if head:
                return
            name = next((name for name in hub.cut if self.path.endswith(name)), None)
            if name is not None:
                self.wfile.write(body[: hub.cut.pop(name)])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint, hub.storage = (f"http://{host}:{server.server_address[1]}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
