"""The network: configuration in, logits out."""

from golf_jax.model.gpt import head_softcap, hidden, logits, nll
from golf_jax.model.model import Model
from golf_jax.model.module import GPT
from golf_jax.model.params import Params, count, from_tensors, init_params, leaves, to_tensors
from golf_jax.model.platforms import choose, resolve
from golf_jax.model.weights import Weights, weights_of

__all__ = [
    "choose",
    "GPT",
    "Model",
    "Params",
    "Weights",
    "count",
    "from_tensors",
    "head_softcap",
    "hidden",
    "init_params",
    "leaves",
    "logits",
    "nll",
    "resolve",
    "to_tensors",
    "weights_of",
]
