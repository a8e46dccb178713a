"""One of several processes, watched: when another one dies, jax's C++ runtime aborts this one with a stack dump; say it in one line.

The abort happens in a thread of the runtime and cannot be caught in the process itself, so the work runs in a child and the parent
passes on its error stream up to that point, its signals and its exit status.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType

from golf_jax.interrupt import heard

PR_SET_PDEATHSIG = 1
LOST_STATUS = 3
CHILD = "GOLF_JAX_SUPERVISED"
NOISE = re.compile(rb"[EWIF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (coordination|preemption_sync|client\.cc|distributed|service)")
OURS = re.compile(rb"[a-z]|Traceback|\[")  # how a line begins that cannot belong to the error of the runtime before it
FATAL = re.compile(rb"F\d{4} |terminate called after")
SAID = re.compile(rb"\0(\d+)\n")  # what a child tells its parent alone
ANEW = "start all processes again"
LOST = "another process of this job has ended, or the coordinator cannot be reached"


def several_processes() -> bool:
    """Whether the environment says that there are other processes: see `golf_jax.processes.initialize_distributed`."""
    tasks, hosts = os.environ.get("SLURM_STEP_NUM_TASKS", "1"), os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return bool(os.environ.get("JAX_COORDINATOR_ADDRESS")) or tasks != "1" or "," in hosts


def end_with_parent(number: int) -> None:
    """Linux: this process gets the signal `number` when the one that started it has ended, however that was."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def said_all(status: int) -> None:
    """To the parent: this process has told why it ends, with `status`; what the runtime says of it on the way out is no news."""
    if status and os.environ.get(CHILD):
        os.write(2, b"\0%d\n" % status)


def supervise(advice: Callable[[], str]) -> int | None:
    """Run this command line again as a child and return its status; None where this is the child. advice: what to do when one is lost."""
    if os.environ.get(CHILD):
        end_with_parent(signal.SIGKILL)
        return None
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=os.environ | {CHILD: "1"}, stderr=subprocess.PIPE)

    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        asked.append(number)
        child.send_signal(number)

    for number in heard():
        signal.signal(number, forward)
    assert child.stderr is not None
    fatal: list[bytes] = []
    noise, said = False, 0
    for line in child.stderr:
        if mark := SAID.search(line):
            line, said = line[: mark.start()], int(mark[1])
        noise = bool(NOISE.match(line)) or (noise and not OURS.match(line))
        if fatal or FATAL.match(line):
            fatal.append(line)
        elif line and not noise:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
    status = child.wait()
    if not fatal:
        return 128 - status if status < 0 else status
    if said:
        return said
    gone = re.findall(rb"/task:(\d+)", b"".join(fatal))
    which = f"process {int(gone[0])} has ended" if gone else LOST
    if asked:  # it ended first: the others were not there when it took its leave
        print(f"interrupted by {signal.Signals(asked[0]).name}; {advice()}", file=sys.stderr)
        return 128 + asked[0]
    print(f"error: {which}; {advice()}", file=sys.stderr)
    return LOST_STATUS
