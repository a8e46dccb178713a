"""The run directory: everything about a run in one folder, and what the user sees while it lasts."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import jax

from golf_jax.config import GolfError
from golf_jax.processes import from_main

PACKAGES = ("golf-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "sentencepiece", "zstandard", "brotli", "tyro")


class RunDir:
    """log.txt, metrics.jsonl and JSON files under `path`; only process 0 writes and prints."""

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path)
        self.main = jax.process_index() == 0
        self._live = self.main and sys.stdout.isatty()
        self._live_at = 0.0
        # Every process ends with the same message when process 0 cannot go on.
        if problem := from_main(self._open(resume) if self.main else ""):
            raise GolfError(problem)

    def _open(self, resume: bool) -> str:
        """Creates the directory and its files; returns what is wrong, or nothing."""
        here = (self.path / "config.json").exists()
        if here and not resume:
            return f"{self.path}: holds a run already; give another --run-dir, or --resume to go on with it"
        if resume and not here:
            return f"--resume {self.path}: no run is there (config.json is missing)"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._log = open(self.path / "log.txt", "a", encoding="utf8")
            self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf8")
        except OSError as error:
            return f"{self.path}: cannot write the run directory: {error.strerror}"
        return ""

    def log(self, line: str) -> None:
        """One line to the terminal and to log.txt."""
        if not self.main:
            return
        if self._live:
            sys.stdout.write("\r\x1b[K")
        print(line, flush=True)
        self._append(self._log, line)

    def _append(self, file: TextIO, line: str) -> None:
        try:
            print(line, file=file, flush=True)
        except OSError as error:
            raise GolfError(f"{file.name}: cannot write: {error.strerror}") from None

    def live(self, line: str) -> None:
        """A line that overwrites itself, on a terminal only, a few times per second at most."""
        if self._live and time.monotonic() - self._live_at > 0.2:
            self._live_at = time.monotonic()
            sys.stdout.write("\r\x1b[K" + line[: os.get_terminal_size().columns - 1])
            sys.stdout.flush()

    def metrics(self, **values: Any) -> None:
        if self.main:
            self._append(self._metrics, json.dumps(values))

    def truncate_metrics(self, step: int) -> None:
        """Drop metrics of steps at or after `step`: a resumed run writes them again."""
        if not self.main:
            return
        file = self.path / "metrics.jsonl"
        kept = [line for line in file.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] < step]
        file.write_text("".join(f"{line}\n" for line in kept))

    def write(self, name: str, content: Any) -> Path:
        """A file, complete or not there at all: bytes and text as they are, anything else as JSON."""
        target = self.path / name
        if not self.main:
            return target
        if not isinstance(content, bytes):
            text = content if isinstance(content, str) else json.dumps(content, indent=1)
            content = (text.rstrip("\n") + "\n").encode()
        part = target.with_name(target.name + ".part")
        try:
            part.write_bytes(content)
            os.replace(part, target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise GolfError(f"{target}: cannot write: {error.strerror}") from None
        return target

    def close(self) -> None:
        if self.main:
            for file in (self._log, self._metrics):
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
            return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
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
        "argv": sys.argv,
    }
