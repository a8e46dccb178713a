"""What the portable reference sets say of quantization."""

from pathlib import Path

from golf_jax.config import QuantConfig
from golf_jax.interop.reference import Case, Set
from golf_jax.quant import QTensor, rules_for
from golf_jax.quant.rounding import prune_by_magnitude

RECIPES = ("pr372", "pr562", "pr638", "pr1182", "pr2005")


def quant_case(pr: str, references: Path) -> Case:
    """The quantized model of tests/reference/prN.npz."""
    return Set(references / f"{pr}.npz").case("quant/main")


def rules(case: Case) -> QuantConfig:
    return rules_for(case.model, case.recipe.quant)


def stored(case: Case) -> dict[str, QTensor]:
    """The tensors as the PR stores them, in its order; what it keeps as floats are the parameters, pruned and cast."""
    config, facts, result = case.recipe.quant, case.settings["tensors"], {}
    for name, w in case.tensors.items():
        kind = facts[name]["kind"]
        if f"codes/{name}" in case.own:
            result[name] = QTensor(kind, "float32", codes=case.own[f"codes/{name}"], scale=case.own[f"scale/{name}"])
        else:
            if config.prune_fraction and w.ndim == 2 and w.size > config.prune_min_numel:
                w = prune_by_magnitude(w, config.prune_fraction)
            result[name] = QTensor(kind, "float32", values=w.astype(kind))
    return result
