"""The calls in C++ (`library.cc`) of the attention backend `native`, made by XLA's typed FFI: attention, maps and Newton-Schulz on a CPU.

Compiled by this machine's C++ compiler when first asked for, and kept where jax keeps compiled programs, or beside Python's own.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import jax

TARGETS = {
    "forward": "golf_xsa_forward",
    "backward": "golf_xsa_backward",
    "unstack": "golf_unstack",
    "linear": "golf_linear",
    "mlp": "golf_mlp",
    "newton_schulz_float32": "golf_newton_schulz",
    "newton_schulz_bfloat16": "golf_newton_schulz_bf16",
}
MEASURED = platform.machine().lower() in ("x86_64", "amd64")  # elsewhere it has not run, and is there for those who name it
_SOURCE = Path(__file__).with_name("library.cc")
_PATIENCE = 300  # seconds; it takes two
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w")


def processor() -> list[str]:
    """What Linux says of the first processor: its name and what it can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2]


_CAN = {word for line in processor() for word in line.split()} if MEASURED else set()
WIDE = "avx512f" in _CAN
"""Whether products in C++ are faster than XLA's, which they are with AVX-512."""
PAIRS = "avx512_bf16" in _CAN and "amx_bf16" not in _CAN
"""Likewise those of bfloat16, as measured with AVX512_BF16 (Zen 4); with AMX, which XLA may use, they have not been compared."""


def compiler() -> str:
    """The C++ compiler's command: CXX, or the first of the usual names that is there; empty where there is none."""
    return os.environ.get("CXX", "").strip() or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")


@functools.cache
def begin() -> Callable[[], str]:
    """Let the compiler begin where the library is not built yet. What is returned waits for it and says what went wrong, else nothing."""
    command, (first, *others) = [*compiler().split(), *_FLAGS, f"-I{jax.ffi.include_dir()}"], _places()
    if not compiler():
        return lambda: "attention backend 'native' needs a C++ compiler: install g++ or clang++, or name one in CXX"
    name = f"golf_xsa-{_digest(command)}"
    for path in (path for place in (first, *others) for path in place.glob(f"{name}-*.so")):
        if path.name == _named(name, path):
            return functools.cache(functools.partial(_register, path))
    print(f"native attention: compiled once by {command[0]}, a few seconds", file=sys.stderr, flush=True)
    try:
        # It goes with the process, or with what waits for the library; what the compiler keeps meanwhile lies there, too.
        folder = tempfile.TemporaryDirectory(prefix="golf_jax-", ignore_cleanup_errors=True)
        made, surroundings = Path(folder.name) / f"{name}.so", {**os.environ, "TMPDIR": folder.name}
        process = subprocess.Popen(
            [*command, str(_SOURCE), "-o", str(made)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=surroundings,
            process_group=0,
        )
    except OSError as e:
        told = f"attention backend 'native': {command[0]} cannot be run ({e})"
        return lambda: told
    atexit.register(_end, process)

    @functools.cache
    def told_once() -> str:
        with folder:
            try:
                said = process.communicate(timeout=_PATIENCE)[1]
            except subprocess.TimeoutExpired as e:
                _end(process)
                return f"attention backend 'native': {command[0]} cannot be run ({e})"
            if process.returncode or not made.is_file():
                said = next((line for line in said.splitlines() if "error" in line), f"exit status {process.returncode}")
                return f"attention backend 'native': {command[0]} cannot compile {_SOURCE} ({said.strip()})"
            kept = made
            with contextlib.suppress(OSError):  # else it is built anew in every process
                kept = _keep(made, first)
            return _register(kept)

    def wait() -> str:
        with lock:  # threads may ask at a time
            return told_once()

    lock = threading.Lock()
    return wait


def _end(process: subprocess.Popen[str]) -> None:
    """With those that it has started: a compiler's driver does not take the compiler with it."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)


def load() -> None:
    """Have the library's calls registered, built if need be. Raises ValueError: no compiler, or it fails."""
    if wrong := begin()():
        raise ValueError(wrong)


def ready() -> None:
    """What uses the library may be traced. Who has begun waits before anything is compiled (`load`), and may trace meanwhile."""
    if not begin.cache_info().currsize:
        load()


def _places() -> list[Path]:
    """Where a library may lie, the first where it is kept: with jax's compiled programs if they are, and with Python's own."""
    programs, beside = jax.config.values["jax_compilation_cache_dir"], importlib.util.cache_from_source(str(_SOURCE))
    return [*([Path(programs)] if programs else []), Path(beside).parent]


def _register(library: Path) -> str:
    try:
        calls = ctypes.CDLL(str(library))
        found = {target: jax.ffi.pycapsule(getattr(calls, target)) for target in TARGETS.values()}
    except (OSError, AttributeError) as e:
        return f"attention backend 'native': {library} cannot be loaded ({e}); set GOLF_JAX_CACHE to another folder"
    for target, call in found.items():
        jax.ffi.register_ffi_target(target, call, platform="cpu")
    return ""


def _digest(command: list[str]) -> str:
    """Of all that decides what is built: the source, the compiler and the processor, which may differ where a home directory is shared."""
    said = [*command, jax.__version__, platform.machine(), platform.processor(), *processor(), *(path.read_text() for path in sources())]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def sources() -> list[Path]:
    """All files that the library is made of."""
    return [_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))]


def _named(name: str, library: Path) -> str:
    """A library's file name holds the digest of its bytes: one that is cut off, damaged, unreadable or no file (a pipe would never end) has
    another, and is built again."""
    with contextlib.suppress(OSError):
        if library.is_file():
            return f"{name}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"
    return ""


def _keep(library: Path, place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as beside:  # it appears whole, whichever process is first
        copy = shutil.copy(library, beside)
        return Path(copy).replace(place / _named(library.stem, library))
