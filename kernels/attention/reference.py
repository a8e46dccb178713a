"""Causal grouped-query attention in plain XLA: the reference of every other backend, and the fast path on a CPU."""

import jax
import jax.numpy as jnp

NUM_QUERY_CHUNKS = 4  # causal: chunk i reads only the keys it may see, 5/8 of the square; more chunks compile slower
MIN_QUERY_CHUNK = 64
LARGE = 1 << 20  # scores of one head from which on the kv heads take turns


def causal_attention(
    q_BSHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, first_BS: jax.Array | None = None, longest: int | None = None
) -> jax.Array:
    """Softmax attention with scale 1/sqrt(K), the queries being the last S of T positions; fp32 [B,S,H,K].

    first: the first key that each query sees (None: 0), at most its own position. longest: most keys that a query sees, which makes
    the cost of long packed rows linear.
    Query head h reads kv head h // (H//G). Logits, softmax and sums are fp32; the unnormalised probabilities are
    rounded to q's dtype before they meet v, as FlashAttention does.
    Where a head has LARGE scores, one kv head after the other is computed, and again in the backward pass: its scores stay in the cache
    and those of the other heads need no memory. On 2 CPU cores (B 1, T 2048, 8/4 heads, K 64, fp32; CPU time, in turn with all heads
    at once): forward 0.72, forward and backward 0.86, 45 MB and 75 MB of temporaries instead of 115 and 173. At T 256 it is a third slower.
    Measured on 2 CPU cores, forward + backward: the H//G query heads of a group as extra rows of one matmul are 3x
    faster than a 5-dimensional einsum (B 8, T 256, 4/2 heads, K 32: 7.2 against 21 ms) and 1.5x faster than repeating
    k and v; chunks of queries that skip the keys of the future are 2.1x faster again at T 2048 (B 1, 4/2 heads, K 64:
    74 against 156 ms).
    """
    B, S, H, K = q_BSHK.shape
    T, G = k_BTGK.shape[1:3]
    if first_BS is not None and longest is not None and S == T > 2 * longest:
        return _in_blocks(q_BSHK, k_BTGK, v_BTGK, first_BS, longest)
    heads = H // G
    q_BGRSK = q_BSHK.reshape(B, S, G, heads, K).transpose(0, 2, 3, 1, 4)
    k_BGKT, v_BGKT = k_BTGK.transpose(0, 2, 3, 1), v_BTGK.transpose(0, 2, 3, 1)
    if S * T < LARGE or G == 1:
        o_BGRSK = _in_chunks(q_BGRSK, k_BGKT, v_BGKT, first_BS)
    else:
        one = jax.checkpoint(lambda qkv: _in_chunks(*(x[:, None] for x in qkv), first_BS)[:, 0])  # type: ignore[misc]
        o_GBRSK = jax.lax.map(one, tuple(jnp.moveaxis(x, 1, 0) for x in (q_BGRSK, k_BGKT, v_BGKT)))
        o_BGRSK = jnp.moveaxis(o_GBRSK, 0, 1)
    return o_BGRSK.transpose(0, 3, 1, 2, 4).reshape(B, S, H, K)


def _in_chunks(q_BGRSK: jax.Array, k_BGKT: jax.Array, v_BGKT: jax.Array, first_BS: jax.Array | None) -> jax.Array:
    """Chunks of queries, each with the keys it may see; fp32."""
    S, T = q_BGRSK.shape[3], k_BGKT.shape[3]
    chunk = max(MIN_QUERY_CHUNK, -(-S // NUM_QUERY_CHUNKS))
    outputs = []
    for start in range(0, S, chunk):
        stop = min(start + chunk, S)
        visible = T - S + stop
        first = None if first_BS is None else first_BS[:, start:stop]
        outputs.append(_attend(q_BGRSK[:, :, :, start:stop], k_BGKT[..., :visible], v_BGKT[..., :visible], first))
    return jnp.concatenate(outputs, axis=3)


def _in_blocks(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, first_BT: jax.Array, longest: int) -> jax.Array:
    """Blocks of `longest` queries as a batch, each with the keys of its own block and of the one before."""
    B, T = first_BT.shape
    blocks = -(-T // longest)
    q, k, v, first = (jnp.pad(x, [(0, 0), (0, blocks * longest - T)] + [(0, 0)] * (x.ndim - 2), "edge") for x in
                      (q_BTHK, k_BTGK, v_BTGK, first_BT))  # fmt: skip

    def batch(x):
        return x.reshape(B * blocks, longest, *x.shape[2:])

    def with_previous(x):
        before = jnp.pad(x, ((0, 0), (longest, 0), (0, 0), (0, 0)))[:, : blocks * longest]
        return jnp.concatenate([batch(before), batch(x)], axis=1)

    start = jnp.tile(jnp.arange(-1, blocks - 1, dtype=jnp.int32) * longest, B)[:, None]  # of the first key of each block
    o = causal_attention(batch(q), with_previous(k), with_previous(v), batch(first) - start)
    return o.reshape(B, blocks * longest, *o.shape[2:])[:, :T]


def _attend(q_BGRSK: jax.Array, k_BGKT: jax.Array, v_BGKT: jax.Array, first_BS: jax.Array | None) -> jax.Array:
    """One chunk of queries against all keys up to its last position; fp32.

    Keys and values lie as [K, T], so that their gradients are products [K, S] [S, T]: XLA:CPU is 3 to 5 times slower at [T, S] [S, K].
    """
    B, G, R, S, K = q_BGRSK.shape
    T = k_BGKT.shape[3]
    # Accelerators would otherwise run fp32 matmuls in TF32 or bf16 passes; no effect on bf16 inputs or on a CPU.
    precision = jax.lax.Precision.HIGHEST if q_BGRSK.dtype == jnp.float32 else None
    options = dict(preferred_element_type=jnp.float32, precision=precision)
    logits = jnp.einsum("bgsk,bgkt->bgst", q_BGRSK.reshape(B, G, R * S, K), k_BGKT, **options) * K**-0.5
    logits = logits.reshape(B, G, R, S, T)
    visible = jnp.arange(S)[:, None] + (T - S) >= jnp.arange(T)[None, :]
    if first_BS is not None:
        visible = (visible & (first_BS[..., None] <= jnp.arange(T)))[:, None, None]
    logits = jnp.where(visible, logits, -jnp.inf)  # every row sees at least its own position: no empty row
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True)))
    o = jnp.einsum("bgst,bgkt->bgsk", weights.astype(q_BGRSK.dtype).reshape(B, G, R * S, T), v_BGKT, **options)
    return o.reshape(B, G, R, S, K) / jnp.sum(weights, -1, keepdims=True)
