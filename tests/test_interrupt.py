"""Signals: noted where a stage holds them, raised behind it and elsewhere; the second one ends at once, its echo does not."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import golf_jax
from golf_jax import interrupt
from golf_jax.interrupt import SIGNALS, Interrupted, catching


@pytest.fixture(autouse=True)
def _heard():
    """Also where these tests are started with `nohup` or in a shell's background."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_where_it_is_held_and_raised_behind_it_or_elsewhere(number):
    before = signal.getsignal(number)
    with catching() as signals:
        with pytest.raises(Interrupted), signals.held():
            signal.raise_signal(number)
            signal.raise_signal(number)  # `timeout` and schedulers send one notice to the process and to its group
            assert signals.number == number
    with pytest.raises(Interrupted) as stop, catching():
        signal.raise_signal(number)
    assert stop.value.status == 128 + number and signal.getsignal(number) is before


def test_an_error_that_a_signal_was_made_to_is_the_signal():
    """SentencePiece asks Python for the next sentence, and says RuntimeError to whatever comes instead."""
    with pytest.raises(Interrupted) as stop, catching():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted as raised:
            raise RuntimeError("INTERNAL") from raised
    assert stop.value.status == 143
    with pytest.raises(RuntimeError), catching():
        raise RuntimeError


def test_what_the_starter_ignores_is_ignored():
    """`nohup python -m ... &`, and a script's background jobs."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with catching() as signals:
        signal.raise_signal(signal.SIGHUP)
    assert not signals.number and signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


PROGRAM = """
import hashlib, signal, sys, time
from golf_jax import cli, interrupt

def main(argv):
    with interrupt.catching() as signals, signals.held():
        print("here", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[1]))  # C code for seconds or minutes, as a compilation
        print("in order", flush=True)
    print("never")
    return 0

cli.run(main)
"""


@contextmanager
def started(rounds: int) -> Iterator[Any]:
    """That program, which got its first signal."""
    call = [sys.executable, "-c", PROGRAM, str(rounds)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGTERM)
        yield child
        child.kill()


def test_the_second_signal_ends_at_once_also_in_c_code():
    with started(1 << 30) as child:
        assert "the same signal again ends at once" in child.stderr.readline()  # after the time in which an echo may come
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 143 and child.stdout.read() == ""


def test_the_first_signal_ends_in_good_order_however_late_c_code_returns():
    with started(3_000_000) as child:  # 2 s and more
        assert child.wait(60) == 143 and child.stdout.read() == "in order\n"


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["-m", "golf_jax.check"], -signal.SIGINT, ""),
        (["golf-jax", "check"], -signal.SIGINT, ""),
        (["-m", "golf_jax.train"], 130, "interrupted by SIGINT\n"),  # started over, with signals held until it listens
    ],
)
def test_a_command_that_is_still_imported_ends_without_a_traceback(tmp_path, words, status, told):
    (tmp_path / "golf-jax").write_text("from golf_jax.__main__ import main\nmain()\n")  # as an installer writes it
    again = "import sys\nsys.path.remove(os.path.dirname(__file__))\ndel sys.modules['tyro']\nimport tyro\n"
    (tmp_path / "tyro.py").write_text(f"import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n{again}")  # the first that it imports
    path = os.pathsep.join([str(tmp_path), str(Path(golf_jax.__file__).parents[1])])
    call = [sys.executable, *(str(tmp_path / word) if word == "golf-jax" else word for word in words)]
    done = subprocess.run(call, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, told)


def test_every_command_ends_with_the_status_of_its_signal():
    program = "import os, signal; from golf_jax import cli; cli.run(lambda argv: os.kill(os.getpid(), signal.SIGHUP) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (129, "", "interrupted by SIGHUP\n")


def test_a_thread_that_a_library_left_does_not_keep_what_a_signal_ended():
    program = """if True:
        import os, signal, threading
        from golf_jax import cli
        def main(argv):
            threading.Timer(60, print).start()
            os.kill(os.getpid(), signal.SIGTERM)
        cli.run(main, computes=True)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (143, "interrupted by SIGTERM\n")


def test_a_signal_met_in_a_callback_that_swallows_exceptions_is_not_lost(capfd):
    def callback(phase, info):
        gc.callbacks.remove(callback)
        signal.raise_signal(signal.SIGHUP)

    with pytest.raises(Interrupted) as stop, catching():
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(5)
    assert stop.value.status == 129 and "ignored" not in capfd.readouterr().err


def test_a_signal_waits_for_the_end_of_an_import(tmp_path, monkeypatch):
    """Modules of C code that meet an exception while they begin end the process, or print what nobody can read."""
    (tmp_path / "slow_to_load.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\nloaded = True\n")
    (tmp_path / "works_while_loaded.py").write_text(
        "import signal\nfrom golf_jax.interrupt import Interrupted, catching\ntry:\n    with catching():\n"
        "        signal.raise_signal(signal.SIGHUP)\n        late = True\nexcept Interrupted as stop:\n    status = stop.status\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Interrupted) as stop, catching():
        module = importlib.import_module("slow_to_load")
        time.sleep(5)
    assert stop.value.status == 143 and module.loaded
    work = importlib.import_module("works_while_loaded")  # a program that somebody imports is interrupted as any other
    assert work.status == 129 and not hasattr(work, "late")


def test_a_signal_that_is_delivered_once_more_is_no_second_one(monkeypatch):
    """However late the watching thread and the second delivery are, on a machine with much to do."""
    ended = []
    reader, writer = os.pipe()

    def late(thread, number):
        time.sleep(1.2 * interrupt.ECHO_SECONDS)
        os.write(writer, bytes([number]))

    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(signal, "pthread_kill", late)
    signals = interrupt.Signals()
    signals.number = signal.SIGHUP
    signals._swallowed(SimpleNamespace(exc_value=Interrupted(signal.SIGHUP)))
    watcher = threading.Thread(target=signals._watch, args=(reader,))
    watcher.start()
    os.write(writer, bytes([signal.SIGHUP]))
    time.sleep(1.6 * interrupt.ECHO_SECONDS)
    os.close(writer)
    watcher.join()
    assert not ended
