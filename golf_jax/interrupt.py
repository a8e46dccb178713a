"""Signals that ask a run to end: the first one in good order, the second one at once."""

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(BaseException):
    """A signal asked this process to end. Not an Exception: nothing on the way may take it for a failure of its own."""

    def __init__(self, number: int, advice: str = "") -> None:
        super().__init__(f"{signal.Signals(number).name}{': ' if advice else ''}{advice}")
        self.status, self.advice = 128 + number, advice


class Signals:
    """What has arrived since `catching` began."""

    def __init__(self) -> None:
        self.number = 0
        self._held = False
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
        del frame
        if self.number:
            os._exit(128 + number)
        self.number = number
        if not self._held:
            raise Interrupted(number)

    def _swallowed(self, unraisable: Any) -> None:
        """What Python does with an exception of a finaliser or a callback of its garbage collector: a signal may be met there."""
        if isinstance(unraisable.exc_value, Interrupted):  # arrives once more, when that callback is left
            number, self.number = self.number, 0
            threading.Timer(0.01, _thread.interrupt_main, (number,)).start()
        else:
            self._hook(unraisable)


@contextmanager
def catching() -> Iterator[Signals]:
    """Signals that end a process raise `Interrupted` in the main thread, or are noted where `held`."""
    signals = Signals()
    before = {number: signal.signal(number, signals._arrived) for number in SIGNALS}
    sys.unraisablehook = signals._swallowed
    try:
        yield signals
    finally:
        sys.unraisablehook = signals._hook
        for number, handler in before.items():
            signal.signal(number, handler)
