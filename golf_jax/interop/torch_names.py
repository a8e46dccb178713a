"""PyTorch state_dicts of the five pull requests <-> our parameters.

Our canonical tensor names (golf_jax.model.params) are the PRs' own, with two exceptions: PR 372 calls the smear gate `smear_gate`, and
PR 1182 keeps its matrices in four banks, `[layers, out, in]`, queries before outputs and keys before values.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from golf_jax.config import GolfError, ModelConfig
from golf_jax.interop.hparams import model_config
from golf_jax.model.params import from_tensors, to_tensors

_BANKS = {
    "qo_bank": ("attn.c_q", "attn.proj"),
    "kv_bank": ("attn.c_k", "attn.c_v"),
    "mlp_up_bank": ("mlp.fc",),
    "mlp_down_bank": ("mlp.proj",),
}


def canonical_names(recipe: str, config: ModelConfig, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A PR's state_dict under canonical names, banks split into one matrix per layer. Raises GolfError for a mis-shaped bank."""
    tensors: dict[str, np.ndarray] = {}
    for name, value in state.items():
        if recipe == "pr372" and name == "smear_gate":
            tensors["smear.gate"] = value
        elif recipe == "pr1182" and name in _BANKS:
            parts, layers = _BANKS[name], config.num_layers
            if value.ndim != 3 or len(value) != len(parts) * layers:
                want = f"({len(parts) * layers}, out, in)"
                raise GolfError(f"tensor {name} has shape {value.shape}, the model configuration needs {want}")
            for j, part in enumerate(parts):
                tensors |= {f"blocks.{i}.{part}.weight": value[j * layers + i] for i in range(layers)}
        else:
            tensors[name] = value
    return tensors


def pr_names(recipe: str, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `canonical_names`: the PR's own names, PR 1182 in banks."""
    state = dict(tensors)
    if recipe == "pr372" and "smear.gate" in state:
        state["smear_gate"] = state.pop("smear.gate")
    if recipe == "pr1182":
        for bank, parts in _BANKS.items():
            names = [f"blocks.{i}.{part}.weight" for part in parts for i in range(config.num_layers)]
            state[bank] = np.stack([state.pop(name) for name in names])
    return state


def from_torch(recipe: str, config: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Model configuration and parameters (host arrays, float32) of a PR's checkpoint.

    recipe: pr372, pr562, pr638, pr1182 or pr2005. config: the PR's hyperparameters under its own names; missing ones take the PR's
    value. state: tensors by state_dict name, linear weights (out, in), anything numpy can read as floats; PR 1182 as banks or split.
    The configuration computes in float32. Every tensor is used exactly once: GolfError names a missing, extra or mis-shaped one, and
    a hyperparameter that asks for a part which is not implemented.
    """
    model = model_config(recipe, config)
    arrays = {name: np.asarray(value, dtype=np.float32) for name, value in state.items()}
    try:
        return model, from_tensors(model, canonical_names(recipe, model, arrays))
    except GolfError as e:
        raise GolfError(f"{recipe}: {e}") from None


def to_torch(recipe: str, config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters (or anything of their structure: gradients, averages) as the PR's state_dict, PR 1182 in banks. Host arrays."""
    return pr_names(recipe, config, to_tensors(config, params))
