"""Fake quantization as a transformation of the parameters, applied before the forward pass (PRs 372, 562, 1182)."""

import math

import jax
import jax.numpy as jnp

from golf_jax.config import ModelConfig
from golf_jax.kernels.fake_quant import RowScheme, fake_quant
from golf_jax.model.params import Params

ATTENTION, MLP, PROJECTIONS = ("q", "k", "v", "o"), ("up", "down"), ("bigram_proj", "trigram_proj", "ve_shared_proj")


def _levels(config: ModelConfig) -> dict[str, int]:
    """Largest code of every leaf that is fake-quantized."""
    c = config.fake_quant
    if c.matrices == "none":
        return {}
    levels = dict.fromkeys(PROJECTIONS, c.attn_levels)
    if c.matrices == "all":
        levels |= dict.fromkeys(ATTENTION, c.attn_levels) | dict.fromkeys(MLP, c.mlp_levels)
    return levels


def fake_quantize(config: ModelConfig, params: Params, strength: jax.Array | float) -> Params:
    """Parameters with matrices rounded to their integer grid, straight-through gradient (identity to the weight).

    strength: 0 leaves them as they are, 1 is full quantization; may be traced, so that late QAT needs no recompilation.
    Rows are output units: the maximum runs over the input axis.
    """
    c = config.fake_quant
    out = dict(params)
    for name, levels in _levels(config).items():
        if name not in params or math.prod(params[name].shape[-2:]) <= c.min_numel:
            continue
        w = params[name]
        absmax_floor = 0.0 if c.scale_floor else 1e-8
        scheme = RowScheme(levels=levels, lowest=-levels - 1, absmax_floor=absmax_floor, scale_floor=c.scale_floor)
        exempt = c.late_k_layers if name == "k" else 0
        if exempt:
            keep = w.shape[0] - exempt
            out[name] = jnp.concatenate([fake_quant(w[:keep], scheme, axis=-2, strength=strength), w[keep:]])
        else:
            out[name] = fake_quant(w, scheme, axis=-2, strength=strength)
    return out
