"""Progress of long work: how much is done, and when it will be."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping

Log = Callable[[str], None]
SECONDS = 5.0  # of silence at most


def to_screen(line: str) -> None:
    """Print. A screen that is gone (`| head`, a full disk behind it) must not end work whose result goes to a file."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


@contextlib.contextmanager
def patience(log: Log | None, what: str) -> Iterator[None]:
    """Tells `log` after 5 s that `what` goes on: for work that cannot say how far it is."""
    timer = threading.Timer(SECONDS, log or str, (f"{what} ...",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Progress:
    """Tells `log` how far work of `total` parts is, with a projection: first after 1 % or 5 s, then every 5 s.

    Work that will be done within 5 s is not talked about. log: None says nothing. total: 0 where nobody knows. before: seconds taken
    by what came first, once.
    """

    def __init__(self, log: Log | None, label: str, total: int = 0, before: float = 0.0) -> None:
        self.log, self.label, self.total, self.before = log, label, total, before
        self.begin = time.perf_counter()
        self.told = -1.0  # seconds at the last line
        self.early: tuple[float, float] | None = None
        """(share, seconds of all as projected) when 1 % was done."""

    def at(self, done: int) -> None:
        """`done` of the parts are finished."""
        seconds = time.perf_counter() - self.begin
        projected = self.before + seconds * self.total / done if done else 0.0
        if self.total and not self.early and self.total <= 100 * done:
            self.early = done / self.total, projected
        first = self.told < 0 and (seconds >= SECONDS or (100 * done >= self.total and projected >= SECONDS))
        left = done < self.total or not self.total
        if self.log and left and (first or (self.told >= 0 and seconds - self.told >= SECONDS)):
            self.told = seconds
            of, end = (f" of {self.total:,}", f", {projected:.0f} s projected") if self.total else ("", "")
            self.log(f"{self.label} {done:,}{of} in {seconds:.1f} s{end}")


def clock_seconds(seconds: Mapping[str, float]) -> float:
    """What of an evaluation's phases the challenge's clock counts: all but compilation."""
    return sum(value for phase, value in seconds.items() if phase != "compile")
