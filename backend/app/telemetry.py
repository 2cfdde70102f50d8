"""What an operator sees: one JSON object per log line and Prometheus metrics, neither with a picture, a name or a whole job id."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SECONDS = (0.005, 0.05, 0.25, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


def log_event(logger: logging.Logger, event: str, **fields: Any) -> None:
    """Logs one structured line; fields that are None are left out."""
    logger.info(json.dumps({"event": event, **{key: value for key, value in fields.items() if value is not None}}))


class Histogram:
    """Seconds, counted in fixed buckets."""

    def __init__(self) -> None:
        self.buckets = [0] * len(_SECONDS)
        self.count, self.sum = 0, 0.0

    def observe(self, seconds: float) -> None:
        """Counts one."""
        self.count += 1
        self.sum += seconds
        for index, top in enumerate(_SECONDS):
            self.buckets[index] += seconds <= top


class Metrics:
    """Counters since the start of the process, and the text that Prometheus reads. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()  # (method, route template, status)
        self._jobs: Counter[str] = Counter()
        self._request_seconds, self._job_seconds = Histogram(), Histogram()

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        with self._lock:
            self._requests[(method, route, status)] += 1
            self._request_seconds.observe(seconds)

    def job(self, state: str, seconds: float | None = None) -> None:
        """Counts a job's acceptance ("accepted") or end; ``seconds`` it ran."""
        with self._lock:
            self._jobs[state] += 1
            if seconds is not None:
                self._job_seconds.observe(seconds)

    def text(self, gauges: Mapping[str, float], bundle_sha256: str | None) -> str:
        """The exposition format, version 0.0.4."""
        with self._lock:
            lines = [
                "# HELP deephair_http_requests_total Requests answered.",
                "# TYPE deephair_http_requests_total counter",
            ]
            for (method, route, status), count in sorted(self._requests.items()):
                lines.append(f'deephair_http_requests_total{{method="{method}",route="{route}",status="{status}"}} {count}')
            lines += [
                "# HELP deephair_jobs_total Jobs accepted, and jobs by how they ended.",
                "# TYPE deephair_jobs_total counter",
            ]
            lines += [f'deephair_jobs_total{{state="{state}"}} {count}' for state, count in sorted(self._jobs.items())]
            lines += _histogram("deephair_http_request_seconds", "Time to answer a request.", self._request_seconds)
            lines += _histogram("deephair_job_seconds", "Time a job ran.", self._job_seconds)
        for name, value in gauges.items():
            lines += [f"# TYPE deephair_{name} gauge", f"deephair_{name} {value:g}"]
        if bundle_sha256:
            lines += ["# TYPE deephair_model_info gauge", f'deephair_model_info{{bundle_sha256="{bundle_sha256}"}} 1']
        return "\n".join(lines) + "\n"


def _histogram(name: str, title: str, histogram: Histogram) -> list[str]:
    lines = [f"# HELP {name} {title}", f"# TYPE {name} histogram"]
    lines += [f'{name}_bucket{{le="{top:g}"}} {count}' for top, count in zip(_SECONDS, histogram.buckets, strict=True)]
    return [
        *lines,
        f'{name}_bucket{{le="+Inf"}} {histogram.count}',
        f"{name}_sum {histogram.sum:.6f}",
        f"{name}_count {histogram.count}",
    ]


def resident_bytes() -> int:
    """Memory that the process holds in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
