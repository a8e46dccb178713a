"""Pure functions of the forward pass. Axis letters: B batch, T time, D width, H query heads, G kv heads, K head dim, F hidden."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp

from golf_jax.kernels import maps

EPS = 1.1920929e-07  # float32 machine epsilon, for every input dtype, as in the records
HASH_PRIMES = (36313, 27191, 51497)


def rms_norm(x: jax.Array, eps: jax.Array | float = EPS) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, no weight; statistics in float32, result in the dtype of x."""
    return times(x, inverse_rms(x, eps))


def inverse_rms(x: jax.Array, eps: jax.Array | float = EPS) -> jax.Array:
    """1 / sqrt(mean(x^2) + eps) over the last axis, which stays as 1, in float32."""
    x32 = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x times a float32 factor, in the dtype of x."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def squared_leaky(u: jax.Array, slope: float) -> jax.Array:
    """(leaky_relu(u))^2."""
    return jnp.square(jnp.where(u > 0, u, slope * u))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def scaled_squared_leaky(u: jax.Array, r: jax.Array, slope: float) -> jax.Array:
    """`squared_leaky` of r u, r > 0 in float32, [..., 1]. The gradients of both are one pass over u, where autodiff makes two."""
    return squared_leaky(u.astype(jnp.float32) * r, slope).astype(u.dtype)


def _scaled_squared_leaky_gradients(slope: float, given: tuple[jax.Array, jax.Array], dh: jax.Array) -> tuple[jax.Array, jax.Array]:
    u, r = given
    u32 = u.astype(jnp.float32)
    du = jnp.where(u32 > 0, 2.0, 2.0 * slope * slope) * u32 * r * r * dh.astype(jnp.float32)
    return du.astype(u.dtype), jnp.sum(du * u32, -1, keepdims=True) / r


scaled_squared_leaky.defvjp(lambda u, r, slope: (scaled_squared_leaky(u, r, slope), (u, r)), _scaled_squared_leaky_gradients)


def linear(x: jax.Array, w_IO: jax.Array | maps.Packed, backend: str = "xla") -> jax.Array:
    """x @ w over the last axis, [..., I] -> [..., O], as one product of two matrices. backend: of attention.

    With [B, T, I] the weight's gradient contracts two axes, for which XLA:CPU copies the activations transposed: forward and backward
    of one map take 1.6 times as long.
    """
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(w_IO, maps.Packed):
        y = maps.linear(flat, w_IO)
    else:
        y = maps.narrowing(flat, w_IO) if backend == "native" else flat @ w_IO
    return y.reshape(*x.shape[:-1], y.shape[-1])


def linears(x: jax.Array, *ws_IO: jax.Array | maps.Packed) -> list[jax.Array]:
    """Several linear maps of one input as one product: x is read once, and its gradient is one product instead of a sum of several."""
    plain = [w for w in ws_IO if not isinstance(w, maps.Packed)]
    if len(plain) < len(ws_IO):  # they have no gradients
        return [linear(x, w) for w in ws_IO]
    ends = list(itertools.accumulate(w.shape[-1] for w in plain))
    return jnp.split(linear(x, jnp.concatenate(plain, -1)), ends[:-1], -1)


def starts(tokens_BT: jax.Array, boundary_token: int) -> jax.Array:
    """Where nothing precedes a token: at the start of a row, and at `boundary_token` (-1: none). bool [B, T]."""
    return (tokens_BT == boundary_token) | (jnp.arange(tokens_BT.shape[1]) == 0)


def first_visible(segments_BT: jax.Array) -> jax.Array:
    """Start of the segment (run of equal ids) that each position lies in: the first key its query sees. int32 [B, T]."""
    position = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    begins = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0
    return jax.lax.cummax(jnp.where(begins, position, 0), axis=1)


def previous(x_BT: jax.Array, start_BT: jax.Array | None) -> jax.Array:
    """The value one position earlier in the row, zero at its start and at `start_BT`. Works on [B, T] and [B, T, D]."""
    pad = [(0, 0), (1, 0)] + [(0, 0)] * (x_BT.ndim - 2)
    shifted = jnp.pad(x_BT, pad)[:, : x_BT.shape[1]]
    if start_BT is None:
        return shifted
    return jnp.where(start_BT.reshape(*start_BT.shape, *[1] * (x_BT.ndim - 2)), jnp.zeros((), x_BT.dtype), shifted)


