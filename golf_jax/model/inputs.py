"""What a network is called with, checked where shapes are known: at trace time it costs nothing in the compiled program."""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from golf_jax.config import GolfError, ModelConfig
from golf_jax.model.params import Params, leaves


def check_tokens(config: ModelConfig, tokens: Any) -> jax.Array:
    """tokens as an integer array [batch, time]. Ids are compared with the vocabulary unless they are traced. Raises GolfError."""
    if not isinstance(tokens, jax.Array):
        tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        fix = "; add the batch axis: tokens[None]" if tokens.ndim == 1 else ""
        raise GolfError(f"tokens must be [batch, time], got shape {tokens.shape}{fix}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise GolfError(f"tokens must be integers, got {tokens.dtype}")
    if not isinstance(tokens, jax.core.Tracer) and tokens.size and getattr(tokens, "is_fully_addressable", True):
        values = np.asarray(tokens)  # on the host: inside a trace even the minimum of a constant would be traced
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= config.vocab_size:
            raise GolfError(f"token {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}")
    return jnp.asarray(tokens)


def check_params(config: ModelConfig, params: Mapping[str, Any]) -> Params:
    """The leaves of the model as JAX arrays (NumPy's cannot be indexed by traced tokens). Raises GolfError naming the leaf that is
    missing, unknown or of another shape."""
    table = leaves(config)
    for name in params:
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            raise GolfError(f"params: unknown leaf {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    for name, leaf in table.items():
        if name not in params:
            raise GolfError(f"params: leaf {name!r} is missing; this model has {', '.join(table)}")
        if np.shape(params[name]) != leaf.shape:
            raise GolfError(f"params: leaf {name!r} has shape {np.shape(params[name])}, the model configuration needs {leaf.shape}")
    return {name: jnp.asarray(params[name]) for name in table}
