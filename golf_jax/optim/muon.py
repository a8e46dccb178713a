"""Muon: momentum orthogonalised by Newton-Schulz, on stacks of matrices (Jordan et al. 2024; the records' variant).

Stacks of equal shape (up to transposition) are joined into one batch, so a step runs a handful of batched matrix products, and the
batch is what is sharded over devices: every device orthogonalises its share of the matrices (the records' Parallel Muon).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import GroupConfig
from golf_jax.kernels import newton_schulz as kernel
from golf_jax.mesh import ROWS
from golf_jax.optim.rule import Rule, Tree

Coefficients = tuple[tuple[float, float, float], ...]
NS_COEFFICIENTS: Coefficients = ((3.4445, -4.7750, 2.0315),)


def _store(x: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    """x in `dtype`, rounded here and now: XLA may drop a pair of conversions and keep the excess precision."""
    return jax.lax.reduce_precision(x, 8, 7).astype(dtype) if dtype == jnp.bfloat16 else x.astype(dtype)


def newton_schulz(
    x: jax.Array,
    steps: int = 5,
    dtype: jnp.dtype | type = jnp.bfloat16,
    *,
    coefficients: Coefficients = NS_COEFFICIENTS,
    square_first: bool = False,
    backend: str = "xla",
) -> jax.Array:
    """Approximate orthogonal factor of each matrix of x [..., m, n], in `dtype`. Zero stays zero.

    In bfloat16 every product is rounded where the records round it, with the coefficients in float32: bit for bit their eager result.
    coefficients: (a, b, c) of every step, or one for all. square_first: c (A A), as PR 1182 has it, instead of (c A) A.
    backend: of attention; with `native` the steps are one call in C++ where that is faster (`golf_jax.kernels.newton_schulz`), with sums in
    another order.
    """
    stored = partial(_store, dtype=dtype)
    lift = lambda v: v.astype(jnp.float32)  # noqa: E731

    def matmul(p: jax.Array, q: jax.Array) -> jax.Array:
        # float32 asked for: with a bfloat16 result XLA:CPU converts p and q and does without the processor's bfloat16 instructions.
        return stored(jnp.matmul(p, q, preferred_element_type=jnp.float32))

    x = stored(lift(x))
    norm = stored(jnp.sqrt(jnp.sum(jnp.square(lift(x)), (-2, -1), keepdims=True)))
    x = stored(lift(x) / lift(stored(lift(norm) + 1e-7)))
    tall = x.shape[-2] > x.shape[-1]
    turned = lambda v: v.mT if tall else v  # noqa: E731
    x = turned(x)
    of_steps = coefficients * (steps // len(coefficients))
    if of_steps and kernel.runs(backend, x):
        batch = x.reshape(-1, *x.shape[-2:])
        return turned(kernel.steps(batch, jnp.array(of_steps, jnp.float32), square_first=square_first).reshape(x.shape))
    for a, b, c in of_steps:
        gram = matmul(x, x.mT)
        square = stored(c * lift(matmul(gram, gram))) if square_first else matmul(stored(c * lift(gram)), gram)
        polynomial = stored(lift(stored(b * lift(gram))) + lift(square))
        x = stored(lift(stored(a * lift(x))) + lift(matmul(polynomial, x)))
    return turned(x)


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

    def pack(self, tree: Mapping[str, jax.Array]) -> Tree:
        packed = {}
        for key, members in self.batches.items():
            parts = [tree[m.name].reshape(m.layers, *m.shape[-2:]) for m in members]
            parts = [p.mT if m.transposed else p for m, p in zip(members, parts, strict=True)]
            pad = jnp.zeros((self.padding(key), *parts[0].shape[1:]), parts[0].dtype)
            packed[key] = jnp.concatenate([*parts, pad])
        return packed

    def unpack(self, packed: Tree) -> Tree:
        tree = {}
        for key, members in self.batches.items():
            start = 0
            for m in members:
                part = packed[key][start : start + m.layers]
                tree[m.name] = (part.mT if m.transposed else part).reshape(m.shape)
                start += m.layers
        return tree


def muon(group: GroupConfig, params: Mapping[str, Any], numerics: str, shards: int, axis_name: str | None, backend: str) -> Rule:
    """Nesterov momentum -> (row normalisation) -> Newton-Schulz -> sqrt(max(1, out/in)), on joined batches of matrices.

    m <- momentum m + g, u = g + momentum m (undamped, as in the records); its one scalar is the momentum. params: shapes and dtypes.
    numerics `as_run`: Newton-Schulz and the directions in bfloat16. With `axis_name` the batches and the momentum are this device's
    share; nothing is communicated here.
    row_normalize: each output unit's row of u is divided by max(its norm, 1e-7) before Newton-Schulz (MuonEq-R, PR 2005).
    """
    low = jnp.dtype(jnp.bfloat16 if numerics == "as_run" else jnp.float32)
    bf16_momentum = group.bf16_momentum and numerics == "as_run"
    dtypes = {n: jnp.dtype(jnp.bfloat16) if bf16_momentum else jnp.dtype(p.dtype) for n, p in params.items()}
    layout = StackLayout.of({n: p.shape for n, p in params.items()}, dtypes, shards)
    orthogonalize = partial(
        newton_schulz,
        steps=group.newton_schulz_steps,
        dtype=low,
        coefficients=group.newton_schulz_coefficients,
        square_first=group.bf16_momentum,
        backend=backend,
    )

    def pack(tree: Tree) -> Tree:
        return layout.pack({n: x.astype(dtypes[n]) for n, x in tree.items()})

    def init(packed: Tree) -> Tree:
        return jax.tree.map(jnp.zeros_like, packed)

    def local(values: np.ndarray, count: int) -> jax.Array:
        if axis_name is None:
            return jnp.asarray(values)
        return jax.lax.dynamic_slice_in_dim(jnp.asarray(values), jax.lax.axis_index(axis_name) * count, count)

    def update(packed: Tree, state: Tree, momentum: jax.Array) -> tuple[Tree, Tree]:
        directions, buffers = {}, {}
        for key, g in packed.items():
            stored = state[key].dtype
            g32, old = g.astype(jnp.float32), state[key].astype(jnp.float32)
            m = _store(_store(momentum * old, stored).astype(jnp.float32) + g32, stored)
            u = _store(g32 + momentum * m.astype(jnp.float32), stored)
            members = layout.batches[key]
            if group.row_normalize:
                # A transposed leaf lies here as [out, in]: its rows are rows; the others are [in, out], their rows are columns.
                rows_last = local(layout.per_matrix(key, [m.transposed for m in members], False), g.shape[0])
                u32 = u.astype(jnp.float32)
                by_row, by_col = (jnp.sqrt(jnp.sum(u32 * u32, axis, keepdims=True)) for axis in (-1, -2))
                norm = jnp.maximum(jnp.where(rows_last[:, None, None], by_row, by_col), 1e-7)
                u = u32 / _store(norm, stored).astype(jnp.float32)
            factors = layout.per_matrix(key, [math.sqrt(max(1.0, m.shape[-1] / m.shape[-2])) for m in members], 1.0)
            scale = local(factors.astype(np.float32), g.shape[0])[:, None, None]
            directions[key] = _store(orthogonalize(u).astype(jnp.float32) * scale, low)
            buffers[key] = m
        return directions, buffers

    return Rule(ROWS, pack, layout.unpack, init, update)
