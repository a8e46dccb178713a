"""Pure functions of the forward pass. Axis letters: B batch, T time, D width, H query heads, G kv heads, K head dim, F hidden."""

import itertools

import jax
import jax.numpy as jnp

EPS = 1.1920929e-07  # float32 machine epsilon, for every input dtype, as in the records
HASH_PRIMES = (36313, 27191, 51497)


def rms_norm(x: jax.Array) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) over the last axis, no weight; statistics in float32, result in the dtype of x."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + EPS)).astype(x.dtype)


def linear(x: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x @ w over the last axis, [..., I] -> [..., O], as one product of two matrices.

    With [B, T, I] the weight's gradient contracts two axes, for which XLA:CPU copies the activations transposed: forward and backward
    of one map take 1.6 times as long.
    """
    return (x.reshape(-1, x.shape[-1]) @ w_IO).reshape(*x.shape[:-1], w_IO.shape[-1])


def linears(x: jax.Array, *ws_IO: jax.Array) -> list[jax.Array]:
    """Several linear maps of one input as one product: x is read once, and its gradient is one product instead of a sum of several."""
    ends = list(itertools.accumulate(w.shape[-1] for w in ws_IO))
    return jnp.split(linear(x, jnp.concatenate(ws_IO, -1)), ends[:-1], -1)


def shift_right(x_BT: jax.Array, by: int = 1) -> jax.Array:
    """The value `by` positions earlier in the row, zero before its start. Works on [B, T] and [B, T, D]."""
    pad = [(0, 0), (by, 0)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, pad)[:, : x_BT.shape[1]]


def bigram_ids(tokens_BT: jax.Array, buckets: int) -> jax.Array:
    """Hash bucket of each (token, previous token); position 0 of a row takes the reserved last bucket. int32 [B, T]."""
    t = tokens_BT.astype(jnp.int32)
    ids = ((HASH_PRIMES[0] * t) ^ (HASH_PRIMES[1] * shift_right(t))) % (buckets - 1)
    return ids.at[:, 0].set(buckets - 1)


def trigram_ids(tokens_BT: jax.Array, buckets: int, bigram_at_1: bool) -> jax.Array:
    """Hash bucket of each token with its two predecessors. int32 [B, T].

    Position 0 takes the reserved bucket; position 1 its bigram hash (PR 1182) or the reserved bucket too (PR 562).
    """
    t = tokens_BT.astype(jnp.int32)
    hashed = (HASH_PRIMES[0] * t) ^ (HASH_PRIMES[1] * shift_right(t)) ^ (HASH_PRIMES[2] * shift_right(t, 2))
    ids = (hashed % (buckets - 1)).at[:, 0].set(buckets - 1)
    if bigram_at_1 or t.shape[1] < 2:
        return ids  # the missing predecessor is token 0, which contributes 0 to the XOR: exactly the bigram hash
    return ids.at[:, 1].set(buckets - 1)


def smear(x_BTD: jax.Array, gate_D: jax.Array) -> jax.Array:
    """SmearGate: (1 - g) x_t + g x_{t-1}, g = sigmoid(gate); the row start mixes with zero. Mixes un-smeared neighbours."""
    g_D = jax.nn.sigmoid(gate_D.astype(x_BTD.dtype))
    return (1 - g_D) * x_BTD + g_D * shift_right(x_BTD)


def rope_tables(seq_len: int, dims: int, base: float, train_len: int, bf16_frequencies: bool) -> tuple[jax.Array, jax.Array]:
    """cos, sin of shape [T, dims/2], float32. Rows longer than `train_len` (> 0) rescale the base (NTK)."""
    if train_len and seq_len > train_len:
        base = base * (seq_len / train_len) ** (dims / (dims - 2))
    inv_freq = 1.0 / (jnp.float32(base) ** (jnp.arange(0, dims, 2, dtype=jnp.float32) / dims))
    if bf16_frequencies:
        inv_freq = inv_freq.astype(jnp.bfloat16).astype(jnp.float32)
    angles = jnp.arange(seq_len, dtype=jnp.float32)[:, None] * inv_freq
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


def unstack(x: jax.Array) -> list[jax.Array]:
    """Layers of a stack. `lax.split`, whose transpose is one concatenation: indexing would add a padded stack per layer."""
    return [p[0] for p in jax.lax.split(x, (1,) * x.shape[0], axis=0)]
