"""Signals that ask a run to end: the first one in good order, the second one at once."""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PAUSE_SECONDS = 0.05  # before a signal that could not be raised is sent once more
ECHO_SECONDS = 1.0  # `timeout`, schedulers and a parent that passes on what its whole group gets send the same notice twice


class Interrupted(BaseException):
    """A signal asked this process to end. Not an Exception: nothing on the way may take it for a failure of its own."""

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(f"{signal.Signals(number).name}{': ' if advice else ''}{advice}")
        self.status, self.advice = 128 + number, advice
        self.told = False
        """Whether the user has read it already."""


def heard() -> tuple[signal.Signals, ...]:
    """The signals that end this process: not those that who started it (`nohup`, a shell's background) has it ignore."""
    return tuple(number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)


class Signals:
    """What has arrived since `catching` began."""

    def __init__(self) -> None:
        self.number, self.raised = 0, False
        self._held = False
        self._first = 0.0
        self._again = 0  # deliveries to come that are no second notice
        self._postponed = 0
        self.outside: FrameType | None = None
        """Whose `with` began this: what called that is no import of what runs in here."""
        self._hook = sys.unraisablehook

    @contextmanager
    def held(self) -> Iterator[None]:
        """In here a signal is only noted (`number`): who asks decides when to end. One that nobody asked about is raised at the end."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.number:
            raise Interrupted(self.number)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.number:  # how often it came, and when, `_watch` knows: this may run long afterwards
            return
        if not self._held and self._importing(frame):  # a library's C code that meets an exception there may end in a fault of memory
            self._postponed = number
            return
        self.number = number
        if not self._held:
            self.raised = True
            raise Interrupted(number)

    def _importing(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self.outside:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return True
            frame = frame.f_back
        return False

    def _watch(self, pipe: int) -> None:
        """Python's handlers wait until C code returns, which a compilation does after minutes; this thread does not."""
        told = False
        while True:
            if not select.select([pipe], [], [], PAUSE_SECONDS if self._first and not (told and self.number) else None)[0]:
                if self._postponed:
                    again, self._postponed = self._postponed, 0
                    self._again += 1
                    signal.pthread_kill(threading.main_thread().ident or 0, again)
                if not told and time.monotonic() - self._first > ECHO_SECONDS:
                    told = True
                    with suppress(OSError):  # nobody reads there
                        os.write(2, b"ending as soon as what runs allows it, to lose nothing; the same signal again ends at once\n")
            elif not (number := os.read(pipe, 1)):
                break
            elif number[0] in SIGNALS and self._again:
                self._again -= 1
            elif number[0] in SIGNALS:
                self._first = self._first or time.monotonic()
                if time.monotonic() - self._first > ECHO_SECONDS:
                    os._exit(128 + number[0])
        os.close(pipe)

    def _swallowed(self, unraisable: Any) -> None:
        """What Python does with an exception of a finaliser or a callback of its garbage collector: a signal may be met there."""
        if not isinstance(unraisable.exc_value, Interrupted):
            return self._hook(unraisable)
        threading.Thread(target=self._send_again, args=(self.number,), daemon=True).start()
        self.number = 0  # last: what arrives in here would be swallowed, too

    def _send_again(self, number: int) -> None:
        """Once more to the main thread, also out of a sleep, when it has left that callback."""
        while self.number:
            time.sleep(0.01)
        self._again += 1
        signal.pthread_kill(threading.main_thread().ident or 0, number)


@contextmanager
def catching() -> Iterator[Signals]:
    """Signals that end a process raise `Interrupted` in the main thread, or are noted where `held`. Main thread only."""
    signals = Signals()
    signals.outside = sys._getframe(2)  # behind this one and that of contextlib
    before = {number: signal.signal(number, signals._arrived) for number in heard()}
    sys.unraisablehook = signals._swallowed
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=signals._watch, args=(reader,), daemon=True).start()
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # which `cli` held back when it started this process over
        yield signals
    except Exception as error:  # C++ that calls Python makes an error of its own of what is raised there
        if signals.raised:
            raise Interrupted(signals.number) from error
        raise
    finally:
        signal.set_wakeup_fd(previous)
        sys.unraisablehook = signals._hook
        signals.outside = None
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # ends the thread
