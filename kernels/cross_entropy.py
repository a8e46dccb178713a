"""Soft-capped language-model head and cross entropy in one differentiable step, without [tokens, vocab] fp32 arrays.

    logits = softcap * tanh(x @ table.T / softcap),   nll = logsumexp(logits) - logits[target]

Plain autodiff keeps several fp32 [N,V] arrays: 8 GB of temporaries at 98,304 tokens and V = 8,192. Here the backward
pass sees only x, table, targets and an fp32 log-sum-exp per token, plus, when the head fits in one piece, the logits
in x's dtype. Larger heads run in pieces of `chunk` tokens whose logits are recomputed in the backward pass.
The softcap bounds the logits, so the log-sum-exp needs no maximum: one pass over [N,V] less. It may be a pair of scalars, one for
logits >= 0 and one for those below (PR 2135).
"""

import functools

import jax
import jax.numpy as jnp

from golf_jax.kernels.maps import weight_gradient

MAX_LOGITS = 2**27  # logits in one piece (512 MiB in fp32): above, `chunk=None` splits the tokens
MAX_SOFTCAP = 80.0  # exp(80) * vocabulary still fits in fp32


Softcap = float | tuple[jax.Array, jax.Array]


def softcap_logits(x_XD: jax.Array, table_VD: jax.Array, *, softcap: Softcap) -> jax.Array:
    """softcap * tanh(x @ table.T / softcap) in fp32 [...,V]; the table is cast to x's dtype, products add up in fp32."""
    return soft_cap(_matmul("...d,vd->...v", x_XD, table_VD.astype(x_XD.dtype)), softcap)


def _side(raw: jax.Array, softcap: Softcap) -> jax.Array | float:
    """The softcap of each logit."""
    return jnp.where(raw >= 0, *(side.astype(jnp.float32) for side in softcap)) if isinstance(softcap, tuple) else softcap


def soft_cap(raw: jax.Array, softcap: Softcap) -> jax.Array:
    """softcap * tanh(raw / softcap), elementwise, with the softcap of its sign."""
    side = _side(raw, softcap)
    return side * jnp.tanh(raw / side)


def softcap_cross_entropy_reference(x_ND, table_VD, targets_N, *, softcap: Softcap) -> jax.Array:
    """What `softcap_cross_entropy` computes, left to autodiff: the reference of the tests."""
    logits_NV = softcap_logits(x_ND, table_VD, softcap=softcap)
    return jax.nn.logsumexp(logits_NV, -1) - jnp.take_along_axis(logits_NV, targets_N[:, None], 1)[:, 0]


