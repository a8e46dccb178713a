"""AdamW's direction with moments stored in the parameter's dtype.

optax.scale_by_adam computes in the dtype of the moments; the records' fused kernel keeps bfloat16 tables with bfloat16 moments but
computes each step in float32 and rounds once when storing, which changes which small updates survive (spec PR 638, 4.3).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class AdamState(NamedTuple):
    count: jax.Array  # int32 []
    mu: optax.Params
    nu: optax.Params


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """mu_hat / (sqrt(nu_hat) + eps), float32; stored moments take the dtype of the parameters."""

    def init(params) -> AdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(grads, state: AdamState, params=None, **_):
        del params
        count = state.count + 1
        # 1 - b^t by expm1: 1 - 0.999^t written as it stands loses 2e-5 of itself in float32, and every step is 1e-5 too long.
        t = count.astype(jnp.float32)
        correction1, correction2 = (-jnp.expm1(t * math.log(b)) if b else 1.0 for b in (b1, b2))

        def first(g: jax.Array, m: jax.Array) -> jax.Array:
            g32, m32 = g.astype(jnp.float32), m.astype(jnp.float32)
            return m32 + (1 - b1) * (g32 - m32)  # the fused kernel's form: the other one rounds a bfloat16 moment differently

        def second(g: jax.Array, v: jax.Array) -> jax.Array:
            g32 = g.astype(jnp.float32)
            return b2 * v.astype(jnp.float32) + (1 - b2) * g32 * g32

        mu = jax.tree.map(first, grads, state.mu)
        nu = jax.tree.map(second, grads, state.nu)
        direction = jax.tree.map(lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + eps), mu, nu)
        store = lambda new, old: jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)  # noqa: E731
        return direction, AdamState(count, store(mu, state.mu), store(nu, state.nu))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
