"""Which targets each recipe scores: lists of windows over a validation stream, as arrays.

A stream of `targets + 1` tokens has targets 0..targets-1; target p is token p + 1, predicted from token p and those before it in its
window. A window reads tokens start..start+length-1 and scores its targets from `score_from` (an offset) on. Positions, hashes and
smearing start anew in every window.
"""

from dataclasses import dataclass

import numpy as np

from golf_jax.config import GolfError


@dataclass(frozen=True)
class Windows:
    """Columns of a window list, int64 [windows] each."""

    start: np.ndarray
    length: np.ndarray
    score_from: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: np.ndarray | slice) -> "Windows":
        return Windows(self.start[index], self.length[index], self.score_from[index])


def truncate(tokens: np.ndarray, seq_len: int, max_targets: int = 0) -> np.ndarray:
    """The part of a validation stream that is scored: a whole number of rows of `seq_len` targets, plus the first input.

    max_targets: at most about this many (but one row at least); 0: all. Raises GolfError if there is not one whole row.
    """
    targets = len(tokens) - 1
    if max_targets:
        targets = min(targets, max(max_targets, seq_len))
    rows = targets // seq_len
    if rows < 1:
        raise GolfError(f"{len(tokens)} validation tokens do not fill one row of {seq_len} targets; lower seq_len or add data")
    return tokens[: rows * seq_len + 1]


def standard_windows(targets: int, seq_len: int) -> Windows:
    """Rows of `seq_len`, side by side, scored in full; an incomplete row at the end is left out."""
    start = np.arange(targets // seq_len, dtype=np.int64) * seq_len
    return Windows(start, np.full_like(start, seq_len), np.zeros_like(start))


def sliding_windows(rule: str, targets: int, seq_len: int, stride: int) -> Windows:
    """The window list of a recipe (`SlidingConfig.windows`; docs/recipes/, section 6 of each).

    pr372: full windows only, last `stride` targets of each, also of the first; leaves out one full window at the end.
    tail (PRs 638, 1182): every start with a target; windows cut by the end score the last `stride` targets again.
    tail_min (PR 562; score-first of PR 1182): the same without windows shorter than `stride`.
    exact (PR 2005): every target once.
    """
    if rule == "pr372":
        start = np.arange(max(targets + 1 - seq_len, 0) // stride, dtype=np.int64) * stride
        return Windows(start, np.full_like(start, seq_len), np.full_like(start, seq_len - stride))
    start = np.arange(0, targets, stride, dtype=np.int64)
    length = np.minimum(seq_len, targets - start)
    if rule == "exact":
        keep = (start + seq_len - stride < targets) | (start == 0)
        score_from = np.full_like(start, seq_len - stride)
    elif rule in ("tail", "tail_min"):
        keep = (length >= stride) | (start == 0) | (rule == "tail")
        score_from = np.maximum(length - stride, 0)
    else:
        raise GolfError(f"windows {rule!r} is not one of pr372, tail, tail_min, exact")
    score_from[0] = 0
    return Windows(start, length, score_from)[keep]


def chunk_windows(rule: str, targets: int, seq_len: int, stride: int, chunk_tokens: int) -> tuple[Windows, np.ndarray]:
    """Windows of score-first test-time training, and the chunk of each: that of its first scored target, at most the last."""
    windows = sliding_windows(rule, targets, seq_len, stride)
    chunks = -(-targets // chunk_tokens)
    return windows, np.minimum((windows.start + windows.score_from) // chunk_tokens, chunks - 1)
