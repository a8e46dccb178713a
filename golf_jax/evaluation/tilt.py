"""Token n-gram tilt (PR 2135; docs/recipes/pr2135_quant_eval.md, section 8): which token followed the same context before, and how a
distribution leans towards it.

The record counts in hash tables, one token after the other. Here the same state is read off two sorts, by context and by context with
token: a bucket is a run of equal 64-bit keys, so contexts whose keys collide share one as they do there.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

COEFFICIENTS = np.array(
    [36313, 27191, 51647, 81929, 131071, 196613, 262147, 393241, 524309, 655373, 786433, 917521, 1048583, 1179653, 1310729, 1441801],
    np.uint64,
)
PAIR = np.uint64(1000003)
_PIECE = 1 << 18  # targets per pass: keys stay in the cache


@dataclass(frozen=True)
class Hints:
    """What the state says before each target, [n] each."""

    token: np.ndarray
    """int32: the token that followed the context most often, the earliest to get there; -1: the context is new."""
    prob: np.ndarray
    """float32: its share of the context's occurrences; 0 where there is none."""
    source: np.ndarray
    """int32: the target that made it the most frequent; -1."""

    def gated(self, threshold: float) -> np.ndarray:
        """The hint where its share reaches the threshold (both float32), else -1. int32 [n]."""
        return np.where(self.prob >= np.float32(threshold), self.token, -1)


def hints(targets: np.ndarray, order: int) -> Hints:
    """The hints of a sequence of targets [n], counted in that order; contexts are `order` - 1 tokens (`order` in 2..16).

    The first context is seeded with the first target, as in the record: targets before number `order` - 2 have none.
    """
    n, first = len(targets), order - 2
    token, prob, source = np.full(n, -1, np.int32), np.zeros(n, np.float32), np.full(n, -1, np.int32)
    if n <= first:
        return Hints(token, prob, source)
    targets = np.ascontiguousarray(targets, np.int32)
    context, pair = _keys(targets, order)
    by_pair, starts = _runs(pair)
    count = np.empty(len(pair), np.int32)  # how often the pair has occurred, this time included
    count[by_pair] = np.arange(len(pair), dtype=np.int32) - starts + 1
    del pair, by_pair, starts
    place, starts = _runs(context)  # contexts side by side, each in order of time
    del context
    count = count[place]
    index = np.arange(len(place), dtype=np.int32)
    # The best count is the running maximum of the counts within the context, the best token that of the target that raised it last.
    most = np.maximum.accumulate(starts.astype(np.int64) << 32 | count)
    raised = np.append(True, most[1:] != most[:-1])
    best = np.maximum.accumulate(np.where(raised, index, 0))
    known = index[1:][starts[1:] == starts[:-1]]  # not the first of their context: those before it speak
    before = known - 1
    at, made = place[known] + np.int32(first), place[best[before]] + np.int32(first)
    token[at], source[at] = targets[made], made
    prob[at] = (most[before] & 0xFFFFFFFF).astype(np.float32) / (known - starts[known]).astype(np.float32)
    return Hints(token, prob, source)


def _keys(targets: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys uint64 of the context, and of context and target, of the targets from number `order` - 2 on."""
    seeded, length = np.append(targets[:1], targets), order - 1
    n = len(targets) - order + 2
    context, pair = np.empty(n, np.uint64), np.empty(n, np.uint64)
    for a in range(0, n, _PIECE):
        b = min(a + _PIECE, n)
        x = seeded[a : b + length].astype(np.uint64)
        key = np.zeros(b - a, np.uint64)
        for j in range(length):
            key ^= x[j : j + b - a] * COEFFICIENTS[j]
        context[a:b] = key
        pair[a:b] = key * PAIR ^ x[length:] * COEFFICIENTS[length]
    return context, pair


def _runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order int32 that sorts the keys, equal ones in order of time; start of the run of each sorted place, int32)."""
    order = np.argsort(keys, kind="stable").astype(np.int32)
    keys = keys[order]
    begins = np.append(True, keys[1:] != keys[:-1])
    return order, np.maximum.accumulate(np.where(begins, np.arange(len(keys), dtype=np.int32), 0))


def tilted(nll: jax.Array, hint_logp: jax.Array, hint: jax.Array, target: jax.Array, boost: float) -> jax.Array:
    """Nats of `target` under p'(a) = p(a) exp(boost [a = hint]) / Z, float32; where `hint` is negative, `nll` as it was.

    hint_logp: ln p(hint), above 0 taken for 0. Z = 1 + p(hint) (e^boost - 1), so p' sums to 1 whatever the hint is.
    """
    q = jnp.exp(jnp.minimum(hint_logp, 0.0))
    moved = nll - jnp.float32(boost) * (target == hint) + jnp.log1p(q * jnp.expm1(jnp.float32(boost)))
    return jnp.where(hint >= 0, moved, nll)
