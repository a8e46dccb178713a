"""PyTorch state_dicts of the records <-> our parameters, and checkpoints and packed files opened whatever wrote them.

Our canonical tensor names (golf_jax.model.params) are the PRs' own, with two exceptions: PR 372 calls the smear gate `smear_gate`, and
PR 1182 keeps its matrices in four banks, `[layers, out, in]`, queries before outputs and keys before values.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from golf_jax.artifact.model import tensor_shapes
from golf_jax.config import GolfError, ModelConfig, load_recipe, named, recipe_names
from golf_jax.files import read_bytes
from golf_jax.interop.hparams import model_config
from golf_jax.interop.packed import BANKS, canonical_state, read_checkpoint, read_packed
from golf_jax.model.params import from_tensors, to_tensors
from golf_jax.progress import Log


def pr_names(recipe: str, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The PR's own names, PR 1182 in banks."""
    state = dict(tensors)
    if recipe == "pr372" and "smear.gate" in state:
        state["smear_gate"] = state.pop("smear.gate")
    if recipe == "pr1182":
        for bank, parts in BANKS.items():
            names = [f"blocks.{i}.{part}" for part in parts for i in range(config.num_layers)]
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
    with named(recipe):
        return model, from_tensors(model, canonical_state(arrays, "state_dict"))


def to_torch(recipe: str, config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters (or anything of their structure: gradients, averages) as the PR's state_dict, PR 1182 in banks. Host arrays."""
    return pr_names(recipe, config, to_tensors(config, params))


def open_torch(path: str | Path, recipe: str = "", log: Log = print) -> tuple[ModelConfig, dict[str, np.ndarray], str]:
    """(model configuration, parameters float32, recipe) of a `.pt`, `.ptz` or `.safetensors` file of a full-size record.

    recipe: a shipped recipe; empty: the one whose tensors have these names and shapes, which is said to `log`. The configuration is the
    recipe's with `auto` dtype and attention. Raises GolfError naming the file for whatever does not fit.
    """
    path = Path(path)
    if path.suffix == ".ptz":
        if not path.is_file():
            raise GolfError(f"{path}: no such packed file")
        with named(path):
            tensors = canonical_state(read_packed(read_bytes(path)), str(path))
    else:
        tensors = {n: x.astype(np.float32) for n, x in read_checkpoint(path).items()}
    name = recipe
    if not name:
        name, *others = guess_recipe(tensors, str(path))
        same = f", and of {', '.join(others)}: choose with --recipe" if others else ""
        log(f"{path}: the tensors are those of recipe {name}{same}")
    config = replace(load_recipe(name).model, dtype="auto", attention="auto")
    with named(f"{path}: as {name}"):
        return config, from_tensors(config, tensors), name


def guess_recipe(tensors: Mapping[str, np.ndarray], where: str) -> list[str]:
    """The shipped recipes whose model has exactly these tensor names and shapes. Raises GolfError naming the nearest where none has."""
    shapes = {name: x.shape for name, x in tensors.items()}
    differing = {}
    for name in recipe_names():
        want = tensor_shapes(load_recipe(name).model)
        differing[name] = [n for n in {**want, **shapes} if want.get(n) != shapes.get(n)]
    nearest = min(differing, key=lambda name: len(differing[name]))
    if differing[nearest]:
        odd, known = differing[nearest], tensor_shapes(load_recipe(nearest).model)
        before = next((n.removesuffix(w) for n in odd if n not in known for w in known if n.endswith(f".{w}")), "")
        seen = f"; names begin with {before[:60]!a}, which no recipe's do" if before else ""
        differ = f"{len(odd)} differ ({odd[0][:60]}, ...)"
        raise GolfError(f"{where}: the tensors are of no shipped recipe; nearest is {nearest}, where {differ}{seen}")
    return [name for name, odd in differing.items() if not odd]
