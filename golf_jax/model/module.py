"""The network as a Linen module, around the functions of `golf_jax.model.gpt`."""

from typing import Any

import flax.linen as nn
import jax

from golf_jax.config import ModelConfig
from golf_jax.model.gpt import logits
from golf_jax.model.params import Params, init_params, leaves


class GPT(nn.Module):
    """Linen module of the network: `init(key)` -> {"params": ...}, `apply(variables, tokens)` -> logits, float32 [B, T, V].

    `init` gives what `init_params` gives, `apply` what `logits` gives, bit for bit. Within a larger module Linen's own keys are used.
    """

    config: ModelConfig
    numerics: str = "fp32"
    """`as_run`: the initialisation in the precision of the records' scripts."""

    @nn.nowrap
    def init(self, rngs: jax.Array | dict[str, jax.Array], *_: Any, **__: Any) -> dict[str, Params]:
        """Fresh variables. Example tokens may be given, as Linen has it, and are not needed: every shape is in the config."""
        return {"params": init_params(self.config, rngs["params"] if isinstance(rngs, dict) else rngs, self.numerics)}

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, *, looping: bool = True) -> jax.Array:
        if self.is_initializing():
            for name, leaf in leaves(self.config).items():
                self.param(name, leaf.init, leaf.shape)
        return logits(self.config, dict(self.variables.get("params", {})), tokens_BT, looping=looping)
