"""Processes and what they share: joining a cluster, messages, a CPU as several devices, the cache of compiled programs."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from golf_jax.config import GolfError
from golf_jax.supervise import ANEW, LOST, LOST_STATUS, several_processes

SHUTDOWN_SECONDS = 20  # how long a process that ends waits for the others
WAIT_SECONDS = 300  # for all processes to connect: clusters may start them minutes apart
TELL_EVERY = 20  # seconds of waiting
HEARTBEAT_SECONDS = 45  # without a sign of life a process counts as dead
MESSAGE_MILLISECONDS = 600_000
LOSSES = re.compile("Gloo|peer|coordination|UNAVAILABLE|GetKeyValue.. timed out")  # in what jax raises when another process is gone
MOST_MADE = 256  # devices of a CPU; each costs memory and milliseconds, so that a slip of the keyboard would end the machine
_messages = itertools.count()


def initialize_distributed() -> None:
    """Join the other processes, where the environment says that there are any.

    Either JAX_COORDINATOR_ADDRESS=HOST:PORT with JAX_NUM_PROCESSES and JAX_PROCESS_ID, or a cluster that jax finds out about itself:
    several tasks of one `srun`, several hosts in TPU_WORKER_HOSTNAMES, or JAX_COORDINATOR_ADDRESS=auto (a TPU slice on GCE, Open MPI).
    Must run before the first call that touches a device. A single process is left alone. Raises GolfError for a variable that is
    missing or no number.
    """
    if jax.distributed.is_initialized() or not several_processes():
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    limits: dict[str, Any] = {"shutdown_timeout_seconds": SHUTDOWN_SECONDS, "heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    limits["initialization_timeout"] = WAIT_SECONDS + 60  # `_waiting` ends before, in one line; the runtime aborts with a stack
    if address and address != "auto":
        values = {name: os.environ.get(name, "") for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")}
        for name, value in values.items():
            if not value.isdigit():
                raise GolfError(f"JAX_COORDINATOR_ADDRESS is set and {name} is {value!r}: give JAX_NUM_PROCESSES and JAX_PROCESS_ID")
        count, index = map(int, values.values())
        if index >= count:
            raise GolfError(f"JAX_PROCESS_ID {index} must be below JAX_NUM_PROCESSES {count}")
        with _waiting():
            jax.distributed.initialize(address, count, index, **limits)
    else:
        os.environ.pop("JAX_COORDINATOR_ADDRESS", None)  # jax would take `auto` for a host
        with _waiting():
            jax.distributed.initialize(**limits)


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Says on stderr every `TELL_EVERY` seconds that this process waits for others, and after `WAIT_SECONDS` ends it with status 3."""
    connected, begin = threading.Event(), time.monotonic()

    def tell() -> None:
        while not connected.wait(TELL_EVERY):
            waited, whom = time.monotonic() - begin, _missing()
            if connected.is_set():
                return
            if waited >= WAIT_SECONDS:
                missing = f"error: after {waited:.0f} s not all processes of this job have connected: {whom}"
                print(f"{missing}; look at what the missing ones have said, and {ANEW}", file=sys.stderr, flush=True)
                os._exit(LOST_STATUS)
            print(f"waiting for the other processes, {waited:.0f} of {WAIT_SECONDS} s: {whom}", file=sys.stderr, flush=True)

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        connected.set()


def _missing() -> str:
    """Who has not connected, as far as this process can tell: asking the coordinator before all are there would abort it."""
    state = _distributed()
    address, count, index = state.coordinator_address, state.num_processes, state.process_id
    if not address:
        return "jax has not found the cluster yet"
    this = f"this is process {index} of {count}"
    if index == 0:
        return f"{this}, and one or more of the others have not reached {address} yet"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, ValueError) as error:
        return f"{this}, and process 0 does not answer at {address} yet ({getattr(error, 'strerror', None) or error})"
    return f"{this}, process 0 answers at {address}, and another one has not reached it yet"


@contextlib.contextmanager
def others_alive(advice: Callable[[], str]) -> Iterator[None]:
    """A collective or message that fails because another process is gone, or does not answer for ten minutes, becomes one line and status
    3, without waiting for it at the exit."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if isinstance(error, GolfError) or jax.process_count() == 1 or not LOSSES.search(str(error)):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        print(f"error: {LOST} ({reason}); {advice()}", file=sys.stderr, flush=True)
        os._exit(LOST_STATUS)


def from_main(text: str) -> str:
    """Process 0's `text`, on every process; each must call it equally often. Goes by the coordinator, so no device waits for it."""
    if jax.process_count() == 1:
        return text
    client, key = _coordinator(), f"golf_jax/{next(_messages)}"
    if jax.process_index() == 0:
        client.key_value_set(key, text)
        return text
    return client.blocking_key_value_get(key, MESSAGE_MILLISECONDS)


