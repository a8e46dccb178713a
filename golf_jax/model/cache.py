"""Keys and values that a row has left behind, so that the forward pass computes a row's next positions alone.

Everything else in the network looks at its own position, but for the input: SmearGate mixes in the position before, whose trigram hash
reads two tokens more. So the forward pass gets the new tokens with the `LOOKBACK` before them, embeds all, and goes on with the new ones.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from golf_jax.config import ModelConfig
from golf_jax.kernels.attention.xsa import exclude_self_value

LOOKBACK = 3
Store = list[tuple[jax.Array, jax.Array]]  # keys and values [B, C, G, K] of every executed layer


def empty(config: ModelConfig, batch: int, row_len: int, looping: bool) -> Store:
    """The store of a row of `row_len` positions, none of them known yet, in the activation dtype."""
    shape = (batch, row_len, config.num_kv_heads, config.head_dim)
    return [(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)) for half in config.layer_order(looping) for _ in half]


@dataclass
class Cache:
    """A row of C positions in the middle of a forward pass: `count` new ones at `at` and after, all before them known."""

    store: Store
    """Of each layer; replaced while the pass is traced."""
    at: jax.Array
    """First new position, int32 scalar; at + count <= C."""
    count: int

    @property
    def row_len(self) -> int:
        """C: RoPE is that of a row of this length (PRs 638, 1182 and 2005 rescale it with the length)."""
        return self.store[0][0].shape[1]

    def window(self, row_BC: jax.Array) -> jax.Array:
        """The tokens that the forward pass is to get: the new ones and those that they look back at."""
        length = min(self.count + LOOKBACK, self.row_len)
        return jax.lax.dynamic_slice_in_dim(row_BC, self._begin(length), length, axis=1)

    def _begin(self, length: int) -> jax.Array:
        return jnp.maximum(self.at + self.count - length, 0)

    def new(self, embedded: Any) -> Any:
        """Of arrays [B, window, ...] the new positions."""

        def cut(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, self.at - self._begin(x.shape[1]), self.count, axis=1)

        return jax.tree.map(cut, embedded)

    def turns(self, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Of RoPE's tables [C, R] the rows of the new positions."""
        cos, sin = (jax.lax.dynamic_slice_in_dim(table, self.at, self.count) for table in rope)
        return cos, sin

    def attend(self, step: int, q_BSHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, xsa: bool) -> jax.Array:
        """Attention of the new positions in executed layer `step` to themselves and all before; what `xsa_attention` gives for the row."""
        k_BCGK, v_BCGK = self.store[step]
        k_BCGK = jax.lax.dynamic_update_slice_in_dim(k_BCGK, k_BSGK, self.at, axis=1)
        v_BCGK = jax.lax.dynamic_update_slice_in_dim(v_BCGK, v_BSGK, self.at, axis=1)
        self.store[step] = k_BCGK, v_BCGK
        visible_SC = jnp.arange(self.row_len) <= self.at + jnp.arange(self.count)[:, None]
        y_BSHK = jax.nn.dot_product_attention(q_BSHK, k_BCGK, v_BCGK, mask=visible_SC[None, None])
        return exclude_self_value(y_BSHK, v_BSGK) if xsa else y_BSHK
