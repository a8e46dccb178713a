"""Signals: noted where a stage holds them, raised behind it and elsewhere, and the second one ends at once."""

import gc
import signal
import subprocess
import sys
import time

import pytest

from golf_jax.interrupt import SIGNALS, Interrupted, catching


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_where_it_is_held_and_raised_behind_it_or_elsewhere(number):
    before = signal.getsignal(number)
    with catching() as signals:
        with pytest.raises(Interrupted), signals.held():
            signal.raise_signal(number)
            assert signals.number == number
    with pytest.raises(Interrupted) as stop, catching():
        signal.raise_signal(number)
    assert stop.value.status == 128 + number and signal.getsignal(number) is before


def test_the_second_signal_ends_at_once():
    program = """
import signal
from golf_jax.interrupt import catching
with catching() as signals, signals.held():
    signal.raise_signal(signal.SIGTERM)
    print("noted", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("never")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 143 and done.stdout == "noted\n"


def test_a_signal_met_in_a_callback_that_swallows_exceptions_is_not_lost(capfd):
    def callback(phase, info):
        gc.callbacks.remove(callback)
        signal.raise_signal(signal.SIGHUP)

    with pytest.raises(Interrupted) as stop, catching():
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(5)
    assert stop.value.status == 129 and not capfd.readouterr().err
