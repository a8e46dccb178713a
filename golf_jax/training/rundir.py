"""The run directory: everything about a run in one folder, and what the user sees while it lasts."""

import contextlib
import errno
import fcntl
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from golf_jax.config import GolfError
from golf_jax.files import GROWING, REPLACED, NotWritten, finite, json_rows, sealed, write_atomic
from golf_jax.processes import from_main
from golf_jax.supervise import ANEW
from golf_jax.training.runfiles import read_stages
from golf_jax.training.trackers import Tracker, open_tracker, scalars

DEEPEST = 160  # bytes of a run's longest name below its directory, a file of a checkpoint
PACKAGES = ("golf-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece", "zstandard", "brotli", "tyro")


def new_path(parent: str | Path, name: str) -> Path:
    """A new directory `parent`/`name`-TIME, with a number behind it where that is another start's. Raises GolfError."""
    base = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        Path(parent).mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            with contextlib.suppress(FileExistsError):
                (path := Path(parent) / (base if n == 1 else f"{base}-{n}")).mkdir()
                return path
    except OSError as error:
        raise GolfError(f"{error.filename}: cannot write the run directory: {error.strerror}; give another --run-dir") from None
    raise AssertionError


def kept(run: str | Path) -> bool:
    """Whether the run in this directory left anything to go on from: a checkpoint, or what it packed."""
    made = ("artifact.golf", "result.json")
    return any((Path(run) / name).exists() for name in made) or any(p.name.isdigit() for p in (Path(run) / "checkpoints").glob("*"))


def start_again(run: str | Path, devices: int) -> str:
    """The command that starts a run anew on as many devices, in the same directory, which has kept nothing."""
    return f"python -m golf_jax.train {shlex.quote(str(Path(run) / 'config.json'))} --run-dir {shlex.quote(str(run))} --devices {devices}"


def go_on(run: str | Path) -> str:
    """The command that goes on with a run."""
    return f"python -m golf_jax.train --resume {shlex.quote(str(run))}"


def all_again(run: str | Path) -> str:
    """What to do when one of several processes is lost that work on this run."""
    return f"{ANEW} with{f': {go_on(run)}' if run and kept(run) else ' the same command; this run has kept nothing yet'}"


