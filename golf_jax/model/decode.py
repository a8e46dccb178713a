"""One token after another: the row's keys and values are kept, so that a token costs one position of the forward pass."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import FakeQuantConfig, GolfError, ModelConfig
from golf_jax.model.cache import Cache, Store, empty
from golf_jax.model.fake_quant import fake_quantize
from golf_jax.model.gpt import logits
from golf_jax.model.inputs import check_tokens
from golf_jax.model.model import Model
from golf_jax.model.params import Params
from golf_jax.options import Sampling

CHUNK = 64  # positions of a prompt that are computed at once


def sample(key: jax.Array, logits_BV: jax.Array, temperature: Any, top_k: Any, top_p: Any) -> jax.Array:
    """One token of each row, int32 [B]. The settings may be traced: another temperature compiles nothing."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, -1)
    z_BV = sorted_BV / jnp.where(temperature > 0, temperature, 1.0)
    p_BV = jax.nn.softmax(z_BV)
    rank = jnp.arange(z_BV.shape[-1])
    likelier_BV = jnp.cumsum(p_BV, -1) - p_BV  # probability of all tokens before: 0 for the first, which is always kept
    kept = (rank < jnp.where(temperature > 0, top_k, 1)) & (likelier_BV < top_p)
    rank_B1 = jax.random.categorical(key, jnp.where(kept, z_BV, -jnp.inf))[:, None]
    return jnp.take_along_axis(order_BV, rank_B1, -1)[:, 0]


def extend(
    config: ModelConfig, params: Params, store: Store, row_BC: jax.Array, at: jax.Array, count: int, looping: bool = True
) -> tuple[jax.Array, Store]:
    """Logits [B, count, V] of the row's positions from `at` on, and the store with them.

    They are those of the whole row's forward pass; the tokens after them are not looked at.
    """
    cache = Cache(list(store), at, count)
    return logits(config, params, cache.window(row_BC), looping=looping, cache=cache), cache.store


class Decoder:
    """The compiled programs of one model for rows of `row_len` positions, which is the length that it was trained at."""

    def __init__(self, model: Model, row_len: int) -> None:
        config, params = model.config, {name: jnp.asarray(value) for name, value in model.params.items()}
        if config.fake_quant.in_eval:  # what every token would repeat is done once
            params = fake_quantize(config, params, 1.0)
            config = replace(config, fake_quant=FakeQuantConfig())
        self.config, self.looping, self.row_len = config, model.looping, row_len
        self._params = {name: value.astype(config.dtype) if value.ndim > 1 else value for name, value in params.items()}

    @cached_property
    def _read(self) -> Any:
        """A piece of the prompt: the store with it, and the logits of its position `wanted`."""

        def read(params: Params, store: Store, row_BC: jax.Array, at: jax.Array, wanted: jax.Array) -> tuple[jax.Array, Store]:
            z_BSV, store = extend(self.config, params, store, row_BC, at, min(CHUNK, self.row_len), self.looping)
            return jax.lax.dynamic_index_in_dim(z_BSV, wanted, 1, keepdims=False), store

        return jax.jit(read, donate_argnames="store")

    @cached_property
    def _step(self) -> Any:
        """Draw the token of position `at` from the logits before it, put it into the row, and compute the logits after it."""

        def step(params: Params, z_BV: jax.Array, store: Store, row_BC: jax.Array, at: jax.Array, key: jax.Array, settings: Any) -> Any:
            token_B = sample(jax.random.fold_in(key, at), z_BV, *settings)
            row_BC = jax.lax.dynamic_update_slice_in_dim(row_BC, token_B[:, None].astype(row_BC.dtype), at, axis=1)
            z_BSV, store = extend(self.config, params, store, row_BC, at, 1, self.looping)
            return token_B, z_BSV[:, 0], store, row_BC

        return jax.jit(step, donate_argnames=("store", "row_BC"))

    def _open(self, tokens: Sequence[int]) -> tuple[jax.Array, Store, jax.Array]:
        """(logits after the last token, store, row) of a row that begins with `tokens`."""
        row = np.zeros((1, self.row_len), np.int32)
        row[0, : len(tokens)] = tokens
        row_BC, store, z_BV = jnp.asarray(row), empty(self.config, 1, self.row_len, self.looping), None
        chunk = min(CHUNK, self.row_len)
        for start in range(0, len(tokens), chunk):
            at = min(start, self.row_len - chunk)  # the last piece of a full row is partly computed twice
            z_BV, store = self._read(self._params, store, row_BC, jnp.int32(at), jnp.int32(len(tokens) - 1 - at))
        assert z_BV is not None
        return z_BV, store, row_BC

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Tokens that follow the prompt, without an end. A full row goes on as a new one that begins with its second half."""
        if not len(prompt):
            raise GolfError("the prompt is empty: begin with the document start, as Model.encode does")
        tokens = [int(t) for t in check_tokens(self.config, [list(prompt)])[0]]
        top_k = sampling.top_k or self.config.vocab_size
        settings = (jnp.float32(sampling.temperature), jnp.int32(top_k), jnp.float32(sampling.top_p))
        key = jax.random.key(sampling.seed)
        for row in range(2**31):
            tokens = tokens if len(tokens) < self.row_len else tokens[-(self.row_len // 2) :]
            z_BV, store, row_BC = self._open(tokens)
            while len(tokens) < self.row_len:
                at, row_key = jnp.int32(len(tokens)), jax.random.fold_in(key, row)
                token_B, z_BV, store, row_BC = self._step(self._params, z_BV, store, row_BC, at, row_key, settings)
                tokens.append(int(token_B[0]))
                yield tokens[-1]
