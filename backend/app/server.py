"""``deephair serve``: the application on uvicorn."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from backend import artifacts
from backend.app.api import create_app
from backend.app.service import Service
from backend.config import Config
from backend.errors import DeepHairError, MissingInputError
from backend.machine import forbid_core_dumps, give_memory_back

logger = logging.getLogger(__name__)


class _Server(uvicorn.Server):
    """Ends the open event streams when asked to stop; uvicorn would wait for them."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.hub.close()
        super().handle_exit(sig, frame)


def serve(config: Config) -> int:
    """Serves until it is stopped; prints the address (with the port that was chosen where ``app.port`` is 0).

    Raises DeepHairError when the address is taken, when another server works in ``paths.jobs``, or when the model does not load.
    """
    if not config.paths.bundle.is_file():
        hint = "run 'make demo' (or 'deephair run') first, or point paths.models at the folder of a deployed bundle"
        raise MissingInputError(f"there is no deployed model at {config.paths.bundle}", hint=hint)
    return run_app(config, create_app(config))


def run_app(config: Config, app: FastAPI) -> int:
    """``serve`` for an application that is made already."""
    service: Service = app.state.service
    give_memory_back()
    forbid_core_dumps()
    listener = listen(config.app.host, config.app.port)
    port = listener.getsockname()[1]
    server = _Server(uvicorn_config(app), service)
    service.on_load_failed = lambda: setattr(server, "should_exit", True)
    shown = f"[{config.app.host}]" if ":" in config.app.host else config.app.host
    sys.stdout.write(f"DeepHair is at http://{shown}:{port}  (stop with Ctrl-C)\n")
    sys.stdout.flush()
    alone = artifacts.folder_lock(config.paths.jobs) if config.app.queue == "sqlite" else contextlib.nullcontext()
    with _private_files(), alone, listener, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    if service.load_error is not None:
        raise service.load_error
    return 0


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """What is written meanwhile, here and by the processes that are started, is readable by this user alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def uvicorn_config(app: FastAPI) -> uvicorn.Config:
    """How uvicorn runs the application."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # it would write whole paths, and a job's id is its key
        log_level="warning",
        server_header=False,
        lifespan="on",
        proxy_headers=False,
        timeout_graceful_shutdown=10,
    )


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; port 0 takes any free one. Raises DeepHairError when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off; without, every answer takes 40 ms longer.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)  # who comes before the server has started waits instead of being refused
    except OSError as error:
        listener.close()
        hint = "another server may run there; choose another with app.port=8001, or app.port=0 for any free one"
        raise DeepHairError(f"cannot listen on {host}:{port}: {error.strerror}", hint=hint, code="address_taken") from error
    return listener
