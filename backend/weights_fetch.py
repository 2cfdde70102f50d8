"""Fetches pretrained parts from the Hugging Face hub (or its mirror): resumable, parallel, every file held against a digest.

The only code of DeepHair that connects to the internet, and only when ``deephair models download`` calls it. A file is written beside its
place as ``.{name}.{tag}.part``, where the tag is of the content wanted, so that an interrupted download goes on where it was and never joins
two versions. It is renamed when its bytes have the published digest or, where none is published, the one that the hub states: sha256 of large
files, git's blob id of small ones.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from backend import artifacts, console, lpips_heads, weights, weights_check
from backend.errors import DeepHairError, InvalidArtifactError
from backend.weights import Part

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

CONNECTIONS = 4
_SPARE_DISK = 256 << 20  # bytes that must stay free


@dataclass(frozen=True)
class Wanted:
    """A file to fetch and what the hub says of it. ``size`` in bytes; ``digest`` is sha256 (64 hex digits) or git's blob id (40)."""

    part: Part
    name: str
    path: Path
    remote: str
    url: str
    location: str
    size: int
    commit: str
    digest: str
    basis: str

    @property
    def partial(self) -> Path:
        """Where the bytes are gathered."""
        return self.path.with_name(f".{self.path.name}.{self.digest[:12]}.part")

    @property
    def here(self) -> int:
        """Bytes that an earlier run has left."""
        return self.partial.stat().st_size if self.partial.is_file() else 0


class _Stopped(Exception):
    """No error: the way out of a transfer that is no longer wanted."""


