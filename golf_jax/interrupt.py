"""Signals that ask a run to end: the first one in good order, the second one at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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


@contextmanager
def catching() -> Iterator[Signals]:
    """Signals that end a process raise `Interrupted` in the main thread, or are noted where `held`."""
    signals = Signals()
    before = {number: signal.signal(number, signals._arrived) for number in SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
