"""Straight-through fake quantization of matrix rows."""

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


def fake_quant(w: jax.Array, scheme: RowScheme, *, axis: int, strength: jax.Array | float = 1.0) -> jax.Array:
    """w rounded to its row's grid (rows run along `axis`), gradient the identity.

    strength: 0 returns w, 1 the rounded weight; may be traced. Rounding is half to even, as in the records.
    """
    w32 = w.astype(jnp.float32)
    absmax = jnp.maximum(jnp.max(jnp.abs(w32), axis, keepdims=True), scheme.absmax_floor)
    # Behind the barrier the divisor is no constant: XLA would multiply by its reciprocal, an ulp off, and flip a few codes.
    levels = jax.lax.optimization_barrier(jnp.float32(scheme.levels))
    step = jnp.maximum(absmax / levels, scheme.scale_floor)
    rounded = jnp.clip(jnp.round(w32 / step), scheme.lowest, scheme.levels) * step
    return (w32 + strength * jax.lax.stop_gradient(rounded - w32)).astype(w.dtype)
