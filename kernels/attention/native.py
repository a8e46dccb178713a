"""XSA attention on a CPU in C++ (`native.cc`), called through XLA's typed FFI: 0.42 to 0.62 of the time of `xla` with
all gradients (benchmarks/README.md).

Compiled by this machine's C++ compiler when first asked for, and kept where jax keeps compiled programs.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

TARGETS = {"forward": "golf_xsa_forward", "backward": "golf_xsa_backward"}
_SOURCE = Path(__file__).with_name("native.cc")
_PATIENCE = 300  # seconds; it takes ten
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w")


def compiler() -> str:
    """The C++ compiler's command: CXX, or the first of the usual names that is there; empty where there is none."""
    return os.environ.get("CXX", "").strip() or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")


@functools.cache
def load() -> None:
    """Build the library where it is not built yet, and register its two calls. Raises ValueError: no compiler, or it fails."""
    if not compiler():
        raise ValueError("attention backend 'native' needs a C++ compiler: install g++ or clang++, or name one in CXX")
    command = [*compiler().split(), *_FLAGS, f"-I{jax.ffi.include_dir()}"]
    name, kept = f"golf_xsa-{_digest(command)}", jax.config.values["jax_compilation_cache_dir"]
    with tempfile.TemporaryDirectory(prefix="golf_jax-") as folder:
        library = next((path for path in Path(kept or folder).glob(f"{name}-*.so") if path.name == _named(name, path)), None)
        library = library or _build(command, name, Path(folder))
        with contextlib.suppress(OSError):  # else it is built anew in every process
            if kept and library.parent == Path(folder):
                library = _keep(library, Path(kept))
        try:
            calls = ctypes.CDLL(str(library))
        except OSError as e:
            raise ValueError(
                f"attention backend 'native': {library} cannot be loaded ({e}); set GOLF_JAX_CACHE to another folder"
            ) from None
    for target in TARGETS.values():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(calls, target)), platform="cpu")


def _digest(command: list[str]) -> str:
    """Of all that decides what is built: the source, the compiler and the processor, which may differ where a home directory is shared."""
    info = Path("/proc/cpuinfo")
    processor = (
        [line for line in info.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))][:2]
        if info.is_file()
        else []
    )
    said = [*command, jax.__version__, platform.machine(), platform.processor(), *processor, _SOURCE.read_text()]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def _named(name: str, library: Path) -> str:
    """A library's file name holds the digest of its bytes: one that is cut off or damaged has another, and is built again."""
    return f"{name}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _build(command: list[str], name: str, folder: Path) -> Path:
    made = folder / f"{name}.so"
    print(f"native attention: compiled once by {command[0]}, a few seconds", file=sys.stderr, flush=True)
    try:
        done = subprocess.run([*command, str(_SOURCE), "-o", str(made)], capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise ValueError(f"attention backend 'native': {command[0]} cannot be run ({e})") from None
    if done.returncode or not made.is_file():
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
        raise ValueError(f"attention backend 'native': {command[0]} cannot compile {_SOURCE} ({said.strip()})")
    return made


def _keep(library: Path, place: Path) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as beside:  # it appears whole, whichever process is first
        copy = shutil.copy(library, beside)
        return Path(copy).replace(place / _named(library.stem, library))


def xsa_attention(q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, *, xsa: bool, first_BS: jax.Array | None = None) -> jax.Array:
    """As `kernels.attention.xsa_attention`; float32, head_dim a multiple of 16. Raises ValueError (`load`)."""
    if q_BSHK.dtype != jnp.float32 or q_BSHK.shape[-1] % 16:
        raise ValueError(f"attention backend 'native' needs float32 and head_dim % 16 == 0, got {q_BSHK.dtype} and {q_BSHK.shape[-1]}")
    load()
    return _attend(q_BSHK, k_BTGK, v_BTGK, jnp.zeros(q_BSHK.shape[:2], jnp.int32) if first_BS is None else first_BS, xsa)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, first_BS: jax.Array, xsa: bool) -> jax.Array:
    return _forward(q_BSHK, k_BTGK, v_BTGK, first_BS, xsa)[0]


def _call(name: str, results: tuple, *args: jax.Array, xsa: bool) -> tuple:
    return tuple(jax.ffi.ffi_call(TARGETS[name], results, vmap_method="sequential")(*args, xsa=xsa))


def _forward(q_BSHK, k_BTGK, v_BTGK, first_BS, xsa):
    """Saves y, o.u and the logarithm of the sum of exponentials [B, S, H], never the scores."""
    row_BSH = jax.ShapeDtypeStruct(q_BSHK.shape[:3], jnp.float32)
    args = (q_BSHK, k_BTGK, v_BTGK, first_BS)
    saved = _call("forward", (jax.ShapeDtypeStruct(q_BSHK.shape, jnp.float32), row_BSH, row_BSH), *args, xsa=xsa)
    return saved[0], (*args, *saved)


def _backward(xsa, residuals, dy_BSHK):
    like = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals[:3])
    return *_call("backward", like, *residuals, dy_BSHK, xsa=xsa), None


_attend.defvjp(_forward, _backward)
