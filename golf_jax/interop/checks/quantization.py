"""Quantization: codes, scales, pass-through values, dequantized weights, and the script's own packed file read back."""

import importlib.util
from typing import Any

import jax
import numpy as np

from golf_jax.artifact.calibration import collect_hessians
from golf_jax.interop.checks.base import quick_compilation
from golf_jax.interop.checks.reference import Arrays, Case
from golf_jax.interop.packed import read_packed_codes
from golf_jax.mesh import make_mesh
from golf_jax.model import resolve
from golf_jax.quant import QTensor, dequantize, dequantize_all, quantize, rules_for
from golf_jax.quant.gptq import gptq_codes
from golf_jax.quant.rounding import prune_by_magnitude, sorted_rows, torch_quantile
from golf_jax.quant.schemes import INT8_QUANTILE, sd_scale

Packed = dict[str, QTensor]


def check_quant(case: Case) -> None:
    tensors, config = case.tensors, rules_for(case.model, case.recipe.quant)
    stored, made = case.under("hessian/", "own"), packed(case)
    ours: dict[str, Any] = {}
    for name, q in made.items():
        ours |= {f"kind/{name}": q.kind, f"dequantized/{name}": dequantize(q).astype(np.float32)}
        ours |= {f"values/{name}": q.values} if q.codes is None else {f"codes/{name}": q.codes, f"scale/{name}": q.scale}
    ours |= {f"clip/{n}": torch_quantile(sorted_rows(tensors[n]), INT8_QUANTILE) for n in case.under("clip/", "own")}
    if "calibration" in case.seen:
        own = _hessians(case)
        ours |= {f"hessian/{n}": h for n, h in own.items()} | {f"trace/{n}": np.trace(h.astype(np.float64)) for n, h in own.items()}
        given = quantize({n: tensors[n] for n in stored}, config, stored)
        for name, q in given.items():
            case.add(f"codes_given_hessian/{name}", q.codes, case.own[f"codes/{name}"])
    else:
        case.added |= {f"hessian/{n}" for n in stored}  # given, not compared
    for name, facts in case.settings.get("tensors", {}).items():
        if "threshold" in facts and name in tensors:
            fraction = config.prune_fraction
            ours[f"threshold/{name}"] = torch_quantile(np.sort(np.abs(tensors[name]), axis=None), fraction)
            ours[f"zeroed/{name}"] = (prune_by_magnitude(tensors[name], fraction) == 0).sum()
    _artifact(case)
    case.compare(ours)


def packed(case: Case) -> Packed:
    """The tensors of the case quantized here."""

    def make() -> Packed:
        config, tensors = rules_for(case.model, case.recipe.quant), case.tensors
        if "levels" in case.settings:
            levels, sigmas = case.settings["levels"], case.settings["sigmas"]
            scales = {n: sd_scale(w, levels, sigmas) for n, w in tensors.items()}
            kind = f"int{int(levels).bit_length() + 1}"
            stored = case.under("hessian/", "own")
            codes = {n: gptq_codes(w, stored[n], scales[n], levels) for n, w in tensors.items()}
            return {n: QTensor(kind, "float32", codes=codes[n], scale=scales[n]) for n in tensors}
        hessians = _hessians(case) if "calibration" in case.seen else case.under("hessian/", "own")
        return quantize(tensors, config, hessians)

    return case.refs.once(("packed", case.where), make)


def dequantized(case: Case, own: bool) -> Arrays:
    """Weights after quantization: our own, or the stored codes times their scales with the rest quantized here."""

    def make() -> Arrays:
        if own:
            return dequantize_all(packed(case))
        scales = case.under("scale/", "own")
        given = {n: QTensor("int8", "float32", codes=c, scale=scales[n]) for n, c in case.under("codes/", "own").items() if "@" not in n}
        rest = {n: x for n, x in case.tensors.items() if n not in given}
        return dequantize_all(given | quantize(rest, rules_for(case.model, case.recipe.quant)))

    return case.refs.once(("dequantized", case.where, own), make)


def _hessians(case: Case) -> Arrays:
    """Our own, from the calibration tokens."""

    def make() -> Arrays:
        with quick_compilation():
            config = resolve(case.model, jax.default_backend())
            return collect_hessians(config, case.params, case.seen["calibration"], make_mesh(case.refs.devices))

    return case.refs.once(("hessians", case.where), make)


def _artifact(case: Case) -> None:
    """The packed file that the script wrote holds the arrays stored beside it; they are all there is of tensors without weights here."""
    if "artifact" not in case.own:
        return
    case.added.add("artifact")
    absent = {n for what in ("codes", "scale", "values", "dequantized") for n in case.under(f"{what}/", "own")}
    absent = {n.partition("@")[0] for n in absent} - set(case.tensors)
    if importlib.util.find_spec("torch") is None:
        case.refs.not_checked[f"{case.where}/artifact"] = "needs torch: pip install 'golf-jax[torch]'"
        return
    found = read_packed_codes(case.own["artifact"].tobytes())
    for what in ("codes", "scale", "values"):
        for item, want in case.under(f"{what}/", "own").items():
            name, _, spec = item.partition("@")
            ours = getattr(found[name], what) if name in found else np.zeros(0)
            case.add(f"artifact/{what}/{item}", np.asarray(ours)[case.index(spec)], want)
            if name in absent:
                case.added.add(f"{what}/{item}")
    for item, want in case.under("dequantized/", "own").items():
        name, _, spec = item.partition("@")
        if name in absent:
            case.add(f"artifact/dequantized/{item}", dequantize(found[name]).astype(np.float32)[case.index(spec)], want)
            case.added.add(f"dequantized/{item}")
    for name in absent | (set(case.settings.get("tensors", {})) - set(case.tensors)):
        kind = case.settings["tensors"].get(name, {}).get("kind")
        if kind and name in found:
            case.add(f"artifact/kind/{name}", found[name].kind == kind, True)
            case.added.add(f"kind/{name}")
