"""Averages of the weights over training: EMA and SWA, as pure updates inside the compiled step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Tree = dict[str, jax.Array]


class SWAState(NamedTuple):
    total: Tree  # running sum, each leaf in its own dtype, as the records sum (docs/recipes/pr562.md, section 4.8)
    count: jax.Array  # int32 []


def ema_init(params: Tree) -> Tree:
    """float32 copy of the initial weights; no bias correction in any recipe. A real copy: the original is donated."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


class EMAScalars(NamedTuple):
    """float32 scalars; the rate is 1 - decay, taken on the host in float64."""

    decay: Any
    rate: Any

    @classmethod
    def of(cls, decay: float) -> "EMAScalars":
        return cls(np.float32(decay), np.float32(1 - decay))


def ema_update(ema: Tree, params: Tree, scalars: EMAScalars) -> Tree:
    return jax.tree.map(lambda e, p: scalars.decay * e + scalars.rate * p.astype(jnp.float32), ema, params)


def swa_init(params: Tree) -> SWAState:
    return SWAState(jax.tree.map(jnp.zeros_like, params), jnp.zeros([], jnp.int32))


def swa_update(state: SWAState, params: Tree, collect: jax.Array) -> SWAState:
    """Add the weights where `collect` (a traced boolean) holds."""
    total = jax.tree.map(lambda s, p: jnp.where(collect, s + p, s), state.total, params)
    return SWAState(total, state.count + collect.astype(jnp.int32))


def swa_mean(state: SWAState) -> Tree:
    """Mean of the collected weights, in their own dtypes."""
    return jax.tree.map(lambda s: (s / state.count.astype(jnp.float32)).astype(s.dtype), state.total)
