"""Exclusive self attention (XSA): remove from each head's output its component along the token's own value.

    u = v / max(|v|, 1e-12),   y = o - (o . u) u        (v: same position, the kv head of the query head's group)

Parameter Golf PRs 372, 562, 638 and 1182 (their `_xsa_efficient`). All arithmetic is fp32.
"""

import jax
import jax.numpy as jnp

EPS = 1e-12  # as torch.nn.functional.normalize


def _unit(v_BTGK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u [B,T,G,K] and 1/max(|v|, EPS) [B,T,G,1], fp32; finite, and u = 0, where v = 0."""
    v = v_BTGK.astype(jnp.float32)
    inverse_norm = jax.lax.rsqrt(jnp.maximum(jnp.sum(v * v, -1, keepdims=True), EPS * EPS))
    return v * inverse_norm, inverse_norm


def _grouped(x_BTHK: jax.Array, groups: int) -> jax.Array:
    """[B,T,H,K] -> fp32 [B,T,G,H//G,K]: query head h reads kv head h // (H//G)."""
    B, T, H, K = x_BTHK.shape
    return x_BTHK.astype(jnp.float32).reshape(B, T, groups, H // groups, K)


def _dot(x_BTGRK: jax.Array, u_BTGK: jax.Array) -> jax.Array:
    """x . u of every head, fp32 [B,T,G,R]. Contractions, here and below: XLA:CPU needs a tenth of the time it takes to sum a broadcast
    product; XLA:GPU makes the same kernel of both."""
    return jnp.einsum("btgrk,btgk->btgr", x_BTGRK, u_BTGK, precision=jax.lax.Precision.HIGHEST)


def _sum_heads(weights_BTGR: jax.Array, x_BTGRK: jax.Array) -> jax.Array:
    """Weighted sum over the heads of a group, fp32 [B,T,G,K]."""
    return jnp.einsum("btgr,btgrk->btgk", weights_BTGR, x_BTGRK, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def exclude_self_value(o_BTHK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    """y = o - (o.u) u per head, in fp32, rounded once to v's dtype.

    o may be the un-rounded fp32 attention output. Saves y, v and the scalars o.u [B,T,G,R] fp32, never o:
    with a = dy.u the gradients are do = dy - a u and, because y = P o and do = P dy for the projector
    P = 1 - u u^T, dv = -sum over the group's heads (a y + (o.u) do) / |v|. Both are finite, dv = 0, at v = 0.
    """
    return _forward(o_BTHK, v_BTGK)[0]


def _forward(o_BTHK, v_BTGK):
    u, _ = _unit(v_BTGK)
    o = _grouped(o_BTHK, v_BTGK.shape[2])
    c_BTGR = _dot(o, u)
    y_BTHK = (o - c_BTGR[..., None] * u[:, :, :, None]).astype(v_BTGK.dtype).reshape(o_BTHK.shape)
    # A zero-size array carries o's dtype: residuals must be arrays.
    return y_BTHK, (y_BTHK, v_BTGK, c_BTGR, jnp.zeros((0,), o_BTHK.dtype))


def _backward(residuals, dy_BTHK):
    y_BTHK, v_BTGK, c_BTGR, o_dtype = residuals
    u, inverse_norm = _unit(v_BTGK)
    dy, y = (_grouped(x, v_BTGK.shape[2]) for x in (dy_BTHK, y_BTHK))
    a_BTGR = _dot(dy, u)
    do = dy - a_BTGR[..., None] * u[:, :, :, None]
    dv = -(_sum_heads(a_BTGR, y) + _sum_heads(c_BTGR, do)) * inverse_norm
    return do.reshape(y_BTHK.shape).astype(o_dtype.dtype), dv.astype(v_BTGK.dtype)


exclude_self_value.defvjp(_forward, _backward)
