"""What a person sees: log lines, progress with time left, and errors turned into exit codes (DESIGN section 3)."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backend.errors import DeepHairError, UsageError

if TYPE_CHECKING:
    from backend.config import Config

DONE, FAILED, WRONG_USAGE, REJECTED_ITEMS = 0, 1, 2, 3
INTERRUPTED = 130

logger = logging.getLogger(__name__)


def set_up_logging(*, quiet: bool = False) -> None:
    """Sends the log to stderr, so that stdout stays free for results (``--json``)."""
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    # the model libraries: no bars of their own, no advice to developers, and never a look-up on the internet
    for variable, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DIFFUSERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(variable, value)
    for name in ("httpx", "uniface", "onnxruntime", "matplotlib", "PIL", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)


def guarded(action: Callable[[], int]) -> int:
    """Runs a verb: errors for people become one message and an exit code, an interrupt exits cleanly."""
    try:
        return action()
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return WRONG_USAGE
    except DeepHairError as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again to go on from here\n")
        return INTERRUPTED
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        sys.stderr.write(
            f"error: {error.strerror or error} ({error.filename or 'no file named'})\n  -> check that the path exists, is writable and the disk is not full\n"
        )
        return FAILED


@dataclass(frozen=True)
class StageArguments:
    """What every stage takes on its command line, whether called as a script or as ``deephair <verb>``."""

    config: Config
    json: bool
    dry_run: bool
    resume: bool
    rest: argparse.Namespace


def stage_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The arguments shared by all stages: ``--config``, overrides, ``--json``, ``--dry-run``, ``--no-resume``."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    add_stage_arguments(parser)
    return parser


def add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the shared arguments to ``parser``."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the file, for example train.lr=1e-6"
    )
    parser.add_argument("--config", metavar="FILE", help="configuration file (default: configs/rtx3060.yaml)")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and stop")
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on where an earlier run stopped (the default)"
    )


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what Stage 0 takes beside the shared arguments: other names for three settings."""
    for flag, metavar, text in (
        ("--workers", "N", "processes (data.workers; default: one per core, 8 at most)"),
        ("--limit", "N", "take the first N photos only (data.limit)"),
        ("--scheduler", "ADDRESS", "let the workers of a dask scheduler do it, for example tcp://host:8786 (data.scheduler)"),
    ):
        parser.add_argument(flag, dest=f"data.{flag[2:]}", metavar=metavar, help=text)


def parse_stage_arguments(argv: Sequence[str] | None, prog: str, description: str) -> StageArguments:
    """Parses a stage's command line and loads its configuration. Raises UsageError for wrong settings."""
    return stage_arguments(stage_parser(prog, description).parse_intermixed_args(argv))


def stage_arguments(parsed: argparse.Namespace) -> StageArguments:
    """Loads the configuration that a parsed command line names and sets up logging."""
    from backend.config import load_config  # late: pydantic is not needed for --help

    set_up_logging()
    flags = [f"{key}={value}" for key, value in vars(parsed).items() if "." in key and value is not None]
    config = load_config(parsed.config, [*parsed.overrides, *flags])
    return StageArguments(config, parsed.json, parsed.dry_run, parsed.resume, parsed)


def print_result(result: object) -> None:
    """Prints a result as one JSON object on stdout."""
    sys.stdout.write(json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


class StopRequest:
    """Whether a stop was asked for; long loops look at it between steps, where a checkpoint is exact."""

    requested = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the first Ctrl-C (or SIGTERM) into a request; a second one interrupts at once. Outside the main thread it does nothing."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        logger.warning("stopping after this step, with a checkpoint (once more: stop at once)")

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Progress:
    """Counts steps; shows a bar on a terminal, and a plain line every few seconds elsewhere.

    The first step of a run pays for much that comes once (kernels, caches, processes), so the rate counts from its end.
    """

    def __init__(self, title: str, total: int, *, unit: str = "it", every_s: float = 5.0) -> None:
        self.title, self.total, self.unit, self.every_s = title, total, unit, every_s
        self.done = 0
        self._start = self._last = time.monotonic()
        self._since: tuple[float, int] | None = None  # when the first update came, and how far it had come
        self._tty = sys.stderr.isatty()

    def start_at(self, done: int) -> None:
        """Says that ``done`` steps were finished before this run, so that the rate counts only new ones."""
        self.done = done

    def update(self, steps: int = 1, note: str = "") -> None:
        """Adds ``steps`` and shows the state when it is time."""
        self.done += steps
        now = time.monotonic()
        rate = self._rate(now)
        if self._since is None:
            self._since = now, self.done
        interval = 0.1 if self._tty else self.every_s
        if now - self._last >= interval or self.done == self.total:
            self._last = now
            self._show(now, rate, note)

    def rate(self) -> float:
        """Steps per second of this run after its first update; 0 where there was no other yet."""
        return self._rate(time.monotonic())

    def _rate(self, now: float) -> float:
        if self._since is None:
            return 0.0
        since, done = self._since
        return (self.done - done) / max(now - since, 1e-9)

    def _show(self, now: float, rate: float, note: str) -> None:
        if self.done >= self.total:
            pace = f"took {duration(now - self._start)}"
        elif rate > 0:
            pace = f"{duration((self.total - self.done) / rate)} left"
        else:
            pace = f"the first took {duration(now - self._start)}"
        speed = f"{rate:.3g} {self.unit}/s, " if rate > 0 else ""
        text = f"{self.title}: {self.done}/{self.total} {self.unit}, {speed}{pace}{', ' + note if note else ''}"
        if self._tty:
            filled = int(24 * self.done / max(self.total, 1))
            sys.stderr.write(f"\r\033[K[{'█' * filled}{'·' * (24 - filled)}] {text}" + ("\n" if self.done == self.total else ""))
            sys.stderr.flush()
        else:
            logger.info(text)


def duration(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextlib.contextmanager
def timed(title: str) -> Iterator[Callable[[], float]]:
    """Logs a stage's start and end; yields a clock that tells the seconds since the start."""
    start = time.monotonic()
    logger.info("%s ...", title)
    yield lambda: time.monotonic() - start
    logger.info("%s: done in %s", title, duration(time.monotonic() - start))
