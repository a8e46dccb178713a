"""Muon: momentum orthogonalised by Newton-Schulz, on stacks of matrices (Jordan et al. 2024; the records' variant).

Stacks of equal shape (up to transposition) are joined into one batch, so a step runs a handful of batched matrix products, and the
batch is what is sharded over devices: every device orthogonalises its share of the matrices (the records' Parallel Muon).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
Stacks = dict[str, jax.Array]


def _store(x: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    """x in `dtype`, rounded here and now: XLA may drop a pair of conversions and keep the excess precision."""
    return jax.lax.reduce_precision(x, 8, 7).astype(dtype) if dtype == jnp.bfloat16 else x.astype(dtype)


def newton_schulz(x: jax.Array, steps: int = 5, dtype: jnp.dtype | type = jnp.bfloat16, *, square_first: bool = False) -> jax.Array:
    """Approximate orthogonal factor of each matrix of x [..., m, n], in `dtype`. Zero stays zero.

    In bfloat16 every product is rounded where the records round it, with the coefficients in float32: bit for bit their eager result.
    square_first: c (A A), as PR 1182 has it, instead of (c A) A.
    """
    a, b, c = NS_COEFFICIENTS
    stored = partial(_store, dtype=dtype)
    lift = lambda v: v.astype(jnp.float32)  # noqa: E731

    def matmul(p: jax.Array, q: jax.Array) -> jax.Array:
        # float32 asked for: with a bfloat16 result XLA:CPU converts p and q and does without the processor's bfloat16 instructions.
        return stored(jnp.matmul(p, q, preferred_element_type=jnp.float32))

    x = stored(lift(x))
    norm = stored(jnp.sqrt(jnp.sum(jnp.square(lift(x)), (-2, -1), keepdims=True)))
    x = stored(lift(x) / lift(stored(lift(norm) + 1e-7)))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = matmul(x, x.mT)
        square = stored(c * lift(matmul(gram, gram))) if square_first else matmul(stored(c * lift(gram)), gram)
        polynomial = stored(lift(stored(b * lift(gram))) + lift(square))
        x = stored(lift(stored(a * lift(x))) + lift(matmul(polynomial, x)))
    return x.mT if tall else x


class Member(NamedTuple):
    """One parameter leaf `[L, in, out]` (or `[in, out]`, a stack of one) inside a joined batch."""

    name: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def layers(self) -> int:
        return math.prod(self.shape[:-2])


@dataclass(frozen=True)
class StackLayout:
    """How parameter leaves are joined into batches `[G, small, large]`, G padded to a multiple of `shards`."""

    batches: Mapping[str, tuple[Member, ...]]
    shards: int = 1

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, jnp.dtype], shards: int = 1) -> "StackLayout":
        """Join leaves whose matrices agree up to transposition and whose dtypes agree."""
        batches: dict[str, tuple[Member, ...]] = {}
        for name, shape in shapes.items():
            rows, cols = shape[-2:]
            key = f"{min(rows, cols)}x{max(rows, cols)}_{jnp.dtype(dtypes[name]).name}"
            batches[key] = batches.get(key, ()) + (Member(name, tuple(shape), rows > cols),)
        return cls(batches, shards)

    def padding(self, key: str) -> int:
        """Zero matrices added at the end so that every device gets the same number."""
        return -sum(m.layers for m in self.batches[key]) % self.shards

    def per_matrix(self, key: str, values: Sequence[float | bool], fill: float | bool) -> np.ndarray:
        """One value per leaf spread over the batch's matrices, [G]."""
        pairs = zip(self.batches[key], values, strict=True)
        return np.array([v for m, v in pairs for _ in range(m.layers)] + [fill] * self.padding(key))

    def pack(self, tree: Mapping[str, jax.Array]) -> Stacks:
        packed = {}
        for key, members in self.batches.items():
            parts = [tree[m.name].reshape(m.layers, *m.shape[-2:]) for m in members]
            parts = [p.mT if m.transposed else p for m, p in zip(members, parts, strict=True)]
            pad = jnp.zeros((self.padding(key), *parts[0].shape[1:]), parts[0].dtype)
            packed[key] = jnp.concatenate([*parts, pad])
        return packed

    def unpack(self, packed: Stacks) -> dict[str, jax.Array]:
        tree = {}
        for key, members in self.batches.items():
            start = 0
            for m in members:
                part = packed[key][start : start + m.layers]
                tree[m.name] = (part.mT if m.transposed else part).reshape(m.shape)
                start += m.layers
        return tree


def scale_by_muon(
    layout: StackLayout,
    steps: int = 5,
    dtype: jnp.dtype | type = jnp.bfloat16,
    row_normalize: bool = False,
    axis_name: str | None = None,
    square_first: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Nesterov momentum -> (row normalisation) -> Newton-Schulz -> sqrt(max(1, out/in)), on the batches of `layout`.

    update(batches, state, *, momentum): m <- momentum m + g, u = g + momentum m (undamped, as in the records); returns the
    directions in `dtype`. With `axis_name` the batches and the momentum are this device's share; nothing is communicated here.
    square_first: see `newton_schulz`.
    row_normalize: each output unit's row of u is divided by max(its norm, 1e-7) before Newton-Schulz (MuonEq-R, PR 2005).
    """

    def init(packed: Stacks) -> Stacks:
        return jax.tree.map(jnp.zeros_like, packed)

    def local(key: str, values: np.ndarray, count: int) -> jax.Array:
        if axis_name is None:
            return jnp.asarray(values)
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(values), jax.lax.axis_index(axis_name) * count, count)

    def update(packed: Stacks, state: Stacks, params=None, *, momentum: jax.Array, **_):
        del params
        directions, buffers = {}, {}
        for key, g in packed.items():
            low = state[key].dtype
            g32, old = g.astype(jnp.float32), state[key].astype(jnp.float32)
            m = _store(_store(momentum * old, low).astype(jnp.float32) + g32, low)
            u = _store(g32 + momentum * m.astype(jnp.float32), low)
            members = layout.batches[key]
            if row_normalize:
                # A transposed leaf lies here as [out, in]: its rows are rows; the others are [in, out], their rows are columns.
                rows_last = local(key, layout.per_matrix(key, [m.transposed for m in members], False), g.shape[0])
                u32 = u.astype(jnp.float32)
                by_row, by_col = (jnp.sqrt(jnp.sum(u32 * u32, axis, keepdims=True)) for axis in (-1, -2))
                u = u32 / jnp.maximum(jnp.where(rows_last[:, None, None], by_row, by_col), 1e-7)
            factors = layout.per_matrix(key, [math.sqrt(max(1.0, m.shape[-1] / m.shape[-2])) for m in members], 1.0)
            scale = local(key, factors.astype(np.float32), g.shape[0])[:, None, None]
            orthogonal = newton_schulz(u, steps, dtype, square_first=square_first)
            directions[key] = _store(orthogonal.astype(jnp.float32) * scale, dtype)
            buffers[key] = m
        return directions, buffers

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
