"""Fresh full-size models: parameter counts, shapes, storage, optimizer groups, and the statistics of the initialisation."""

from fnmatch import fnmatchcase
from typing import Any

import jax
import ml_dtypes
import numpy as np

from golf_jax.interop.checks.reference import Case
from golf_jax.model.params import count, init_params, leaves, storage_dtypes, tensor_names, to_tensors
from golf_jax.optim.optimizer import route


def check_init(case: Case) -> None:
    recipe, facts = case.recipe, case.settings["tensors"]
    case.add("count", count(recipe.model), case.settings["count"])
    ours = to_tensors(recipe.model, init_params(recipe.model, jax.random.key(recipe.seed)))
    groups = route(recipe.optim, {name: leaf.role for name, leaf in leaves(recipe.model).items()})
    dtypes, leaf_of = storage_dtypes(recipe.model, "as_run"), {tensor: leaf for tensor, (leaf, _) in tensor_names(recipe.model).items()}
    for name, about in facts.items():
        names = [n for n in ours if any(fnmatchcase(n, part) for part in name.split("|"))]
        if not names:
            case.refs.not_checked[f"{case.where}/{name}"] = "no such tensor here"
            continue
        group, dtype = groups[leaf_of[names[0]]], dtypes[leaf_of[names[0]]].name
        known: dict[str, Any] = {"dtype": dtype, "kind": group.kind}
        if group.kind != "frozen":
            known |= {"lr": group.lr, "weight_decay": group.weight_decay}
        else:
            known |= {"lr": 0.0, "weight_decay": 0.0}
        for fact in set(about) & set(known):
            same = isinstance(known[fact], str)
            case.add(f"{fact}/{name}", known[fact] == about[fact] if same else known[fact], True if same else about[fact])
        if "shape" in about:
            case.add(f"shape/{name}", ours[names[0]].shape, about["shape"])
        if "singular" in about:
            w = [np.linalg.svd(ours[n].astype(np.float64), compute_uv=False) for n in names[:1]]
            case.add(f"singular/{name}", [min(s.min() for s in w), max(s.max() for s in w)], about["singular"])
        _statistics(case, name, np.concatenate([ours[n].ravel() for n in names]), about)


def _statistics(case: Case, name: str, x: np.ndarray, about: dict[str, Any]) -> None:
    """Mean and deviation in standard errors of independent draws; constants as they are."""
    if "mean" not in about:
        return
    x = (x.astype(ml_dtypes.bfloat16) if case.settings.get("rounded") == "bfloat16" else x).astype(np.float64)
    if "std" not in about:
        return case.add(f"constant/{name}", [x.mean(), x.min(), x.max()], [about[k] for k in ("mean", "min", "max")])
    mean, std = about["mean"], about["std"]
    case.add(f"mean/{name}", (x.mean() - mean) / (std * np.sqrt(2 / x.size)), 0.0)
    case.add(f"std/{name}", (x.std() - std) / (std / np.sqrt(x.size)), 0.0)
    case.add(f"extremes/{name}", [x.min(), x.max()], [about["min"], about["max"]])
