"""What a model's `auto` settings become on a platform, and whether what was named runs there."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from golf_jax.config import GolfError, ModelConfig
from golf_jax.kernels.attention import default_backend, prepare, supported_backends


def resolve(config: ModelConfig, platform: str, *, documents: bool = False) -> ModelConfig:
    """Replace `auto` choices (dtype, attention backend) by what the platform (`cpu`, `gpu`, `tpu`) gets.

    documents: attention is to stay inside the documents of a row (`segments_BT` of `hidden`).
    Raises GolfError for a backend that the platform does not have.
    """
    dtype = config.dtype if config.dtype != "auto" else ("float32" if platform == "cpu" else "bfloat16")
    attention = config.attention
    if attention == "auto":
        attention = default_backend(platform, config.head_dim, jnp.dtype(dtype), documents=documents)
    if attention not in (backends := supported_backends(platform, config.head_dim, jnp.dtype(dtype), documents=documents)):
        here = f"{platform} with head_dim {config.head_dim} in {dtype}{', inside documents' * documents}"
        needs = "; native needs float32, head_dim % 16 == 0 and a C++ compiler (CXX, c++, g++ or clang++)" * (attention == "native")
        raise GolfError(f"model.attention {attention!r} does not run on {here}: choose auto or {', '.join(backends)}{needs}")
    try:
        prepare(attention)
    except ValueError as e:
        raise GolfError(f"model.attention: {e}; auto and xla need none") from None
    return replace(config, dtype=dtype, attention=attention)


def for_default_platform(config: ModelConfig, documents: bool) -> ModelConfig:
    """What `auto` gets where jax computes by default."""
    unresolved = "auto" in (config.dtype, config.attention)
    return resolve(config, jax.default_backend(), documents=documents) if unresolved else config
