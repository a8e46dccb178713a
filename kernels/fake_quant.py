"""Straight-through fake quantization of matrix rows.

PR 372: step = max(|w|max, 1e-8) / levels. PRs 562, 638, 1182: step = max(|w|max / 31, 1/31), codes -32..31.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class RowScheme:
    """Symmetric integer grid of a row: step = max(max(|w|max, absmax_floor) / levels, scale_floor), codes in lowest..levels."""

    levels: int
    lowest: int
    absmax_floor: float = 0.0
    scale_floor: float = 0.0

    def __post_init__(self):
        if self.levels < 1 or self.lowest > 0:
            raise ValueError(f"RowScheme needs levels >= 1 and lowest <= 0, got {self.levels} and {self.lowest}")
        if max(self.absmax_floor, self.scale_floor) <= 0:
            raise ValueError("RowScheme needs absmax_floor or scale_floor above 0: a row of zeros has no step of its own")


def fake_quant(w: jax.Array, scheme: RowScheme, *, axis: int, strength: jax.Array | float = 1.0) -> jax.Array:
    """w rounded to its row's grid (rows run along `axis`), in w's dtype, computed in fp32; gradient the identity.

    strength: 0 returns w, 1 the rounded weight; may be traced. Rounding is half to even, as in the records, and
    the result is evaluated as they do, w + (rounded - w): it may differ from the grid by an ulp.
    """
    w32 = w.astype(jnp.float32)
    fixed = jax.lax.stop_gradient(w32)
    absmax = jnp.maximum(jnp.max(jnp.abs(fixed), axis, keepdims=True), scheme.absmax_floor)
    step = jnp.maximum(_divide(absmax, jnp.float32(scheme.levels)), scheme.scale_floor)
    rounded = jnp.clip(jnp.round(_divide(fixed, step)), scheme.lowest, scheme.levels) * step
    return (w32 + strength * (rounded - fixed)).astype(w.dtype)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, correctly rounded: XLA turns division by a broadcast into multiplication by its reciprocal, which flips a few codes."""
    return a / jax.lax.optimization_barrier(jnp.broadcast_to(b, a.shape))