def bigram_ids(tokens_BT: jax.Array, buckets: int, start_BT: jax.Array | None = None) -> jax.Array:
    """Hash bucket of each (token, previous token); a start (default: of the row) takes the reserved last bucket. int32 [B, T]."""
    t = tokens_BT.astype(jnp.int32)
    start_BT = starts(t, -1) if start_BT is None else start_BT
    ids = ((HASH_PRIMES[0] * t) ^ (HASH_PRIMES[1] * previous(t, start_BT))) % (buckets - 1)
    return jnp.where(start_BT, buckets - 1, ids)


def trigram_ids(tokens_BT: jax.Array, buckets: int, bigram_at_1: bool, start_BT: jax.Array | None = None) -> jax.Array:
    """Hash bucket of each token with its two predecessors. int32 [B, T].

    A start (default: of the row) takes the reserved bucket; the position after it its bigram hash (PR 1182) or the reserved bucket
    too (PR 562).
    """
    t = tokens_BT.astype(jnp.int32)
    start_BT = starts(t, -1) if start_BT is None else start_BT
    one = previous(t, start_BT)
    ids = ((HASH_PRIMES[0] * t) ^ (HASH_PRIMES[1] * one) ^ (HASH_PRIMES[2] * previous(one, start_BT))) % (buckets - 1)
    if not bigram_at_1:  # else the missing predecessor is token 0, which contributes 0 to the XOR: exactly the bigram hash
        start_BT = start_BT | previous(start_BT, start_BT)
    return jnp.where(start_BT, buckets - 1, ids)


def smear(x_BTD: jax.Array, gate_D: jax.Array, start_BT: jax.Array | None) -> jax.Array:
    """SmearGate: (1 - g) x_t + g x_{t-1}, g = sigmoid(gate); a start mixes with zero. Mixes un-smeared neighbours."""
    g_D = jax.nn.sigmoid(gate_D.astype(x_BTD.dtype))
    return (1 - g_D) * x_BTD + g_D * previous(x_BTD, start_BT)


def input_smear(x_BTD: jax.Array, w_W1: jax.Array, strength_1: jax.Array, start_BT: jax.Array | None) -> jax.Array:
    """x_t + lambda * sigmoid(x_t[:W] . w) * x_{t-1}; a start stays as it is. Mixes un-smeared neighbours (PR 2135)."""
    gate_BT1 = jax.nn.sigmoid(linear(x_BTD[..., : w_W1.shape[0]], w_W1.astype(x_BTD.dtype)))
    return x_BTD + strength_1.astype(x_BTD.dtype) * gate_BT1 * previous(x_BTD, start_BT)


def rope_frequencies(dims: int, base: float, bf16: bool) -> jax.Array:
    """Angle per position of each pair of dimensions, float32 [dims/2]; bf16: rounded to bfloat16."""
    inv_freq = 1.0 / (jnp.float32(base) ** (jnp.arange(0, dims, 2, dtype=jnp.float32) / dims))
    return inv_freq.astype(jnp.bfloat16).astype(jnp.float32) if bf16 else inv_freq


def rope_tables(seq_len: int, dims: int, base: float, train_len: int, bf16_frequencies: bool) -> tuple[jax.Array, jax.Array]:
    """cos, sin of shape [T, dims/2], float32. Rows longer than `train_len` (> 0) rescale the base (NTK)."""
    if train_len and seq_len > train_len:
        base = base * (seq_len / train_len) ** (dims / (dims - 2))
    angles = jnp.arange(seq_len, dtype=jnp.float32)[:, None] * rope_frequencies(dims, base, bf16_frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def rope(x_BTHK: jax.Array, cos_TR: jax.Array, sin_TR: jax.Array) -> jax.Array:
    """Half-split rotation by minus the angle of the first 2R dimensions; the rest passes through. Computed in the dtype of x.

    x cos + swapped(x) sin over the whole width: elementwise, so that XLA fuses it with the norm before and the gain after, where
    concatenating the rotated halves would be a pass over memory of its own.
    """
    r, outer = cos_TR.shape[-1], [(0, 0)] * (x_BTHK.ndim - 1)
    rest = x_BTHK.shape[-1] - 2 * r
    swapped = jnp.pad(x_BTHK[..., r : 2 * r], [*outer, (0, r + rest)]) + jnp.pad(x_BTHK[..., :r], [*outer, (r, rest)])
    cos_TK = jnp.concatenate([cos_TR, cos_TR, jnp.ones((len(cos_TR), rest))], -1)
    sin_TK = jnp.concatenate([sin_TR, -sin_TR, jnp.zeros((len(sin_TR), rest))], -1)
    cos, sin = (t[:, None].astype(x_BTHK.dtype) for t in (cos_TK, sin_TK))
    return x_BTHK * cos + swapped * sin
