"""Quantization configs of the five recipes, with thresholds that can be scaled down, and what the reference tensors say about them."""

import json
import re
from dataclasses import replace

import numpy as np

from golf_jax.config import QuantConfig, load_recipe
from golf_jax.quant import QTensor, rules_for
from golf_jax.quant.rounding import prune_by_magnitude

RECIPES = ("pr372", "pr562", "pr638", "pr1182", "pr2005")
# Largest tensor that passes through, and (PR 562) largest that is not pruned, in the portable reference tensors.
PORTABLE_NUMEL = {"pr372": 256, "pr562": 128, "pr638": 192, "pr1182": 192, "pr2005": 192}
PORTABLE_PRUNE_NUMEL = 192


def recipe_quant(pr: str, numel: int, prune_numel: int = 65_536) -> QuantConfig:
    """The recipe's QuantConfig with `numel` as the largest tensor that passes through unquantized."""
    recipe = load_recipe(pr)
    config = rules_for(recipe.model, recipe.quant)
    rules = tuple(replace(r, max_numel=numel) if r.max_numel else r for r in config.rules)
    return replace(config, rules=rules, prune_min_numel=prune_numel)


def canonical(pr: str, name: str) -> str:
    return "smear.gate" if pr == "pr372" and name == "smear_gate" else name


def reference_tensors(pr: str, z, prefix: str = "param/") -> dict[str, np.ndarray]:
    """The parameters of a reference file by canonical name, banks split, in the order in which the PR stores them."""
    tensors: dict[str, np.ndarray] = {}
    for key in z.files:
        if not key.startswith(prefix):
            continue
        name, value = key[len(prefix) :], z[key]
        if name.endswith("_bank"):
            half = len(value) // 2
            targets = {
                "qo_bank": (("attn.c_q", value[:half]), ("attn.proj", value[half:])),
                "kv_bank": (("attn.c_k", value[:half]), ("attn.c_v", value[half:])),
                "mlp_up_bank": (("mlp.fc", value),),
                "mlp_down_bank": (("mlp.proj", value),),
            }[name]
            for part, stack in targets:
                tensors |= {f"blocks.{i}.{part}.weight": w for i, w in enumerate(stack)}
        else:
            tensors[canonical(pr, name)] = value
    return tensors


def reference_codes(pr: str, z, root: str = "") -> dict[str, QTensor]:
    """The PR's own stored tensors of a quant.npz (any of the five key layouts), by canonical name."""
    found: dict[str, dict[str, np.ndarray]] = {}
    pattern = re.compile(re.escape(root) + r"(codes|q|scale|scale_fp16|pass|pass_fp16|fp16)/(.+)$")
    for key in z.files:
        match = pattern.match(key)
        if match and not key.startswith(("unit/", "bf16case/", "syn/")):
            what = {"q": "codes", "scale_fp16": "scale", "pass_fp16": "pass", "fp16": "pass"}.get(match[1], match[1])
            found.setdefault(canonical(pr, match[2]), {})[what] = z[key]
    kinds = reference_kinds(z, root)
    result = {}
    for name, parts in found.items():
        if "pass" in parts:
            result[name] = QTensor(str(parts["pass"].dtype), "float32", values=parts["pass"])
        elif "codes" in parts:
            result[name] = QTensor(kinds[name], "float32", codes=parts["codes"], scale=parts["scale"])
    return result


def reference_kinds(z, root: str = "") -> dict[str, str]:
    """Name -> int5/int6/int7/int8 of the quantized tensors of a quant.npz."""
    for key in ("kinds_json", "kinds", "meta", "config"):
        if root + key in z.files:
            found = json.loads(str(z[root + key]))
            found = found.get("kind", found) if key == "config" else found
            return {n: m[0] for n, v in found.items() if (m := re.search(r"int\d", str(v)))}
    raise KeyError("no kinds")


def portable_codes(pr: str, z) -> dict[str, QTensor]:
    """The stored tensors of a portable reference file; pass-through values are the parameters, pruned and cast."""
    tensors = reference_tensors(pr, z)
    result = {}
    for name, w in tensors.items():
        key = "smear_gate" if (pr, name) == ("pr372", "smear.gate") else name
        kind = str(z[f"kind/{key}"])
        if f"codes/{key}" in z.files:
            result[name] = QTensor(kind, "float32", codes=z[f"codes/{key}"], scale=z[f"scale/{key}"])
        else:
            if pr == "pr562" and w.ndim == 2 and w.size > PORTABLE_PRUNE_NUMEL:
                w = prune_by_magnitude(w, 0.03)
            result[name] = QTensor(kind, "float32", values=w.astype(kind))
    return result


def json_of(z, key: str):
    return json.loads(str(z[key]))
