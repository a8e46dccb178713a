"""AdamW's direction with moments stored in the parameter's dtype.

optax.scale_by_adam computes in the dtype of the moments; the records' fused kernel keeps bfloat16 tables with bfloat16 moments but
computes each step in float32 and rounds once when storing, which changes which small updates survive (spec PR 638, 4.3).
"""

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
        t = count.astype(jnp.float32)

        def moment(decay: float, power: int):
            return lambda g, m: decay * m.astype(jnp.float32) + (1 - decay) * g.astype(jnp.float32) ** power

        mu = jax.tree.map(moment(b1, 1), grads, state.mu)
        nu = jax.tree.map(moment(b2, 2), grads, state.nu)
        direction = jax.tree.map(lambda m, v: (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps), mu, nu)
        store = lambda new, old: jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)  # noqa: E731
        return direction, AdamState(count, store(mu, state.mu), store(nu, state.nu))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
