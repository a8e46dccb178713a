"""All tensors of a model quantized by first-match rules, and whether a list of rules fits a model at all."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from golf_jax.config import GolfError, ModelConfig, QuantConfig, QuantRule
from golf_jax.progress import Log, Progress
from golf_jax.quant.lowrank import correct
from golf_jax.quant.rounding import prune_by_magnitude
from golf_jax.quant.schemes import QTensor, apply_rule, check_shape, scheme_of


def count_layers(names: Iterable[str]) -> int:
    """Layers of a model with tensors of these names (`blocks.10.attn.c_k.weight`: at least 11)."""
    return max((int(m[1]) + 1 for name in names if (m := re.match(r"blocks\.(\d+)\.", name))), default=0)


def applies(rule: QuantRule, name: str, layers: int) -> bool:
    """Whether a pattern of the rule is part of the name. `blocks.-1.` is the last of the `layers`."""
    from_the_end = re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) - layers}", name)
    return any(part in (from_the_end if part.startswith("blocks.-") else name) for part in rule.pattern.split("|"))


def match_rule(config: QuantConfig, name: str, numel: int, layers: int) -> QuantRule:
    """The first rule of `config` that claims the tensor of a model with so many layers; an error if none does."""
    for rule in config.rules:
        if numel <= rule.min_numel or (rule.max_numel and numel > rule.max_numel):
            continue
        if applies(rule, name, layers):
            return rule
    raise GolfError(f"quant.rules: no rule matches {name} ({numel} elements); end the list with QuantRule('', 'int6_row')")


def rules_for(model: ModelConfig, config: QuantConfig) -> QuantConfig:
    """`config` for this model: key matrices that its fake quantization leaves exempt are stored as float16, before any other rule."""
    exempt = "|".join(f"blocks.{-1 - i}.attn.c_k.weight" for i in range(model.fake_quant.late_k_layers))
    return replace(config, rules=(QuantRule(exempt, "float16"), *config.rules)) if exempt else config


def quantize(
    tensors: Mapping[str, np.ndarray],
    config: QuantConfig,
    hessians: Mapping[str, np.ndarray] | None = None,
    log: Log | None = None,
) -> dict[str, QTensor]:
    """All tensors pruned and quantized by the rules of `config`, in the order given.

    tensors: float32 or bfloat16 arrays by canonical name. hessians: name -> [C, C] float32, for the tensors of GPTQ schemes.
    Raises GolfError naming the tensor: NaN or infinity, no rule, unknown scheme, a row scheme on a vector, a missing Hessian, a value
    or scale beyond float16.
    """
    layers, result = count_layers(tensors), {}
    progress = Progress(log, "quantized: tensors", len(tensors))
    for name, w in tensors.items():
        progress.at(len(result))
        w = np.asarray(w)
        if w.dtype.name not in ("float32", "bfloat16"):
            raise GolfError(f"{name}: dtype {w.dtype.name} cannot be quantized, only float32 and bfloat16")
        if not np.isfinite(w).all():
            raise GolfError(f"{name}: holds NaN or infinity; the run diverged, nothing can be packed")
        rule = match_rule(config, name, w.size, layers)
        if config.prune_fraction and w.ndim == 2 and w.size > config.prune_min_numel:
            w = prune_by_magnitude(w, config.prune_fraction)
        result[name] = apply_rule(rule, name, w, (hessians or {}).get(name))
    return correct(tensors, result, config.lowrank)


def without_hessians(config: QuantConfig) -> QuantConfig:
    """`config` with plain rounding at the same scales in place of GPTQ: for byte estimates while training."""
    plain = {rule.scheme: scheme.plain for rule in config.rules if (scheme := scheme_of(rule)) and scheme.needs_hessian}
    return replace(config, rules=tuple(replace(r, scheme=plain.get(r.scheme, r.scheme)) for r in config.rules))


def check_quant(config: QuantConfig, shapes: Mapping[str, tuple[int, ...]], known: Collection[str], calibrated: Collection[str]) -> None:
    """Raises GolfError unless `config` can quantize tensors of these names and shapes.

    known: names of tensors that models have in other configurations: a rule for one of them may be idle, any other is a mistake.
    calibrated: names for which there will be Hessians.
    """
    layers = count_layers(shapes)
    hessian = {rule.scheme for rule in config.rules if (scheme := scheme_of(rule)) and scheme.needs_hessian}
    if bool(hessian) != (config.gptq_batches > 0):
        why = f"scheme {min(hessian)} needs Hessians" if hessian else "no scheme in quant.rules needs Hessians"
        raise GolfError(f"quant.gptq_batches is {config.gptq_batches}, but {why}; they go together")
    for rule in config.rules:
        if not any(applies(rule, name, layers) for name in (*shapes, *known)):
            raise GolfError(f"quant.rules: {rule.pattern!r} is in the name of no tensor of this model ({', '.join([*shapes][:3])}, ...)")
    for name, shape in shapes.items():
        rule = match_rule(config, name, math.prod(shape), layers)
        check_shape(rule, name, shape)
        if rule.scheme in hessian and name not in calibrated:
            raise GolfError(f"quant.rules: {rule.scheme} needs a Hessian, and none is collected for {name}; give it another rule before")
