"""What a command does before anything is imported: it may start over, and nobody else's process does."""

import gc
import os
import signal
import subprocess
import sys

import pytest

from golf_jax import interrupt, starting
from golf_jax.starting import AGAIN, TUNABLES


@pytest.mark.parametrize(
    ("words", "argv", "given", "set_to"),
    [
        (["-u", "-m", "golf_jax.train", "pr638"], ["-m", "pr638"], "", TUNABLES),
        (["-m", "golf_jax", "sweep", "pr638"], ["-m", "sweep", "pr638"], "", TUNABLES),
        (["/usr/bin/golf-jax", "train"], ["/usr/bin/golf-jax", "train"], "glibc.cpu.x=1", f"glibc.cpu.x=1:{TUNABLES}"),
        (["-X", "dev", "-m", "golf_jax.evaluate"], ["-m"], "", TUNABLES),
        (["-m", "golf_jax.train"], ["-m"], "glibc.malloc.hugetlb=0", None),
        (["-m", "golf_jax.check", "train"], ["-m", "train"], "", None),
        (["-m", "golf_jax"], ["-m"], "", None),
        (["-m", "golf_jax.train"], ["/where/golf_jax/train.py"], "", None),
        (["-m", "ipykernel_launcher", "-f", "golf_jax.json"], ["-m", "-f", "golf_jax.json"], "", None),
        (["mine.py", "-m", "golf_jax.train"], ["mine.py", "-m", "golf_jax.train"], "", None),
        (["-c", "work()", "-m", "golf_jax.train"], ["-c", "-m", "golf_jax.train"], "", None),
        ([], [""], "", None),
    ],
)
def test_what_computes_starts_over_keeping_pages_once_and_never_another_process(words, argv, given, set_to, monkeypatch):
    started = []

    def execv(path, argv):
        held = signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupt.SIGNALS)
        started.append((argv, os.environ["GLIBC_TUNABLES"], held >= {*interrupt.SIGNALS}))

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36", raising=False)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(starting, "huge_pages", lambda on: None)  # of this process
    monkeypatch.setattr(gc, "disable", lambda: None)
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("GLIBC_TUNABLES", given)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    starting.begin()
    assert started == ([([sys.executable, "-X", AGAIN, *words], set_to, True)] if set_to else [])
    monkeypatch.setattr(sys, "_xoptions", {AGAIN: True})  # also where something around Python has emptied the environment
    monkeypatch.delenv("GLIBC_TUNABLES")
    starting.begin()
    assert len(started) == bool(set_to)


@pytest.mark.parametrize("program", [None, ""])
def test_where_python_cannot_tell_its_program_nothing_starts_over(program, monkeypatch):
    monkeypatch.setattr(sys, "executable", program)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "golf_jax.train"])
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(starting, "huge_pages", lambda on: None)  # of this process
    monkeypatch.setattr(gc, "disable", lambda: None)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    starting.begin()
    assert "GLIBC_TUNABLES" not in os.environ and not signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="needs glibc")
def test_a_command_starts_over_before_it_imports_anything():
    """The first start costs what an empty Python does."""
    shown = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    shown.pop("GLIBC_TUNABLES", None)
    done = subprocess.run([sys.executable, "-m", "golf_jax.train", "--help"], env=shown, capture_output=True, text=True)
    loaded = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert done.returncode == 0 and loaded.count("golf_jax.starting") == 2 and loaded.count("tyro") == 1, done.stderr[-500:]


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="needs glibc")
@pytest.mark.parametrize(("tunables", "kept"), [(TUNABLES, True), ("glibc.malloc.hugetlb=1", False)])
def test_a_freed_block_of_a_thread_stays_with_the_process(tunables, kept):
    """A block of 48 MB, as a step's temporaries, taken and given back by one thread: its second life maps no page."""
    code = """if True:
        import ctypes, resource, threading
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        def work():
            for _ in range(2):
                before, block = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, libc.malloc(48 << 20)
                ctypes.memset(block, 1, 48 << 20)
                libc.free(block)
                print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        thread = threading.Thread(target=work); thread.start(); thread.join()"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"GLIBC_TUNABLES": tunables}, capture_output=True, text=True)
    first, second = map(int, done.stdout.split())
    assert first >= 20 and (second < 5) == kept


@pytest.mark.skipif(sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs Linux and glibc")
@pytest.mark.parametrize(("tunables", "states"), [(TUNABLES, "1 0"), ("glibc.malloc.hugetlb=0", "0 0")])
def test_huge_pages_wait_for_the_steps_and_what_is_free_by_then_may_lie_in_them(tunables, states):
    code = """if True:
        import ctypes
        from golf_jax.starting import huge_pages
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) << 12
        def disabled():
            return libc.prctl(42, 0, 0, 0, 0)
        huge_pages(False)
        first, blocks = disabled(), [libc.malloc(8 << 20) for _ in range(5)]
        for block in blocks:
            ctypes.memset(block, 1, 8 << 20)
            libc.free(block)
        before = resident()
        huge_pages(True)
        print(first, disabled(), (before - resident()) >> 20)"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"GLIBC_TUNABLES": tunables}, capture_output=True, text=True)
    assert done.stdout.startswith(states), done.stderr
    assert tunables != TUNABLES or int(done.stdout.split()[2]) >= 32


def test_nobody_looks_for_cycles_before_the_work_begins_and_then_only_in_what_is_new():
    code = """if True:
        import gc, sys
        sys.orig_argv, sys.argv = [sys.executable, "-X", "golf_jax_keeps_pages", "-m", "golf_jax.train"], ["-m"]
        import golf_jax
        from golf_jax.starting import work_begins
        before = gc.isenabled()
        work_begins()
        frozen = gc.get_freeze_count()
        new = [[] for _ in range(1000)]
        work_begins()
        print(before, gc.isenabled(), frozen > 1000, gc.get_freeze_count() <= frozen)"""
    done = subprocess.run([sys.executable, "-X", AGAIN, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True", "True"], done.stderr


def test_what_only_saving_needs_is_not_loaded_for_the_first_step():
    code = "import golf_jax.pipeline, sys; print(*(name for name in ('orbax', 'matplotlib', 'torch', 'pandas') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [], done.stderr
