"""C1 and C2 of legal evaluation as measurements (issue 1017 of the challenge); C3 and C4 are counted by the score book.

The tests run them on every engine; `score` runs `check_model` on a small sample of the real stream.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from golf_jax.kernels.cross_entropy import softcap_cross_entropy
from golf_jax.model import Model, Params, head_softcap, hidden


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


def check_model(model: Model, tokens: np.ndarray, mesh: Mesh, seq_len: int, flips: int = 3, positions: int = 4) -> tuple[bool, float]:
    """C1 and C2 on the first window of `tokens`, on one device, in one program: (causal, largest |logsumexp(log p)|).

    C1: states before each of `flips` flipped tokens are bit-equal; the head acts on one state at a time, so distributions are too.
    C2: at `positions` sampled places every vocabulary entry is scored by the very function that scores the evaluation. What is not
    finite comes back as not causal and NaN.
    """
    config, device = model.config, mesh.local_devices[0]
    params = {name: jax.device_put(np.asarray(value), device) for name, value in model.params.items()}
    window = np.asarray(tokens[: min(seq_len, len(tokens) - 1)], np.int32)
    length, rng = len(window), np.random.default_rng(0)
    at = rng.choice(np.arange(1, length), min(flips, length - 1), replace=False)
    places = rng.choice(length, min(positions, length), replace=False)
    rows = np.tile(window, (len(at) + 1, 1))  # as it is, and with one token flipped
    rows[np.arange(1, len(rows)), at] = (window[at] + 1) % config.vocab_size

    def every_entry(x_D: jax.Array, params: Params) -> jax.Array:
        table_VD = params["tok_emb"].astype(x_D.dtype)
        x_VD = jnp.broadcast_to(x_D, table_VD.shape)
        return softcap_cross_entropy(x_VD, table_VD, jnp.arange(config.vocab_size), softcap=head_softcap(config, params))

    @jax.jit
    def measure(params: Params, rows: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(equal bool [flips, T], nll [places, V]). Row by row: the same operations on every row, so bits can be compared."""
        states = jax.lax.map(lambda x_T: hidden(config, params, x_T[None], looping=model.looping)[0], rows)
        equal = jnp.all(states[:1] == states[1:], -1)
        return equal, jax.lax.map(lambda x_D: every_entry(x_D, params), states[0][places])

    equal, nll_PV = (np.asarray(x) for x in measure(params, *jax.device_put((rows, places.astype(np.int32)), device)))
    causal = all(before[:s].all() and not before[s:].all() for before, s in zip(equal, at, strict=True))
    error = np.abs(np.log(np.exp(-nll_PV.astype(np.float64)).sum(-1)))
    return bool(causal), float(error.max())  # NaN, if there is one
