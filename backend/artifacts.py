"""Files that are either whole or not there: written beside, flushed to disk, renamed (DESIGN 4.4; reliability.md C1).

Nothing here unpickles: the formats are bytes, JSON and safetensors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backend.errors import DeepHairError, InvalidArtifactError

TMP_SUFFIX = ".tmp"
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's zip, then bare pickles by protocol
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of ``path``; on success flushes it to disk and renames it over ``path``, on failure removes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def second_name(source: Path, path: Path) -> None:
    """Gives a file a second name, ``path``, which must be free: a hard link, or on file systems without such (exFAT, some network
    shares) a copy that has reached the disk. Raises OSError, and then leaves nothing at ``path``."""
    try:
        os.link(source, path)
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        shutil.copyfile(source, path)
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content``, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replaces ``path`` by UTF-8 text, atomically."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Replaces ``path`` by JSON (sorted keys, two spaces, strict: NaN is refused), atomically."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces ``path`` by one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Reads JSON; raises InvalidArtifactError with the path when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InvalidArtifactError(f"{path} is missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArtifactError(f"{path} is not valid JSON: {error}") from error


def iter_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields one JSON object per line, holding one line at a time; raises InvalidArtifactError naming the line that is broken."""
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidArtifactError(f"{path}, line {number} is not valid JSON: {error}") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All objects of ``iter_jsonl``."""
    return list(iter_jsonl(path))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of what JSON can hold; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_if_changed(path: Path, content: str) -> None:
    """Writes ``content`` only where it differs, so that a rerun leaves even the time stamps alone."""
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        write_text(path, content)


def save_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """Writes torch tensors as safetensors with JSON-encoded metadata values, atomically; returns the file's sha256.

    Raises DeepHairError when the file cannot be written, a full disk above all; what stood there before stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = {key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    with replacing(path) as temporary:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)
        except SafetensorError as error:  # the library hides the system's own error in it
            raise DeepHairError(
                f"{path} could not be written: {error}",
                hint="check that the folder is writable and the disk is not full",
                code="not_written",
            ) from error
        temporary.chmod(0o644)  # safetensors makes its files readable by their owner alone
        digest = sha256_file(temporary)
    return digest


def read_header(path: Path) -> dict[str, Any]:
    """Metadata of a safetensors file; values that hold JSON are decoded. Raises InvalidArtifactError when the file is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as handle:  # the header alone: torch stays out
            metadata = handle.metadata() or {}
    except FileNotFoundError as error:
        raise InvalidArtifactError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return {key: _decoded(value) for key, value in metadata.items()}


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _unreadable(path: Path, error: Exception) -> InvalidArtifactError:
    """Why a file is no safetensors: a pickle under its name, or damage."""
    with contextlib.suppress(OSError), path.open("rb") as handle:
        start = handle.read(8)  # safetensors begin with their header's length, whose upper half is zero
        if start.startswith(_PICKLE_STARTS) and start[4:] != bytes(4):
            return InvalidArtifactError(
                f"{path} is a pickle (as torch.save writes it), not safetensors; DeepHair never opens pickles",
                hint="load it where you trust its source and write it again with safetensors.torch.save_file",
            )
    return InvalidArtifactError(
        f"{path} is not a whole safetensors file: {error}", hint="it may be truncated or of another format; copy or download it again"
    )


def load_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file on the CPU. Raises InvalidArtifactError when the file is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise InvalidArtifactError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def aligned(tensor: Any) -> Any:
    """The tensor where its memory begins at a multiple of 64 bytes, as all that torch allocates, else a copy that does.

    Tensors of a mapped file begin wherever its header ends, and on a CPU the place decides in which order products are added up: the
    same weights under a header that is eight bytes longer painted a picture that differed by 1.6e-6.
    """
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Refuses a second run on the same folder. The lock dies with its process, so a kill leaves nothing to clean up."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DeepHairError(
                f"another run is working in {folder}", hint="wait for it to end, or give this run a folder of its own", code="locked"
            ) from error
        yield


def remove_stale_temporaries(folder: Path) -> int:
    """Removes what a killed run left half-written below ``folder``; returns how many. Call only while holding its lock."""
    stale = sorted(folder.rglob(f".*{TMP_SUFFIX}")) if folder.is_dir() else []
    for path in stale:
        if path.is_dir():  # a checkpoint's state that was not yet, or no longer, in place
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(stale)