def from_all(text: str) -> list[str]:
    """The `text` of every process, on every process; waits for all of them, so each must call it equally often."""
    if jax.process_count() == 1:
        return [text]
    client, key = _coordinator(), f"golf_jax/{next(_messages)}"
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    return [client.blocking_key_value_get(f"{key}/{index}", MESSAGE_MILLISECONDS) for index in range(jax.process_count())]


def agreed(number: int, due: bool, trouble: str = "") -> tuple[int, bool, str]:
    """(signal that any process has seen or 0, what process 0 holds to be due, what troubles any of them), the same on every process.

    What another than process 0 says now is heard at the next call at the latest, if no process is a whole call ahead of another.
    """
    if jax.process_count() == 1:
        return number, due, trouble
    client, said = _coordinator(), {"signal": str(number or ""), "trouble": trouble}
    for name, mine in said.items():
        if mine and jax.process_index():
            client.key_value_set(f"golf_jax/{name}", mine, True)
        if not mine and jax.process_index() == 0:
            with contextlib.suppress(Exception):  # nobody has set it
                said[name] = client.key_value_try_get(f"golf_jax/{name}")
    first, second, third = from_main(f"{said['signal'] or 0} {int(due)} {said['trouble']}").split(" ", 2)
    return int(first), second == "1", third


def _coordinator() -> Any:
    """Its key-value store."""
    return _distributed().client


def _distributed() -> Any:
    from jax._src import distributed  # there is no public way to it

    return distributed.global_state


def cache_directory() -> Path:
    """Where commands keep what they make once (the embedded corpus, compiled programs): an existing directory that can be written.

    GOLF_JAX_CACHE, else XDG_CACHE_HOME/golf_jax, else ~/.cache/golf_jax; where that is not possible (read-only home, no passwd
    entry), a private folder among the temporary files, which is said on stderr. GolfError when GOLF_JAX_CACHE cannot be written.
    """
    given, base = os.environ.get("GOLF_JAX_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    place = Path()
    try:
        place = Path(given) if given else (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "golf_jax"
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):  # a read-only file system allows mkdir(exist_ok) of what is there
            return place
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        if given:
            raise GolfError(f"GOLF_JAX_CACHE={given}: cannot be written ({error})") from None
        # Without the name of the file that was tried, which is another each time: `say_once`.
        reason = f"{place}: {error.strerror}" if isinstance(error, OSError) else error
    user = os.getuid() if hasattr(os, "getuid") else "user"
    place = Path(tempfile.gettempdir()) / f"golf_jax-{user}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        if place.is_symlink() or place.stat().st_uid != user:
            raise PermissionError(f"{place} belongs to someone else")
    except OSError as error:
        raise GolfError(f"no place for a cache ({reason}; {error}); set GOLF_JAX_CACHE to a directory") from None
    say_once(f"cache: {place} ({reason}); GOLF_JAX_CACHE names a lasting one")
    return place


@functools.cache
def say_once(line: str) -> None:
    """Print a line on stderr, the first time in this process."""
    print(line, file=sys.stderr)


def keep_compiled_programs(directory: Path | None = None) -> None:
    """A second start finds its compiled programs in the cache, or where JAX_COMPILATION_CACHE_DIR says (jax's own variable).

    Raises GolfError where compiling is switched off.
    """
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        raise GolfError("JAX_DISABLE_JIT is set, and everything here is compiled before it runs; unset it")
    if not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(directory or cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # many small ones are a second, too


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_cpu(asked: int, sequences: int) -> None:
    """Let a CPU show up as several devices, each working on its own sequences: between many small operations one leaves cores idle.

    asked: their number; 0: a power of two that divides `sequences`, at most one per core and 8, as many as the records had. Left alone:
    other platforms, several processes, a number that the environment gives (JAX_NUM_CPU_DEVICES, XLA_FLAGS), a jax already in use.
    """
    given = jax.config.values["jax_num_cpu_devices"] >= 0 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if given or jax.distributed.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # make_mesh says what is missing, also of more than are made
        jax.config.update("jax_num_cpu_devices", min(max(asked, 0), MOST_MADE) or math.gcd(sequences, 8, 1 << cores().bit_length() - 1))


class CompileTimes:
    """How long programs took to compile on this machine, by a text that names them: what `compiling ...` can promise next time."""

    def __init__(self) -> None:
        self._file = cache_directory() / "compile_seconds.json"

    def _read(self) -> dict[str, float]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._file.read_text())
            return found if isinstance(found, dict) else {}
        return {}

    def last(self, key: str) -> str:
        """`, 17 s last time`, or nothing."""
        seconds = self._read().get(_short(key))
        return f", {seconds:.0f} s last time" if isinstance(seconds, int | float) else ""

    def keep(self, key: str, seconds: float) -> None:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs only this line
            self._file.write_text(json.dumps(self._read() | {_short(key): round(seconds, 1)}))


def _short(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]
