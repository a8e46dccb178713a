"""Exclusive self attention (XSA): remove from each head's output its component along the token's own value.

    u = v / max(|v|, 1e-12),   y = o - (o . u) u        (v: same position, the kv head of the query head's group)

Parameter Golf PRs 372, 562, 638 and 1182 (their `_xsa_efficient`). All arithmetic is fp32.
"""

import jax
import jax.numpy as jnp

EPS = 1e-12  # as torch.nn.functional.normalize


def _unit(v_BTGK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u [B,T,G,1,K] and 1/max(|v|, EPS) [B,T,G,1,1], fp32; finite, and u = 0, where v = 0."""
    v = v_BTGK.astype(jnp.float32)[:, :, :, None]
    inverse_norm = jax.lax.rsqrt(jnp.maximum(jnp.sum(v * v, -1, keepdims=True), EPS * EPS))
    return v * inverse_norm, inverse_norm


def _grouped(x_BTHK: jax.Array, groups: int) -> jax.Array:
    """[B,T,H,K] -> fp32 [B,T,G,H//G,K]: query head h reads kv head h // (H//G)."""
    B, T, H, K = x_BTHK.shape
    return x_BTHK.astype(jnp.float32).reshape(B, T, groups, H // groups, K)


@jax.custom_vjp
def exclude_self_value(o_BTHK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    """y = o - (o.u) u per head, in fp32, rounded once to v's dtype.

    o may be the un-rounded fp32 attention output. Saves y, v and the scalars o.u [B,T,G,R,1] fp32, never o:
    with a = dy.u the gradients are do = dy - a u and, because y = P o and do = P dy for the projector
    P = 1 - u u^T, dv = -sum over the group's heads (a y + (o.u) do) / |v|. Both are finite, dv = 0, at v = 0.
    """
    return _forward(o_BTHK, v_BTGK)[0]


def _forward(o_BTHK, v_BTGK):
    u, _ = _unit(v_BTGK)
    o = _grouped(o_BTHK, v_BTGK.shape[2])
    c = jnp.sum(o * u, -1, keepdims=True)
    y_BTHK = (o - c * u).astype(v_BTGK.dtype).reshape(o_BTHK.shape)
    # A zero-size array carries o's dtype: residuals must be arrays.
    return y_BTHK, (y_BTHK, v_BTGK, c, jnp.zeros((0,), o_BTHK.dtype))


def _backward(residuals, dy_BTHK):
    y_BTHK, v_BTGK, c, o_dtype = residuals
    u, inverse_norm = _unit(v_BTGK)
    dy = _grouped(dy_BTHK, v_BTGK.shape[2])
    a = jnp.sum(dy * u, -1, keepdims=True)
    do = dy - a * u
    dv = -jnp.sum(a * _grouped(y_BTHK, v_BTGK.shape[2]) + c * do, axis=3) * inverse_norm[:, :, :, 0]
    return do.reshape(y_BTHK.shape).astype(o_dtype.dtype), dv.astype(v_BTGK.dtype)


exclude_self_value.defvjp(_forward, _backward)