class _Meter:
    """Counts the bytes of all transfers into one ``console.Progress``, in MB; doubles as the bar that huggingface_hub writes to."""

    def __init__(self, total: int, here: int) -> None:
        self._progress = console.Progress("download", max(1, -(-total // 1_000_000)), unit="MB")
        self._progress.start_at(here // 1_000_000)
        self._bytes, self._total, self._lock = here, total, threading.Lock()
        self.stop = threading.Event()

    def __call__(self, **_: Any) -> _Meter:
        return self

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: float = 1) -> None:
        """Adds bytes; a stopped transfer ends here."""
        if self.stop.is_set():
            raise _Stopped
        with self._lock:
            self._bytes += int(count)
            steps = (self._progress.total if self._bytes >= self._total else self._bytes // 1_000_000) - self._progress.done
            if steps:
                self._progress.update(steps)


def offline() -> bool:
    """Whether the user has forbidden connections (``HF_HUB_OFFLINE=1``)."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def to_fetch(folder: Path, names: Iterable[str], *, rehash: bool) -> list[tuple[Part, str]]:
    """(part, file) of everything missing or wrong below ``folder``; with ``rehash`` every byte that is there is read to find out.

    Raises DeepHairError where something is missing that can only be made by hand.
    """
    wanted, by_hand = [], []
    for part in map(weights.part, dict.fromkeys(names)):
        seen = weights_check.look(folder, part, each=(lambda: None) if rehash else None)
        absent = [name for name in (*part.files, *part.extras) if name in seen.faults or not (folder / part.folder / name).is_file()]
        if absent and part.hub is None:
            by_hand.append(f"{part.name}: {part.by_hand}; it belongs in {folder / part.folder}/")
        elif not weights.cards_of(folder, part) or seen.state != "found":  # a whole miniature lacks nothing that the hub has
            wanted += [(part, name) for name in absent]
    if by_hand:
        raise DeepHairError("nothing to fetch for:\n  " + "\n  ".join(by_hand), code="by_hand")
    return wanted


def ask(folder: Path, files: Sequence[tuple[Part, str]], *, endpoint: str | None = None) -> list[Wanted]:
    """Asks the hub for the size, commit and digest of each file (HEAD requests only). ``endpoint`` None is ``HF_ENDPOINT`` or the hub.

    Raises DeepHairError: offline, not reachable, not there, or the hub states another digest than the published one.
    """
    if files and offline():
        raise DeepHairError(
            "no connection is made: HF_HUB_OFFLINE is set",
            hint=f"unset it, or bring the files of another machine's folder into {folder} and run 'deephair models verify'",
            code="offline",
        )
    first = [_describe(folder, *file, endpoint) for file in files[:1]]  # alone, so that a hub that is down is waited for once
    return first + _parallel(lambda file: _describe(folder, *file, endpoint), files[1:])


def fetch(folder: Path, wanted: Sequence[Wanted]) -> None:
    """Fetches, checks and puts into place what ``ask`` found; one broken file does not stop the others. Raises DeepHairError naming all."""
    need = sum(file.size - file.here for file in wanted) + _SPARE_DISK
    free = shutil.disk_usage(folder).free
    if need > free:
        raise DeepHairError(
            f"{gb(need)} are needed in {folder}, {gb(free)} are free",
            hint="make room, or point paths.weights at another disk",
            code="disk_full",
        )
    meter = _Meter(sum(file.size for file in wanted), sum(file.here for file in wanted))
    lock = threading.Lock()

    def one(file: Wanted) -> None:
        _transfer(file, meter)
        entry = _checked(file)
        with lock:  # the record first: a file without an entry could not be verified, an entry without a file is only missing
            record = weights_check.read_record(folder)
            record[file.path.relative_to(folder).as_posix()] = entry
            artifacts.write_json(folder / weights_check.RECORD, record)
        file.partial.replace(file.path)
        artifacts.sync_folder(file.path.parent)

    _parallel(one, wanted, meter.stop)


def write_lpips_heads(folder: Path, names: Iterable[str]) -> list[str]:
    """Writes the LPIPS heads of the parts that have them packaged, where they are missing or broken; returns the paths written."""
    written = []
    for part in map(weights.part, names):
        path = folder / part.folder / part.lpips_heads
        if part.lpips_heads and (not path.is_file() or part.lpips_heads in weights_check.look(folder, part).faults):
            import torch

            heads = lpips_heads.read_heads(lpips_heads.packaged_file())
            artifacts.save_tensors(path, {name: torch.from_numpy(head) for name, head in heads.items()}, {})
            record = weights_check.read_record(folder)
            digest = artifacts.sha256_file(path)
            record[path.relative_to(folder).as_posix()] = {
                "sha256": digest, "size": path.stat().st_size, "source": "the installed lpips package", "checked_against": "published sha256",
            }  # fmt: skip
            artifacts.write_json(folder / weights_check.RECORD, record)
            written.append(str(path))
    return written


def gb(count: float) -> str:
    """``1234567`` -> ``1.2 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def _describe(folder: Path, part: Part, name: str, endpoint: str | None) -> Wanted:
    import httpx2
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, FileMetadataError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    assert part.hub is not None
    remote = part.hub.names.get(name, name)
    url = hf_hub_url(part.hub.repository, remote, revision=part.hub.revision, endpoint=endpoint)
    try:
        found = get_hf_file_metadata(url, token=False, endpoint=endpoint, retry_on_errors=True)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DeepHairError(
            f"{url} is not there", hint="a mirror (HF_ENDPOINT) may lack it; else tell us, the repository has changed", code="not_found"
        ) from error
    except (httpx2.HTTPError, HfHubHTTPError, FileMetadataError, OSError) as error:
        raise _unreachable(url, error) from error
    stated, published = (found.etag or "").lower(), part.hub.sha256.get(name, "")
    if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", stated) and not published:
        raise InvalidArtifactError(f"{url}: no digest is published and the server states none ({found.etag!r})", code="no_checksum")
    if published and len(stated) == 64 and stated != published:
        raise InvalidArtifactError(
            f"{url} is another file than the published one: the server states sha256 {stated}, expected {published}",
            hint="nothing was fetched; try another mirror, or the hub itself (unset HF_ENDPOINT)",
            code="wrong_checksum",
        )
    if found.size is None:
        raise InvalidArtifactError(f"{url}: the server does not say how large it is", code="no_size")
    return Wanted(
        part=part,
        name=name,
        path=folder / part.folder / name,
        remote=remote,
        url=url,
        location=found.location,
        size=found.size,
        commit=found.commit_hash or part.hub.revision,
        digest=published or stated,
        basis="published sha256" if published else "sha256 stated by the hub" if len(stated) == 64 else "git blob id stated by the hub",
    )


def _transfer(file: Wanted, meter: _Meter) -> None:
    """Brings the partial file to its full size, from where an earlier run left it; a cut connection is taken up again a few times."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    file.path.parent.mkdir(parents=True, exist_ok=True)
    for stale in file.path.parent.glob(f".{file.path.name}.*.part"):
        if stale != file.partial:
            stale.unlink()
    if file.here > file.size:
        file.partial.unlink()
    try:
        with file.partial.open("ab") as handle:
            bar: Any = meter
            headers = {**build_hf_headers(token=False), "Accept-Encoding": "identity"}
            http_get(file.location, handle, resume_size=file.here, headers=headers, expected_size=file.size, tqdm_class=bar)
            handle.flush()
            os.fsync(handle.fileno())
    except (httpx2.HTTPError, HfHubHTTPError) as error:
        raise _unreachable(file.url, error) from error
    except OSError as error:
        if error.errno is not None:  # the disk's own
            raise
        raise _unreachable(file.url, error) from error


def _checked(file: Wanted) -> dict[str, Any]:
    """The record's entry of a gathered file; raises InvalidArtifactError and removes the file where its digest is another one."""
    from huggingface_hub.utils.sha import git_hash

    sha256 = artifacts.sha256_file(file.partial)
    found = sha256 if len(file.digest) == 64 else git_hash(file.partial.read_bytes())  # the hub has a sha256 of every large file
    if found != file.digest:
        file.partial.unlink()
        raise InvalidArtifactError(
            f"{file.url}: what came has {'sha256' if len(file.digest) == 64 else 'blob id'} {found}, expected {file.digest} ({file.basis}); removed",
            hint="run the command again; if it stays so, the server or a proxy on the way changes files",
            code="wrong_checksum",
        )
    assert file.part.hub is not None
    return {
        "sha256": sha256,
        "size": file.size,
        "source": f"{file.part.hub.repository}/{file.remote}",
        "commit": file.commit,
        "checked_against": file.basis,
    }


def _unreachable(url: str, error: Exception) -> DeepHairError:
    return DeepHairError(
        f"{url}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        hint="run the command again, it goes on where it was; behind a firewall set HF_ENDPOINT to a mirror or HTTPS_PROXY",
        code="not_reachable",
    )


def _parallel(work: Callable[[Item], Result], items: Sequence[Item], stop: threading.Event | None = None) -> list[Result]:
    """``work`` for all items on a few threads, in their order; all failures raised as one DeepHairError. Ctrl-C ends transfers at once."""
    results: dict[int, Result] = {}
    failures: dict[int, DeepHairError] = {}
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        futures: dict[Future[Result], int] = {pool.submit(work, item): number for number, item in enumerate(items)}
        try:
            for future in as_completed(futures):
                try:
                    results[futures[future]] = future.result()
                except DeepHairError as error:
                    failures[futures[future]] = error
        except BaseException:
            if stop is not None:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if len(failures) == 1:
        raise next(iter(failures.values()))
    if failures:
        ordered = [failures[number] for number in sorted(failures)]
        raise DeepHairError(
            f"{len(failures)} of {len(items)} files failed:\n  " + "\n  ".join(error.message for error in ordered),
            hint="; ".join(dict.fromkeys(error.hint for error in ordered if error.hint)),
            code=ordered[0].code,
        )
    return [results[number] for number in range(len(items))]
