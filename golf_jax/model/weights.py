"""What the forward pass makes of the parameters alone: once per call, or once for all calls that leave them as they are."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from golf_jax.config import ModelConfig
from golf_jax.kernels.attention import has_factors
from golf_jax.kernels.maps import packs, unstack
from golf_jax.model.fake_quant import fake_quantize
from golf_jax.model.inputs import check_params
from golf_jax.model.params import Params, leaves

MAPS = ("q", "k", "v", "gate", "o", "up", "down")  # stacks that `linear` reads, which may be packed
LANES = ("lane_post", "lane_resid")  # one array for all layers in the challenge's naming, used per layer


class Weights(NamedTuple):
    """Parameters as the blocks use them; `hidden` and `nll` take it in place of the parameters."""

    whole: Params
    """Leaves that belong to no layer, as they are."""
    layers: list[dict[str, Any]]
    """By physical layer, in the activation dtype; maps may be `Packed`."""


def weights_of(
    config: ModelConfig, params: Params, *, fake_quant: jax.Array | float | None = None, late: bool = True, packed: bool = False
) -> Weights:
    """config: without `auto`. fake_quant: strength, 0 to 1; default is what evaluation uses (`config.fake_quant.in_eval`).

    late: with the scales of attention and MLP in the maps before them, where the attention backend can (`has_factors`).
    packed: without gradients; maps packed where the backend can (`golf_jax.kernels.maps`).
    Raises GolfError for leaves that are not those of the model.
    """
    params = check_params(config, params)
    if fake_quant is None and config.fake_quant.in_eval:
        fake_quant = 1.0
    if fake_quant is not None:
        params = fake_quantize(config, params, fake_quant)
    used = {name: params[name] for name, leaf in leaves(config).items() if leaf.per_layer or name in LANES}
    whole = {name: x for name, x in params.items() if name not in used}
    used = _late_maps(config, used) if late and has_factors(config.attention) else used
    stacks = {}
    for name, x in used.items():
        pack = packed and name in MAPS and packs(config.attention, x)
        stacks[name] = unstack(x.astype(config.dtype), backend=config.attention, packed=pack)
    return Weights(whole, [dict(zip(stacks, layer, strict=True)) for layer in zip(*stacks.values(), strict=True)])


def _late_maps(config: ModelConfig, params: Params) -> Params:
    """The layers' parameters with the scales of attention and MLP in the maps before them, which saves passes over the activations,
    and a gate in the query rows as a map of its own, whose gradient is no part of the queries'."""
    scales = {"o": "attn_scale", "down": "mlp_scale"}
    scaled = {name: params[name] * params[scale][:, None] for name, scale in scales.items()}
    if config.head_gate == "query_rows":
        scaled["q"], scaled["gate"] = jnp.split(params["q"], [config.width], -1)
    return {name: x for name, x in params.items() if name not in scales.values()} | scaled
