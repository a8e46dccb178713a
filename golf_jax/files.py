"""Reading and writing files whole: only regular files of a size that was agreed on, and never half a file."""

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from golf_jax.config import GolfError, parse_json

# What a run writes in its directory, by the name of the file; `report` adds its page.
REPLACED = ("config.json", "environment.json", "tokenizer.model", "code.pyz", "artifact.golf", "stages.json", "result.json")
GROWING = ("run.lock", "log.txt", "metrics.jsonl")
UNFINISHED = ".unfinished"  # ends a folder's name as no user's own would


class NotWritten(GolfError):
    """A disk that is full, read-only or gone."""


def refuse_pointer(path: str | Path, head: bytes) -> None:
    """GolfError if a file that begins with `head` only says where Git LFS has the file itself, as a clone without it leaves."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise GolfError(f"{path}: a Git LFS pointer, not the file itself; fetch it: git lfs pull")


def read_bytes(path: str | Path, limit: int = 1 << 31) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. GolfError, naming it, for anything else (a pipe would block for ever)."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
            raise GolfError(f"{path}: cannot be read ({kind}, not a file)")
        if status.st_size > limit:
            raise GolfError(f"{path}: {status.st_size} bytes; at most {limit} are read")
        data = Path(path).read_bytes()
        refuse_pointer(path, data)
        return data
    except (OSError, ValueError) as error:
        if isinstance(error, GolfError):
            raise
        raise GolfError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def write_atomic(path: str | Path, *chunks: bytes | memoryview | str) -> Path:
    """Writes `chunks` to `path` so that readers see the old file or the whole new one, also when the disk fills up.

    A link is followed, not replaced; what is no regular file, or lies behind this process's own output (`/dev/stdout`), is written to.
    Text becomes UTF-8, with an escape for a byte that is none in the name of a file.
    """
    path = Path(path)
    temporary = None
    raw = [chunk.encode(errors="backslashreplace") if isinstance(chunk, str) else chunk for chunk in chunks]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (there := _through(path)) is not None:
            with open(there, "wb") as file:
                file.writelines(raw)
            return path
        target = Path(os.path.realpath(path))
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # a folder that cannot be synced, as of some network file systems: the file itself is there
            sync(target.parent)
    except OSError as error:
        raise NotWritten(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # renamed, or on a disk that has become read-only meanwhile
                os.unlink(temporary)
    return path


def sync(path: Path) -> None:
    """Have the system write a file's content, or a folder's names, to the disk. OSError where it cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _through(path: Path) -> Path | int | None:
    """What is to be opened where no file may be replaced: a device or pipe, or a copy of this process's descriptor with `path` behind it,
    whose end moves on with what is written; else None."""
    if not path.exists():
        return None
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                sys.stdout.flush()
                return os.dup(descriptor)
    return None if path.is_file() else path


@contextlib.contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, which the caller renames when it is complete; else it is removed at the end.

    It is locked, and the lock goes with its process: folders that killed processes left are removed, before and after. OSError where it
    cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(target)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_left, target)
        while True:
            folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=UNFINISHED))
            with contextlib.suppress(OSError):  # also of a file system without locks, where nothing is taken for left
                stack.enter_context(_locked(folder))
            if folder.exists():  # not taken for left in the moment before
                break
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def remove(path: Path) -> None:
    """Whatever is there, if anything: a folder with all it holds, a file, a link alone, a pipe (which `rmtree` would wait for).

    At once for whoever looks, and once where several processes find the same. OSError where it cannot be.
    """
    with folder_beside(path) as folder, contextlib.suppress(FileNotFoundError):  # of another process that was faster
        os.rename(path, folder / path.name)


def _remove_left(target: Path) -> None:
    for left in target.parent.glob(f".{glob.escape(target.name)}.????????{UNFINISHED}"):
        with contextlib.suppress(OSError), _locked(left, fcntl.LOCK_NB):  # a living process has it
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, wait: int = 0) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | wait)
        yield
    finally:
        os.close(descriptor)


def check_target(path: str | Path) -> None:
    """GolfError unless a file may be written at `path`: told before the work whose result goes there, not after."""
    target = Path(os.path.realpath(path))
    reason = "is a directory" if target.is_dir() else "" if target.parent.is_dir() else f"there is no directory {target.parent}"
    if reason or not os.access(target.parent if target.is_file() or not target.exists() else path, os.W_OK):
        raise GolfError(f"{path}: cannot be written ({reason or 'permission denied'})")
    if target.name in REPLACED + GROWING and (target.parent / GROWING[0]).exists():
        raise GolfError(f"{path}: is a file of the run in that directory, which would be lost; name another one")


def json_text(value: Any) -> str:
    """`value` as JSON text; numbers that are not finite, which JSON has not, are null."""
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """JSON data with None for every number that is not finite."""
    if isinstance(value, dict):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sealed(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` (JSON data) with the digest of all of them under `sha256`: what differs from `sealed` of itself was altered."""
    body = {name: value for name, value in facts.items() if name != "sha256"}
    return body | {"sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def json_rows(path: Path) -> list[dict[str, Any]]:
    """The rows {event, ...} of a metrics.jsonl; lines that a kill or a fault tore are left out, and none of a file that is not there."""
    found = []
    if path.exists():
        for line in read_bytes(path).splitlines():
            with contextlib.suppress(GolfError):
                row = parse_json(line)
                if isinstance(row, dict) and isinstance(row.get("event"), str):
                    found.append(row)
    return found
