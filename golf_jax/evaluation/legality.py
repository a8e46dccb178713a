"""C1 and C2 of legal evaluation as measurements (issue 1017 of the challenge); C3 and C4 are counted by the ledger.

The tests run them on every engine; `golf_jax.evaluate` runs `check_model` on a small sample of the real stream.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from golf_jax.config import ModelConfig
from golf_jax.kernels.cross_entropy import softcap_cross_entropy
from golf_jax.mesh import platform
from golf_jax.model import head_softcap, hidden, resolve


def changed_before_flip(scores: Callable[[np.ndarray], np.ndarray], tokens: np.ndarray, flips: Sequence[int], vocab_size: int) -> int:
    """C1 of a whole engine: number of scores that change although their target lies before the flipped token.

    scores: tokens [n + 1] -> nll of every target [n]. flips: token indices, one run of the engine each. 0 is legal; raises
    ValueError if a flip changes nothing at all, since then the test proves nothing.
    """
    base, changed = _bits(scores(tokens)), 0
    for s in flips:
        other = tokens.copy()
        other[s] = (int(other[s]) + 1) % vocab_size
        flipped = _bits(scores(other))
        if np.array_equal(base, flipped):
            raise ValueError(f"flipping token {s} changed no score: the test has no power")
        changed += int(np.count_nonzero(base[: max(s - 1, 0)] != flipped[: max(s - 1, 0)]))  # target p is token p + 1
    return changed


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def check_model(
    config: ModelConfig, params: dict[str, Any], tokens: np.ndarray, mesh: Mesh, seq_len: int, flips: int = 3, positions: int = 4
) -> tuple[bool, float]:
    """C1 and C2 on the first window of `tokens`, on one device: (causal, largest |logsumexp(log p)|).

    C1: states before each of `flips` flipped tokens are bit-equal; the head acts on one state at a time, so distributions are too.
    C2: at `positions` sampled places every vocabulary entry is scored by the very function that scores the evaluation.
    """
    config = resolve(config, platform(mesh))
    device = mesh.local_devices[0]
    local = {name: jax.device_put(np.asarray(value), device) for name, value in params.items()}
    window = np.asarray(tokens[: min(seq_len, len(tokens) - 1)], np.int32)[None]
    length, rng = window.shape[1], np.random.default_rng(0)
    states = jax.jit(lambda p, x: hidden(config, p, x))

    def run(x: np.ndarray) -> jax.Array:
        return states(local, jax.device_put(x, device))[0]

    base = run(window)
    causal = True
    for s in rng.choice(np.arange(1, length), min(flips, length - 1), replace=False):
        other = window.copy()
        other[0, s] = (other[0, s] + 1) % config.vocab_size
        flipped = run(other)
        causal &= bool(jnp.all(base[:s] == flipped[:s])) and not bool(jnp.all(base[s:] == flipped[s:]))

    @jax.jit
    def every_entry(x_D: jax.Array, table: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(x_D, (config.vocab_size, len(x_D)))
        return softcap_cross_entropy(rows, table.astype(x_D.dtype), jnp.arange(config.vocab_size), softcap=head_softcap(config, local))

    worst = 0.0
    for p in rng.choice(length, min(positions, length), replace=False):
        nll_V = np.asarray(every_entry(base[p], local["tok_emb"]), np.float64)
        worst = max(worst, abs(float(np.log(np.exp(-nll_V).sum()))))
    return causal, worst
