"""The training clock: seconds of training alone, as the challenge counts them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from golf_jax.processes import from_main


class TrainingClock:
    """Runs while training runs; compilation, evaluation and checkpoints are pauses. Process 0's reading counts for all."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        self._before, self._since = self.local_seconds, None

    @property
    def local_seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def seconds(self) -> float:
        """Elapsed training seconds, the same number on every process."""
        return float(from_main(repr(self.local_seconds)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()
