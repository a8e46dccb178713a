"""Fresh full-size models: parameter counts, shapes, storage, optimizer groups, and the statistics of the initialisation."""

from typing import Any

import jax
import ml_dtypes
import numpy as np

from golf_jax.interop.reference import Case, NotComputed, matches
from golf_jax.model.params import count, init_params, leaves, storage_dtypes, tensor_names, to_tensors
from golf_jax.optim.optimizer import route

LARGEST = 1 << 28  # parameters that are made: seven times the largest record; a line of a set must not cost the memory of the machine


def check_init(case: Case) -> None:
    recipe, facts = case.recipe, case.settings["tensors"]
    case.add("count", size := count(recipe.model), case.settings["count"])
    if size > LARGEST:
        raise NotComputed(f"a model of {size:,} parameters; at most {LARGEST:,} are made")
    ours = to_tensors(recipe.model, init_params(recipe.model, jax.random.key(recipe.seed)))
    groups = route(recipe.optim, {name: leaf.role for name, leaf in leaves(recipe.model).items()})
    dtypes, leaf_of = storage_dtypes(recipe.model, "as_run"), {tensor: leaf for tensor, (leaf, _) in tensor_names(recipe.model).items()}
    found: dict[str, Any] = {}
    for name, about in facts.items():
        names = [n for n in ours if matches(n, name)]
        if not names:
            continue
        first = ours[names[0]]
        group, trained = groups[leaf_of[names[0]]], groups[leaf_of[names[0]]].kind != "frozen"
        known = {"shape": first.shape, "dtype": dtypes[leaf_of[names[0]]].name, "kind": group.kind}
        known |= {"lr": group.lr * trained, "weight_decay": group.weight_decay * trained}
        if "singular" in about:
            sizes = np.linalg.svd(first.astype(np.float64), compute_uv=False)
            known["singular"] = [sizes.min(), sizes.max()]
        found |= {f"{fact}/{name}": value for fact, value in known.items()}
        _statistics(case, name, np.concatenate([ours[n].ravel() for n in names]), about)
    case.compare(found)


def _statistics(case: Case, name: str, x: np.ndarray, about: dict[str, Any]) -> None:
    """Mean and deviation in standard errors of independent draws; constants as they are."""
    if "mean" not in about:
        return
    case.added |= {f"{fact}/{name}" for fact in ("mean", "std", "min", "max")}
    x = (x.astype(ml_dtypes.bfloat16) if case.settings.get("rounded") == "bfloat16" else x).astype(np.float64)
    if "std" not in about:
        return case.add(f"constant/{name}", [x.mean(), x.min(), x.max()], [about[k] for k in ("mean", "min", "max")])
    mean, std = about["mean"], about["std"]
    case.add(f"mean/{name}", (x.mean() - mean) / (std * np.sqrt(2 / x.size)), 0.0)
    case.add(f"std/{name}", (x.std() - std) / (std / np.sqrt(x.size)), 0.0)
    case.add(f"extremes/{name}", [x.min(), x.max()], [about["min"], about["max"]])
