"""The training clock: seconds of training alone, as the challenge counts them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np


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
        """Elapsed training seconds, the same number on every process (a small broadcast when there are several)."""
        if jax.process_count() == 1:
            return self.local_seconds
        from jax.experimental import multihost_utils

        micros = np.asarray(round(self.local_seconds * 1e6), np.int64)
        return float(multihost_utils.broadcast_one_to_all(micros.view(np.int32)).view(np.int64)[0]) / 1e6

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()
