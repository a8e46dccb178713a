"""The parent of one of several processes: what it lets through of the runtime's last words, and the status it ends with."""

import signal
import subprocess
import sys
import time

import pytest

WORDS = """
E1130 04:28:30.394862   26470 coordination_service.cc:1520] [19] Shutdown barrier in coordination service has failed:
DEADLINE_EXCEEDED: Barrier timed out. Id: Shutdown::1967272961391119132::0.
# of tasks that reached the barrier: 1/2.
0
 [type.googleapis.com/tensorflow.CoordinationServiceError='']
ours: goes on
E1130 04:29:48.137416   26587 coordination_service.cc:1549] the following tasks are unhealthy (stopped sending heartbeats):
1
The tasks have crashed.
F1130 04:28:30.395164   26487 client.h:80] Terminating process because the JAX distributed service detected fatal errors.
*** Check failure stack trace: ***
""".strip()
CHILD = f"""
import os, signal, sys, time
from golf_jax.supervise import said_all, supervise
if (status := supervise(lambda: "begin anew")) is not None:
    sys.exit(status)
signal.signal(signal.SIGTERM, lambda *_: None)
print("ours: begins", file=sys.stderr, flush=True)
time.sleep({{seconds}})
sys.stderr.write({WORDS!r})
sys.stderr.flush()
os.abort()
"""
# One that has told itself why it ends, before the runtime finds nobody to take leave of.
TOLD = CHILD.replace("sys.stderr.write(", "print('error: a mistake', file=sys.stderr)\nsaid_all(2)\nsys.stderr.write(", 1)


@pytest.mark.parametrize(
    ("term", "status", "told"),
    [
        (False, 3, "error: another process of this job has ended"),
        (True, 143, "interrupted by SIGTERM; "),
    ],
)
def test_the_last_words_of_the_runtime_become_one_line(tmp_path, term, status, told):
    """All lines of them; a process that was asked to end says so, and not that another one has ended."""
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(seconds=3 if term else 0))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    first = process.stderr.readline()
    if term:
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
    rest = process.stderr.read().splitlines()  # not `communicate`: some of it may be in the buffer of that line
    assert process.wait(60) == status and first == "ours: begins\n"
    assert rest[0] == "ours: goes on" and rest[1].startswith(told) and len(rest) == 2
    assert rest[1].endswith("; begin anew")


def test_who_has_told_why_it_ends_says_it_once(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(TOLD.format(seconds=0))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines() == ["ours: begins", "error: a mistake", "ours: goes on"] and done.returncode == 2
