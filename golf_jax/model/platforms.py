"""What a model's `auto` settings become on a platform, and whether what was named runs there."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from golf_jax.config import GolfError, ModelConfig
from golf_jax.kernels import mlp
from golf_jax.kernels.attention import begin, prepare, supported_backends
from golf_jax.processes import say_once


def choose(config: ModelConfig, platform: str, *, documents: bool = False) -> ModelConfig:
    """As `resolve`, without waiting for the compiler that the attention backend may need; it begins."""
    dtype = config.dtype if config.dtype != "auto" else ("float32" if platform == "cpu" else "bfloat16")
    backends = supported_backends(platform, config.head_dim, jnp.dtype(dtype), documents=documents)
    attention = config.attention if config.attention != "auto" else backends[0]
    if attention not in backends:
        here = f"{platform} with head_dim {config.head_dim} in {dtype}{', inside documents' * documents}"
        needs = "; native needs float32, head_dim % 16 == 0 and a C++ compiler (CXX, c++, g++ or clang++)" * (attention == "native")
        raise GolfError(f"model.attention {attention!r} does not run on {here}: choose auto or {', '.join(backends)}{needs}")
    maps = mlp.supported_backends(platform, config.width, config.mlp_dim, jnp.dtype(dtype), attention=attention)
    if config.mlp not in ("auto", *maps):
        here = f"{platform} with width {config.width}, {config.mlp_dim} hidden units, {dtype} and attention {attention}"
        needs = "pallas needs a GPU, bfloat16, multiples of 128 and model.attention pallas"
        raise GolfError(f"model.mlp {config.mlp!r} does not run on {here}: choose auto or {', '.join(maps)}; {needs}")
    begin(attention)
    return replace(config, dtype=dtype, attention=attention, mlp=maps[0] if config.mlp == "auto" else config.mlp)


def resolve(config: ModelConfig, platform: str, *, documents: bool = False) -> ModelConfig:
    """Replace `auto` choices (dtype, backends of attention and MLP) by what the platform (`cpu`, `gpu`, `tpu`) gets.

    documents: attention is to stay inside the documents of a row (`segments_BT` of `hidden`).
    Raises GolfError for a backend that the platform does not have. Where `auto` would be one whose compiler fails, it is `xla`, aloud.
    """
    chosen = choose(config, platform, documents=documents)
    try:
        prepare(chosen.attention)
    except ValueError as e:
        if config.attention != "auto":
            raise GolfError(f"model.attention: {e}; auto and xla need none") from None
        say_once(f"{e}: xla computes attention, more slowly")
        return replace(chosen, attention="xla")
    return chosen


def for_default_platform(config: ModelConfig, documents: bool) -> ModelConfig:
    """What `auto` gets where jax computes by default."""
    unresolved = "auto" in (config.dtype, config.attention)
    return resolve(config, jax.default_backend(), documents=documents) if unresolved else config
