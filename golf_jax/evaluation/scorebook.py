"""Books of one evaluation: sums in float64, how often each target was scored, and whether an update had used it before."""

import numpy as np

from golf_jax.config import GolfError
from golf_jax.evaluation.score import Facts, Score, sum_over_processes
from golf_jax.evaluation.stream import Stream
from golf_jax.evaluation.windows import Windows


def scored_positions(windows: Windows, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(target of every window and offset, whether it is scored), both [windows, offsets]."""
    mask = (offsets >= windows.score_from[:, None]) & (offsets < windows.length[:, None])
    return windows.start[:, None] + offsets, mask


class ScoreBook:
    """Accumulates one evaluation of a stream, its sums by chunk.

    `issue` when scores are handed to the device, `update` when training on targets is, `collect` when the scores have come back:
    the first two in the order in which the device executes them, the third whenever convenient.
    """

    def __init__(self, stream: Stream, chunks: int = 1) -> None:
        targets = stream.targets
        self.stream = stream
        self.covered = np.zeros(targets, bool)
        self.used = np.zeros(targets, bool)
        self.sums = np.zeros((chunks, 3))  # nats, tokens, bytes of this process
        self.scores = np.full(targets, np.nan, np.float32) if stream.keep_scores else None
        self.order: list[tuple[str, int, int]] = []
        self.violations = 0
        self.duplicates = 0
        self.updates = 0

    def issue(self, windows: Windows, offsets: np.ndarray) -> None:
        """These scores are computed now, with the weights as they are now."""
        position, mask = scored_positions(windows, offsets)
        position = position[mask]
        self.violations += int(np.count_nonzero(self.used[position]))
        unique = np.unique(position)
        self.duplicates += len(position) - len(unique) + int(np.count_nonzero(self.covered[unique]))
        self.covered[unique] = True
        self._log("score", int(position.min()), int(position.max()) + 1)

    def update(self, start: int, stop: int, steps: int) -> None:
        """The optimizer takes `steps` steps on targets start..stop-1 now."""
        self.update_on(np.arange(start, stop), steps)

    def update_on(self, targets: np.ndarray, steps: int) -> None:
        """The optimizer takes `steps` steps on these targets now."""
        self.used[targets] = True
        self.updates += steps
        self._log("update", int(targets.min(initial=len(self.used))), int(targets.max(initial=-1)) + 1)

    def _log(self, event: str, start: int, stop: int) -> None:
        if self.order and self.order[-1][0] == event:  # one entry per phase, not per batch
            start, stop = min(start, self.order[-1][1]), max(stop, self.order[-1][2])
            self.order.pop()
        self.order.append((event, start, stop))

    def collect(self, chunk: int, windows: Windows, offsets: np.ndarray, nll: np.ndarray) -> None:
        """Add the scores of this process' rows. nll: float32 [windows, offsets]. Raises GolfError for a score that is not finite."""
        position, mask = scored_positions(windows, offsets)
        position, values = position[mask], nll[mask]
        if not np.isfinite(values).all():
            window, offset = np.argwhere(mask & ~np.isfinite(nll))[0]
            start, length, target = windows.start[window], windows.length[window], windows.start[window] + offsets[offset]
            where = f"target {target}, in the window of {length} tokens from {start} on"
            raise GolfError(f"the score of {where}, is {nll[window, offset]}: the weights overflow in this dtype, or diverged")
        counted = self.stream.tables.of_targets(self.stream.tokens, position)
        self.sums[chunk] += values.sum(dtype=np.float64), len(position), counted.sum(dtype=np.int64)
        if self.scores is not None:
            self.scores[position] = values

    def totals(self) -> tuple[Score, np.ndarray]:
        """Score over all processes, and the sums of every chunk [chunks, 3]."""
        sums = sum_over_processes(self.sums)
        nats, tokens, count = sums.sum(axis=0)
        return Score(float(nats), round(tokens), round(count)), sums

    def facts(self) -> Facts:
        return Facts(len(self.covered), int(np.count_nonzero(self.covered)), self.duplicates, self.violations, self.updates)