class RunDir:
    """log.txt, metrics.jsonl and JSON files under `path`; only process 0 writes and prints.

    `record` is what the finished stages say (`stages.json`): from it a run goes on in another process. One process at a time: the lock
    of the operating system on run.lock goes with the process that holds it.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        self.main = jax.process_index() == 0
        self._live_at = 0.0
        self._terminal: TextIO | None = sys.stdout if self.main else None
        self._warned = False
        self.record: dict[str, Any] = {}
        self._tracker: Tracker | None = None
        self._step = 0
        # Every process ends with the same message when process 0 cannot go on.
        if problem := from_main(self._open(resume) if self.main else ""):
            raise GolfError(problem)
        self.record = json.loads(from_main(json.dumps(self.record)))

    def _open(self, resume: bool) -> str:
        """Creates the directory and its files; returns what is wrong, or nothing."""
        try:
            config = self.path / "config.json"
            if resume and not config.exists():
                return f"{self.path}: no run is there (config.json is missing)"
            place = os.path.abspath(self.path).encode()  # what orbax takes
            if len(place) + DEEPEST > (most := os.pathconf("/", "PC_PATH_MAX")):
                room = f"{len(place):,} bytes, and no checkpoint can be written below more than {most - DEEPEST:,}"
                return f"{self.path}: {room}; give another --run-dir"
            self.path.mkdir(parents=True, exist_ok=True)
            for name in GROWING:
                if (file := self.path / name).exists() and not file.is_file():  # opening a pipe would block for ever
                    return f"{file}: not a regular file; remove it"
            for name in REPLACED:
                if (file := self.path / name).is_dir():  # else found out when the run is over
                    return f"{file}: is a directory, and a run writes a file of that name; remove it"
            self._lock = open(self.path / "run.lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in self.path.glob(".*.????????.tmp"):  # what `write_atomic` had begun in a process that was killed
                left.unlink()
            here = config.exists()  # looked up under the lock: another start may have come and gone meanwhile
            if here and not resume and kept(self.path):
                return f"{self.path}: holds a run already; give another --run-dir, or --resume to go on with it"
            self._log = open(self.path / "log.txt", "w" if here and not resume else "a", encoding="utf8", errors="backslashreplace")
            self._repair_metrics(lambda row: resume)
            self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf8")
            record = read_stages(self.path)
            self.record = dict(record) if resume else {}
        except BlockingIOError:
            return f"{self.path}: another process works in this directory"
        except UnicodeEncodeError:
            return f"{self.path}: the name is not UTF-8, and no checkpoint can be written there; give another --run-dir"
        except GolfError as error:
            return str(error)
        except (OSError, ValueError) as error:
            return f"{self.path}: cannot write the run directory: {getattr(error, 'strerror', None) or error}"
        return ""

    def log(self, line: str) -> None:
        """One line to the terminal and to log.txt."""
        if self.main:
            self._print(f"{self._erase()}{self._wrapped(line)}\n")
            self._append(self._log, line)

    def _wrapped(self, line: str) -> str:
        """Long lines broken between words where a terminal would break them anywhere; log.txt has them whole."""
        if not self._erase():
            return line
        width = shutil.get_terminal_size().columns  # never 0, as of a terminal that nobody gave a size
        return "\n".join(textwrap.fill(part, width, subsequent_indent="    ") if len(part) > width else part for part in line.split("\n"))

    def _erase(self) -> str:
        return "\r\x1b[K" if self._terminal and self._terminal.isatty() else ""

    def _print(self, text: str) -> None:
        """To the terminal, as long as somebody reads there: a closed pipe or a full disk behind it must not end a run."""
        if self._terminal is None:
            return
        encoding = self._terminal.encoding or "utf8"
        try:
            self._terminal.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._terminal.flush()
        except (OSError, ValueError):
            self._terminal = None
            sys.stdout = open(os.devnull, "w")  # what Python still holds for it would fail at exit

    def _append(self, file: TextIO, line: str) -> None:
        """A full disk must not end a run either: said once, and the run goes on without these lines."""
        with self._told(file):
            print(line, file=file, flush=True)

    def sync(self) -> None:
        """Have the disk itself hold what was told so far, before it holds what says that this is done: a checkpoint, a finished stage.

        Else a power loss, or a disk that turns read-only, would leave a hole in the curve for ever.
        """
        for file in (self._log, self._metrics) if self.main else ():
            with self._told(file):
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def _told(self, file: TextIO) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._print(f"warning: {file.name}: cannot write: {error.strerror}; the run goes on\n")

    def live(self, line: str) -> None:
        """A line that overwrites itself, on a terminal only, a few times per second at most."""
        if self.main and self._erase() and time.monotonic() - self._live_at > 0.2:
            self._live_at = time.monotonic()
            self._print(self._erase() + line[: shutil.get_terminal_size().columns - 1])

    def metrics(self, event: str, **values: Any) -> None:
        """One row: event `train` (a step), `validation` or `score`. Numbers that are not finite are null. Raises GolfError as `write`."""
        if self.main:
            self._check_there()
            self._append(self._metrics, json.dumps({"event": event, **finite(values)}, allow_nan=False))
            self._step = values.get("step", self._step)
            self._tracked(lambda tracker: tracker.row(self._step, scalars(event, values)))

    def track(self, name: str, config: dict[str, Any]) -> None:
        """Send every further row to this tracker, too ("": to none)."""
        if self.main and name:
            self._tracker = open_tracker(name, self.path, config)

    def _tracked(self, call: Callable[[Tracker], None]) -> None:
        """A tracker out of order is said once and left alone."""
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except Exception as error:  # anybody's code and network
            self._tracker = None
            self.log(f"warning: tracking ends here: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}; the run goes on")

    def rows(self) -> list[dict[str, Any]]:
        """The sound rows of metrics.jsonl."""
        return json_rows(self.path / "metrics.jsonl")

    def _repair_metrics(self, keep: Any = lambda row: True) -> None:
        """Rewrite metrics.jsonl, whole or not at all, with the sound rows that are to be kept."""
        kept = "".join(json.dumps(row) + "\n" for row in self.rows() if keep(row))
        self.write("metrics.jsonl", kept)

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows of what a resumed run does again: steps and validations from `step` on."""
        self._keep_metrics(lambda row: isinstance(row.get("step"), int) and row["step"] < step)

    def drop_scores(self, packed: bool) -> None:
        """Drop the rows of scores that are to be found again: all of a model that is not `packed`, else those that were not noted.

        What was noted is of the artifact before, whose bytes may have been others."""
        if not packed:
            self.record.pop("evaluations", None)
        done = [("pre_quantization", None), *(("packed", mode) for mode in self.record.get("evaluations", {}))] if packed else []

        def keep(row: dict[str, Any]) -> bool:
            stage = row.get("stage")
            return row["event"] != "score" or (stage, row.get("mode") if stage == "packed" else None) in done

        self._keep_metrics(keep)

    def _check_there(self) -> None:
        try:
            there = os.path.samestat(os.stat(self.path / "run.lock"), os.fstat(self._lock.fileno()))
        except OSError as error:
            there = error.errno not in (errno.ENOENT, errno.ENOTDIR)  # a file system out of order tells more when something is written
        if not there:
            what = "was removed, moved or replaced while the run worked in it (its run.lock is not there), and nothing more can be kept"
            raise GolfError(f"{self.path}: {what}; where it was moved, go on with --resume and its new name")

    def _keep_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        if self.main:
            self._metrics.close()
            self._repair_metrics(keep)
            self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf8")

    def note(self, stage: str, facts: Any) -> None:
        """The stage is done: its facts are kept, so that it is not repeated."""
        self.record[stage] = facts
        self.sync()
        self.write("stages.json", sealed(self.record))

    def write(self, name: str, content: Any) -> Path:
        """A file, complete or not there at all: bytes and text as they are, anything else as JSON.

        Raises GolfError where it cannot be written, and where the directory is gone: half a run would be made anew in its place."""
        target = self.path / name
        if not self.main:
            return target
        self._check_there()
        if not isinstance(content, bytes | str):
            content = json.dumps(content, indent=1, allow_nan=False) + "\n"
        try:
            return write_atomic(target, content)
        except NotWritten:
            self._check_there()  # gone this moment
            raise

    def remove(self, name: str) -> None:
        if self.main:
            (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        if self.main:
            self._tracked(lambda tracker: tracker.close())
            for file in (self._log, self._metrics, self._lock):
                with contextlib.suppress(OSError):  # a full disk has been reported by then
                    file.close()


def environment() -> dict[str, Any]:
    """Versions, devices and the state of the source tree."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*args: str) -> str | None:
        try:
            here = Path(__file__).parent
            return subprocess.run(
                ["git", *args], cwd=here, capture_output=True, text=True, errors="replace", timeout=10, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    changes = git("status", "--porcelain")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {p: version(p) for p in PACKAGES},
        "devices": [str(d.device_kind) for d in jax.devices()],
        "processes": jax.process_count(),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(changes) if changes is not None else None,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "argv": sys.argv,
    }
