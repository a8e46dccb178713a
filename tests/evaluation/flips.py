"""C1 of a whole engine, by flipping tokens."""

from collections.abc import Callable, Sequence

import numpy as np


def changed_before_flip(
    scores: Callable[[np.ndarray], np.ndarray],
    tokens: np.ndarray,
    flips: Sequence[int],
    vocab_size: int,
    order: np.ndarray | None = None,
) -> int:
    """C1 of a whole engine: number of scores that change although their target lies before the flipped token.

    scores: tokens [n + 1] -> nll of every target [n]. flips: token indices, one run of the engine each. order: the targets in the order
    in which the engine predicts them (default: as they stand). 0 is legal; raises ValueError if a flip changes nothing at all, since then
    the test proves nothing.
    """
    base, changed = _bits(scores(tokens)), 0
    rank = np.argsort(np.arange(len(base)) if order is None else order)
    for s in flips:
        other = tokens.copy()
        other[s] = (int(other[s]) + 1) % vocab_size
        flipped = _bits(scores(other))
        if np.array_equal(base, flipped):
            raise ValueError(f"flipping token {s} changed no score: the test has no power")
        changed += int(np.count_nonzero((base != flipped) & (rank < (rank[s - 1] if s else 0))))  # target p is token p + 1
    return changed


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)
