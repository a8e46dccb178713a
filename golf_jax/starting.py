"""What a command of this package does before anything else is imported, and whether this process is one."""

import gc
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

AGAIN = "golf_jax_keeps_pages"
PR_SET_THP_DISABLE = 41
COMPUTING = ("train", "evaluate", "sweep")  # they work for minutes, so that keeping pages is worth a second start
# Huge pages where Linux gives them to those that ask, and freed blocks of up to 64 MB, the most that a thread's heap holds, kept.
TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_threshold": 64 << 20, "trim_threshold": 256 << 20, "top_pad": 64 << 20}.items()
)


def begin() -> None:
    """Called when the package is imported: does something only where a command begins by it (`python -m golf_jax...`, `golf-jax`).

    Ctrl-C ends it without a traceback until `cli.run` hears it.
    """
    name = "".join(sys.argv[:1])  # "-m" while Python looks for the module
    if not is_ours() or not (name == "-m" or name.endswith("/golf-jax")):
        return
    # XLA:CPU's QR is OpenBLAS, whose threads wait by spinning: on busy cores the initialisation took half a minute instead of a second.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    module = _module(sys.orig_argv)
    if (module.removeprefix("golf_jax.") if "." in module else "".join(sys.argv[1:2])) in COMPUTING:
        _keep_pages()
        gc.disable()
        huge_pages(False)


def is_ours() -> bool:
    """Whether this process is a command of this package, never somebody else's: a notebook that runs the module, a test."""
    return _module(sys.orig_argv).split(".")[0] == "golf_jax" or os.path.basename(" ".join(sys.orig_argv[1:2])) == "golf-jax"


def work_begins() -> None:
    """What is loaded and traced makes a million objects, to stay: only what comes from here on is searched for cycles, and seldom, as the
    programs of scoring are still to be traced."""
    if not gc.isenabled():  # a command's own process (`begin`)
        gc.freeze()
        gc.set_threshold(100_000)
        gc.enable()
    huge_pages(True)


def huge_pages(on: bool) -> None:
    """Whether memory that this process maps from here on may lie in huge pages, where glibc asks for them (Linux).

    Steps gain by them. What compiles and proves before takes many small blocks: clearing two megabytes for each costs more than it saves.
    """
    if sys.platform == "linux" and "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", ""):
        import ctypes  # not for a process that starts over

        with suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.prctl(PR_SET_THP_DISABLE, int(not on), 0, 0, 0)
            if on:
                libc.malloc_trim(0)  # what is free lies in small pages


def _keep_pages() -> None:
    """Start this process over with a glibc that keeps freed memory and asks for huge pages.

    XLA:CPU allocates its temporaries anew in every step, which the kernel maps page by page (what that costs: benchmarks/README.md). glibc
    reads the variable only when a process starts. GLIBC_TUNABLES=glibc.malloc.hugetlb=0 leaves it alone. The second start is marked on its
    command line: an environment may be emptied around every Python, which would start over for ever.
    """
    given, words = os.environ.get("GLIBC_TUNABLES", ""), sys.orig_argv
    if AGAIN in sys._xoptions or "glibc.malloc.hugetlb" in given:
        return
    with suppress(OSError, ValueError, AttributeError):  # another system, another C library, a program that cannot be started
        if sys.executable and os.confstr("CS_GNU_LIBC_VERSION"):  # None where Python cannot tell
            os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [given, TUNABLES]))
            signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # kept until the new start listens (`golf_jax.interrupt.catching`)
            os.execv(sys.executable, [sys.executable, "-X", AGAIN, *words[1:]])


def _module(words: Sequence[str]) -> str:
    """What Python was told to run by `-m`; empty where it runs a script, whose arguments may hold anything."""
    left = iter(words[1:])
    for word in left:
        if word in ("-X", "-W"):
            next(left, "")
        elif word == "-m":
            return next(left, "")
        elif not word.startswith("-") or word in ("-", "-c"):
            break
    return ""
