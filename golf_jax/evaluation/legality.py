"""C1 and C2 of legal evaluation as measurements (issue 1017 of the challenge); C3 and C4 are counted by the score book.

`score` runs `check_model` on a small sample of the real stream.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from golf_jax.ahead import ahead, kept
from golf_jax.config import ModelConfig
from golf_jax.evaluation.queue import BOS
from golf_jax.evaluation.scorer import Shapes, shapes_of
from golf_jax.evaluation.tilt import tilted
from golf_jax.kernels.cross_entropy import softcap_cross_entropy
from golf_jax.model import Model, Params, head_softcap, hidden, weights_of

FLIPS, POSITIONS = 3, 4  # tokens flipped and distributions summed in one window
TILT_FLIPS = 16


@kept(8)
def checking_program(config: ModelConfig, looping: bool, shapes: Shapes, device: Any, flips: int, positions: int, length: int) -> Any:
    """Compiled (params, rows int32 [flips + 1, T], places int32 [positions]) -> (equal bool [flips, T], nll [positions, V]).

    equal: states bit-equal to those of the first row. Row by row: the same operations on every row, so bits can be compared.
    """

    def every_entry(x_D: jax.Array, params: Params) -> jax.Array:
        table_VD = params["tok_emb"].astype(x_D.dtype)
        x_VD = jnp.broadcast_to(x_D, table_VD.shape)
        return softcap_cross_entropy(x_VD, table_VD, jnp.arange(config.vocab_size), softcap=head_softcap(config, params))

    def measure(params: Params, rows: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = weights_of(config, params, packed=True)  # as scoring does
        states = jax.lax.map(lambda x_T: hidden(config, weights, x_T[None], looping=looping)[0], rows)
        equal = jnp.all(states[:1] == states[1:], -1)
        return equal, jax.lax.map(lambda x_D: every_entry(x_D, params), states[0][places])

    here = SingleDeviceSharding(device)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=here) for name, shape, dtype in shapes}
    rows, places = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=here) for shape in ((flips + 1, length), (positions,)))
    return jax.jit(measure).lower(params, rows, places).compile()


def _check_of(model: Model, mesh: Mesh, length: int) -> tuple[Any, ...]:
    """Arguments of `checking_program` for a window of `length` tokens."""
    counts = min(FLIPS, length - 1), min(POSITIONS, length)
    return model.config, model.looping, shapes_of(model.params), mesh.local_devices[0], *counts, length


def check_ahead(model: Model, mesh: Mesh, length: int) -> None:
    """Begin to compile what `check_model` runs. Of the parameters only shapes and dtypes count."""
    ahead(checking_program, *_check_of(model, mesh, length))


def check_model(model: Model, tokens: np.ndarray, mesh: Mesh, seq_len: int) -> tuple[bool, float]:
    """C1 and C2 on the first window of `tokens`, on one device, in one program: (causal, largest |logsumexp(log p)|).

    C1: states before each of `FLIPS` flipped tokens are bit-equal; the head acts on one state at a time, so distributions are too.
    C2: at `POSITIONS` sampled places every vocabulary entry is scored by the very function that scores the evaluation. What is not
    finite comes back as not causal and NaN.
    """
    config, device = model.config, mesh.local_devices[0]
    window = np.asarray(tokens[: min(seq_len, len(tokens) - 1)], np.int32)
    length, rng = len(window), np.random.default_rng(0)
    at = rng.choice(np.arange(1, length), min(FLIPS, length - 1), replace=False)
    places = rng.choice(length, min(POSITIONS, length), replace=False)
    rows = np.tile(window, (len(at) + 1, 1))  # as it is, and with one token flipped
    rows[np.arange(1, len(rows)), at] = (window[at] + 1) % config.vocab_size
    params = {name: np.asarray(value) for name, value in model.params.items()}
    measure = checking_program(*_check_of(model, mesh, length))
    equal, nll_PV = (np.asarray(x) for x in measure(*jax.device_put((params, rows, places.astype(np.int32)), device)))
    causal = all(before[:s].all() and not before[s:].all() for before, s in zip(equal, at, strict=True))
    error = np.abs(np.log(np.exp(-nll_PV.astype(np.float64)).sum(-1)))
    return bool(causal), float(error.max())  # NaN, if there is one


def tilt_breaks_order(hints: Callable[[np.ndarray, np.ndarray], np.ndarray], tokens: np.ndarray, order: np.ndarray) -> int:
    """C1 of a tilt: how many hints change although their target lies before a flipped token in the predictor's order.

    hints: (tokens, order) -> hint of every target; order: the targets in the predictor's order. Tokens are flipped that hints are likely to
    come from: those whose target, hinted elsewhere, is found earliest in the stream, and some at random. At most 262,144 targets of
    the stream are looked at, documents whole.
    """
    limit = 1 << 18
    if len(order) > limit:
        starts = np.flatnonzero(tokens[:limit] == BOS)
        tokens = tokens[: starts[-1] + 1] if len(starts) > 1 else tokens[:limit]
        order = order[order < len(tokens) - 1]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    before, rng = hints(tokens, order), np.random.default_rng(0)
    candidates = [rng.integers(0, len(order), TILT_FLIPS // 2)]
    gated = np.flatnonzero(before >= 0)
    for target in rng.permutation(gated)[: TILT_FLIPS // 2]:
        same = np.flatnonzero(tokens[1:target] == tokens[target])  # where the token before the hinted one stood before
        same = same[tokens[np.minimum(same + 2, len(tokens) - 1)] == before[target]] + 1
        later = same[rank[same] > rank[target]]
        candidates.append((later if len(later) else same)[-1:])
    changed = 0
    for target in np.unique(np.concatenate(candidates)):
        if tokens[target + 1] != BOS:
            other = tokens.copy()
            other[target + 1] = BOS + 1 + int(other[target + 1] == BOS + 1)
            changed += int(np.count_nonzero((hints(other, order) != before) & (rank < rank[target])))
    return changed


def tilt_normalization(boost: float) -> float:
    """C2 of a tilt: largest |ln sum p'| over all entries, for distributions from flat to peaked and every kind of hint."""
    vocab_size = 64
    logits_PV = (
        np.random.default_rng(0).normal(size=(8, vocab_size)).astype(np.float32) * np.geomspace(0.1, 10, 8, dtype=np.float32)[:, None]
    )
    logp_PV = jax.nn.log_softmax(jnp.asarray(logits_PV))
    hint_P = jnp.asarray(np.argsort(logits_PV)[np.arange(8), np.arange(8) * vocab_size // 8])
    hint_logp_P1 = jnp.take_along_axis(logp_PV, hint_P[:, None], 1)
    nll_PV = tilted(-logp_PV, hint_logp_P1, hint_P[:, None], jnp.arange(vocab_size)[None], boost)
    return float(np.abs(np.log(np.exp(-np.asarray(nll_PV, np.float64)).sum(-1))).max())
