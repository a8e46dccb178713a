"""AdamW's direction with moments stored in the parameter's dtype.

optax.scale_by_adam computes in the dtype of the moments; the records' fused kernel keeps bfloat16 tables with bfloat16 moments but
computes each step in float32 and rounds once when storing, which changes which small updates survive (docs/recipes/pr638.md, section 4.3).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from golf_jax.mesh import REPLICATED
from golf_jax.optim.rule import Rule


class AdamState(NamedTuple):
    count: jax.Array  # int32 []
    mu: optax.Params
    nu: optax.Params


class AdamScalars(NamedTuple):
    """float32 scalars, derived on the host in float64: in float32, 1 - 0.999 alone would be 5e-5 off."""

    rate1: Any
    """1 - b1."""
    b2: Any
    rate2: Any
    """1 - b2."""
    log1: Any
    """log b1; minus infinity for b1 = 0."""
    log2: Any
    eps: Any

    @classmethod
    def of(cls, b1: float, b2: float, eps: float) -> "AdamScalars":
        log1, log2 = (math.log(b) if b else -math.inf for b in (b1, b2))
        return cls(*map(np.float32, (1 - b1, b2, 1 - b2, log1, log2, eps)))


def init(params: Any) -> AdamState:
    zeros = jax.tree.map(jnp.zeros_like, params)
    return AdamState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))


def update(grads: Any, state: AdamState, scalars: AdamScalars) -> tuple[Any, AdamState]:
    """(mu_hat / (sqrt(nu_hat) + eps) in float32, state); stored moments take the dtype of the parameters."""
    count = state.count + 1
    # 1 - b^t by expm1: 1 - 0.999^t written as it stands loses 2e-5 of itself in float32, and every step is 1e-5 too long.
    t = count.astype(jnp.float32)
    correction1, correction2 = (-jnp.expm1(t * log) for log in (scalars.log1, scalars.log2))

    def first(g: jax.Array, m: jax.Array) -> jax.Array:
        g32, m32 = g.astype(jnp.float32), m.astype(jnp.float32)
        return m32 + scalars.rate1 * (g32 - m32)  # the fused kernel's form: the other one rounds a bfloat16 moment differently

    def second(g: jax.Array, v: jax.Array) -> jax.Array:
        g32 = g.astype(jnp.float32)
        return scalars.b2 * v.astype(jnp.float32) + scalars.rate2 * g32 * g32

    mu = jax.tree.map(first, grads, state.mu)
    nu = jax.tree.map(second, grads, state.nu)
    direction = jax.tree.map(lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + scalars.eps), mu, nu)
    store = lambda new, old: jax.tree.map(lambda n, o: n.astype(o.dtype), new, old)  # noqa: E731
    return direction, AdamState(count, store(mu, state.mu), store(nu, state.nu))


def adam() -> Rule:
    """AdamW's direction leaf by leaf, on every device; its scalars are `AdamScalars`."""
    same = lambda tree: tree  # noqa: E731
    return Rule(REPLICATED, same, same, init, update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """The same with constant settings, as optax has it."""
    scalars = AdamScalars.of(b1, b2, eps)
    return optax.GradientTransformation(init, lambda grads, state, params=None: update(grads, state, scalars))  # pyright: ignore