def softcap_cross_entropy(
    x_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array, *, softcap: Softcap, chunk: int | None = None
) -> jax.Array:
    """Negative log-likelihood in nats of each target, fp32 [N].

    x [N,D] is the compute dtype; table [V,D] may be fp32 beside a bf16 x: it is cast, and its gradient, accumulated in
    fp32, comes back in its own dtype. `chunk` is the number of tokens per piece; None is one piece up to MAX_LOGITS
    logits and else equal pieces below it. Targets outside [0,V) are not checked. The pieces take strided
    tokens, so an N axis sharded over devices stays sharded within each of them; the table's gradient is then added
    over devices once per piece, or once in all inside `jax.shard_map`.
    Raises ValueError for one softcap outside (0, 80] (two scalars are not checked) or a chunk below 1.
    """
    if not isinstance(softcap, tuple) and not 0 < softcap <= MAX_SOFTCAP:
        raise ValueError(f"softcap must be in (0, {MAX_SOFTCAP:g}], got {softcap}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    tokens, vocab = x_ND.shape[0], table_VD.shape[0]
    pieces = -(-tokens // chunk) if chunk else -(-tokens * vocab // MAX_LOGITS)
    if chunk is None:  # equal pieces need no padding, where a divisor is near
        pieces = next((n for n in range(pieces, 2 * pieces) if tokens % n == 0), pieces)
    sides, one = (softcap, None) if isinstance(softcap, tuple) else (None, softcap)
    return _cross_entropy(x_ND, table_VD, targets_N, sides, one, pieces)


def _matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _nll(x_ND, table_VD, targets_N, softcap):
    """(nll, log-sum-exp, un-capped fp32 logits) of one piece."""
    raw_NV = _matmul("nd,vd->nv", x_ND, table_VD)
    lse_N = jnp.log(jnp.sum(jnp.exp(soft_cap(raw_NV, softcap)), -1))
    target_N = jnp.take_along_axis(raw_NV, targets_N[:, None], 1)[:, 0]
    return lse_N - soft_cap(target_N, softcap), lse_N, raw_NV


def _piece_gradients(x_ND, table_VD, targets_N, lse_N, raw_NV, g_N, softcap):
    """d sum(g * nll) / d x, d table and d softcap (None if it is one number), fp32. One-hot by comparison: a scatter would need its own
    [N,V] array."""
    raw_NV = raw_NV.astype(jnp.float32)
    side = _side(raw_NV, softcap)
    capped = jnp.tanh(raw_NV / side)
    onehot = targets_N[:, None] == jnp.arange(table_VD.shape[0], dtype=targets_N.dtype)[None, :]
    d_capped = (jnp.exp(side * capped - lse_N[:, None]) - onehot) * g_N[:, None]
    d_raw_NV = (d_capped * (1 - capped * capped)).astype(x_ND.dtype)
    d_softcap = None
    if isinstance(softcap, tuple):
        d_side_NV = d_capped * (capped - raw_NV / side * (1 - capped * capped))
        d_softcap = tuple(jnp.sum(jnp.where(mask, d_side_NV, 0)) for mask in (raw_NV >= 0, raw_NV < 0))
    dtable_VD = weight_gradient(d_raw_NV, x_ND, preferred_element_type=jnp.float32)
    return _matmul("nv,vd->nd", d_raw_NV, table_VD), dtable_VD, d_softcap


def _split(array: jax.Array, pieces: int) -> jax.Array:
    """[N,...] -> [pieces, ceil(N/pieces), ...], zero-padded, piece i holding tokens i, i + pieces, ..."""
    pad = -array.shape[0] % pieces
    array = jnp.pad(array, [(0, pad)] + [(0, 0)] * (array.ndim - 1))
    return jnp.moveaxis(array.reshape(-1, pieces, *array.shape[1:]), 1, 0)


def _join(stack: jax.Array, tokens: int) -> jax.Array:
    """The inverse of `_split`."""
    return jnp.moveaxis(stack, 0, 1).reshape(-1, *stack.shape[2:])[:tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(x_ND, table_VD, targets_N, sides, softcap, pieces):
    return _forward(x_ND, table_VD, targets_N, sides, softcap, pieces)[0]


def _forward(x_ND, table_VD, targets_N, sides, softcap, pieces):
    table, softcap = table_VD.astype(x_ND.dtype), sides or softcap
    if pieces == 1:
        nll_N, lse_N, raw_NV = _nll(x_ND, table, targets_N, softcap)
        return nll_N, (x_ND, table_VD, targets_N, sides, lse_N, raw_NV.astype(x_ND.dtype))
    nll, lse = jax.lax.map(lambda piece: _nll(piece[0], table, piece[1], softcap)[:2], (_split(x_ND, pieces), _split(targets_N, pieces)))
    tokens = x_ND.shape[0]
    return _join(nll, tokens), (x_ND, table_VD, targets_N, sides, _join(lse, tokens), None)


def _backward(softcap, pieces, residuals, g_N):
    x_ND, table_VD, targets_N, sides, lse_N, raw_NV = residuals
    table, softcap = table_VD.astype(x_ND.dtype), sides or softcap
    if pieces == 1:
        dx_ND, dtable_VD, dsides = _piece_gradients(x_ND, table, targets_N, lse_N, raw_NV, g_N, softcap)
        return dx_ND.astype(x_ND.dtype), dtable_VD.astype(table_VD.dtype), None, _like(sides, dsides)

    def step(total, piece):
        x, targets, lse, g = piece
        dx, *rest = _piece_gradients(x, table, targets, lse, _matmul("nd,vd->nv", x, table), g, softcap)
        return jax.tree.map(jnp.add, total, tuple(rest)), dx.astype(x.dtype)

    split = tuple(_split(array, pieces) for array in (x_ND, targets_N, lse_N, g_N))
    zeros = jnp.zeros(table_VD.shape, jnp.float32), sides and (jnp.float32(0), jnp.float32(0))
    (dtable_VD, dsides), dx = jax.lax.scan(step, zeros, split)
    return _join(dx, x_ND.shape[0]), dtable_VD.astype(table_VD.dtype), None, _like(sides, dsides)


def _like(sides, gradients):
    """Gradients in the shape and dtype of the softcaps."""
    return sides and tuple(d.astype(s.dtype).reshape(s.shape) for s, d in zip(sides, gradients, strict=True))


_cross_entropy.defvjp(_forward, _backward)
