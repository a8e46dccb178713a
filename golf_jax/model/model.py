"""A model as a value: a network whose `auto` choices are made, and its parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from golf_jax.config import GolfError, ModelConfig
from golf_jax.model.params import leaves, tensor_names
from golf_jax.model.platforms import resolve


@dataclass(frozen=True)
class Model:
    """A network and its parameters. From a file or another platform: `Model.open`."""

    config: ModelConfig
    """Without `auto` (`golf_jax.model.resolve`)."""
    params: dict[str, Any]
    """Any float dtype, on the host or on devices."""
    looping: bool = True
    """Depth recurrence on, as in evaluation; off: the network as it was at the start of training."""

    @classmethod
    def open(cls, config: ModelConfig, params: Mapping[str, Any], platform: str) -> "Model":
        """The model as `platform` (`cpu`, `gpu`, `tpu`) computes it: this is where `auto` is resolved and parameters are looked at.

        Raises GolfError for a parameter that is missing, has another shape, or holds a value that is not finite, and for an attention
        backend that the platform does not have.
        """
        for name, leaf in leaves(config).items():
            if name not in params:
                raise GolfError(f"model: no parameter {name!r} ({leaf.tensor})")
            if np.shape(value := params[name]) != leaf.shape:
                raise GolfError(f"model: parameter {name!r} ({leaf.tensor}) has shape {np.shape(value)}, not {leaf.shape}")
            xp: Any = np if isinstance(value, np.ndarray) else jnp
            if bad := int(xp.sum(~xp.isfinite(value))):
                tensors = [tensor for tensor, (at, _) in tensor_names(config).items() if at == name]  # one per layer of a stack
                first = tensors[int(np.argwhere(~np.isfinite(np.asarray(value, np.float32)))[0][0])] if len(tensors) > 1 else tensors[0]
                raise GolfError(f"model: {bad} of {value.size} values of {name!r} are not finite, in {first} first; it cannot be scored")
        return cls(resolve(config, platform), dict(params))
