"""XSA attention on a CPU in C++ (`native.cc`), called through XLA's typed FFI: a third to a half of the time of the `xla` backend.

Compiled by this machine's C++ compiler when first asked for, and kept where jax keeps compiled programs.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

TARGETS = {"forward": "golf_xsa_forward", "backward": "golf_xsa_backward"}
_SOURCE = Path(__file__).with_name("native.cc")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w")


def compiler() -> str:
    """The C++ compiler's command: CXX, or the first of the usual names that is there; empty where there is none."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")


@functools.cache
def load() -> None:
    """Build the library where it is not built yet, and register its two calls. Raises ValueError: no compiler, or it fails."""
    if not compiler():
        raise ValueError("attention backend 'native' needs a C++ compiler: install g++ or clang++, or name one in CXX")
    command = [*compiler().split(), *_FLAGS, f"-I{jax.ffi.include_dir()}"]
    place = Path(jax.config.values["jax_compilation_cache_dir"] or tempfile.mkdtemp(prefix="golf_jax-"))
    library = place / f"golf_xsa-{_digest(command)}.so"
    if not library.is_file():
        _build(command, library)
    try:
        calls = ctypes.CDLL(str(library))
    except OSError as e:
        raise ValueError(f"attention backend 'native': {library} cannot be loaded ({e}); remove it, and it is built again") from None
    for name in TARGETS.values():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(calls, name)), platform="cpu")


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


def _build(command: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # several processes may build it at once
        made = Path(folder) / library.name
        try:
            done = subprocess.run([*command, str(_SOURCE), "-o", str(made)], capture_output=True, text=True)
        except OSError as e:
            raise ValueError(f"attention backend 'native': {command[0]} cannot be run ({e})") from None
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
            raise ValueError(f"attention backend 'native': {command[0]} cannot compile {_SOURCE} ({said.strip()})")
        made.replace(library)


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
