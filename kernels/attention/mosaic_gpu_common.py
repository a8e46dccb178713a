"""What the Mosaic GPU attention kernels share beyond `kernels.mosaic_gpu`: masks, and the projection onto the own value."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from golf_jax.kernels.mosaic_gpu import TILE

LOG2E = math.log2(math.e)
EPS = 1e-12
LOWEST = -1e30  # start of a running maximum: finite, so that a block without any visible key changes nothing


class Documents(NamedTuple):
    """The document mask: the segment of each query, and how far each tile of keys is seen. int32."""

    first: Any
    """[B,T], never decreasing: the first key that a query sees."""
    full: Any
    """[B,tiles]: queries from the tile's own on and before this one see all of its keys, up to their own position."""
    seen: Any
    """[B,tiles]: queries before this one see at least one of its keys."""

    @classmethod
    def of(cls, first_BT: jax.Array) -> "Documents":
        starts = jnp.arange(0, first_BT.shape[1], TILE, dtype=jnp.int32)
        queries = jax.vmap(lambda first, key: jnp.searchsorted(first, key, side="right", method="compare_all"), (0, None))
        return cls(first_BT, *(queries(first_BT, key).astype(jnp.int32) for key in (starts, starts + (TILE - 1))))


def first_keys(documents: Documents | None, batch, tile):
    """First keys that the first and the last query of a tile see."""
    if documents is None:
        return jnp.int32(0), jnp.int32(0)
    return documents.first[batch, tile * TILE], documents.first[batch, tile * TILE + (TILE - 1)]


def num_stages(head_dim: int, blocks: int) -> int:
    """Blocks in flight, within 227 KiB of shared memory."""
    return min(3 if head_dim <= 64 else 2, blocks)


def iota(shape, axis, start):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) + start


def along(x, v):
    """(x . v) / |v|^2 of each row, what x has of v: x - this * v is orthogonal to v. Finite, and x stays as it is, at v = 0."""
    return jnp.sum(x * v, axis=1) / jnp.maximum(jnp.sum(v * v, axis=1), EPS * EPS)
