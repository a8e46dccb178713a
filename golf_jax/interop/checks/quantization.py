"""Quantization: codes, scales, pass-through values, dequantized weights, and the script's own packed file read back."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from golf_jax.artifact.calibration import collect_hessians
from golf_jax.config import QuantConfig, QuantRule
from golf_jax.interop.packed import read_packed_codes
from golf_jax.interop.pgrp import NotInstalled
from golf_jax.interop.reference import Arrays, Case, tensor_of
from golf_jax.model import resolve
from golf_jax.quant import QTensor, dequantize, dequantize_all, quantize, rules_for
from golf_jax.quant.lowrank import low_rank, pack, residual_norm
from golf_jax.quant.rounding import prune_by_magnitude, sorted_rows, torch_quantile
from golf_jax.quant.schemes import INT8_QUANTILE, coded_values

Packed = dict[str, QTensor]

NO_WEIGHTS = "the set holds no weights of this tensor"


def check_quant(case: Case) -> None:
    tensors, config, stored = case.tensors, case.recipe.quant, case.under("hessian/")
    ours = _outputs(packed(case))
    ours |= {f"residual_norm/{n}": residual_norm(_residual(tensors[n], q)) for n, q in packed(case).items() if q.codes is not None}
    ours |= {f"clip/{n}": torch_quantile(sorted_rows(tensors[n]), INT8_QUANTILE) for n in case.under("clip/")}
    if "calibration" in case.seen:
        for n, h in _hessians(case).items():
            wide = h.astype(np.float64)
            ours |= {f"hessian/{n}": h, f"trace/{n}": np.trace(wide), f"hessian_norm/{n}": np.linalg.norm(wide)}
        for name, q in quantize({n: tensors[n] for n in stored}, _rules(case), stored).items():
            case.add(f"codes_given_hessian/{name}", q.codes, case.own[f"codes/{name}"])
    else:
        case.added |= {f"hessian/{n}" for n in stored}  # given, not compared
    for name in (n for n, facts in case.settings.get("tensors", {}).items() if "threshold" in facts and n in tensors):
        ours[f"threshold/{name}"] = torch_quantile(np.sort(np.abs(tensors[name]), axis=None), config.prune_fraction)
        ours[f"zeroed/{name}"] = (prune_by_magnitude(tensors[name], config.prune_fraction) == 0).sum()
    _artifact(case)
    alone = [item for item in case.held if "/" in item and item not in case.added and tensor_of(item.partition("@")[0]) not in tensors]
    case.refs.not_checked |= {f"{case.where}/{item}": NO_WEIGHTS for item in alone}
    case.compare(ours)


def _rules(case: Case) -> QuantConfig:
    """The recipe's rules; with the settings `levels` and `sigmas` GPTQ for all tensors, clipped there."""
    if "levels" not in case.settings:
        return rules_for(case.model, case.recipe.quant)
    scheme = f"gptq_int{int(case.settings['levels']).bit_length() + 1}"
    return QuantConfig(rules=(QuantRule("", scheme, sigmas=case.settings["sigmas"]),))


def _outputs(tensors: Packed) -> dict[str, Any]:
    """By the format's names; kinds as the sets call them: int6, int6+lqer_asym, float16."""
    ours: dict[str, Any] = {}
    for name, q in tensors.items():
        correction = ("+lqer_asym" if q.lowrank[0].kind == "int2" else "+lqer") if q.lowrank else ""
        ours |= {f"kind/{name}": q.kind + correction, f"dequantized/{name}": dequantize(q).astype(np.float32)}
        ours |= {f"values/{name}": q.values} if q.codes is None else {f"codes/{name}": q.codes, f"scale/{name}": q.scale}
        for x, factor in zip("ab", q.lowrank or (), strict=False):
            ours |= {f"lowrank_{x}/{name}": factor.codes, f"lowrank_{x}_scale/{name}": np.squeeze(np.asarray(factor.scale))}
    return ours


def aligned(residual: np.ndarray, rank: int, stored_a: np.ndarray, stored_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Our factors, each singular pair with the sign of the stored one (floats or codes): an SVD leaves it open."""
    a_RK, b_KC = low_rank(residual, rank)
    sign_K = np.sign((a_RK * stored_a).sum(axis=0) / a_RK.max() + (b_KC * stored_b).sum(axis=1) / b_KC.max()).astype(np.float32)
    return a_RK * sign_K, b_KC * sign_K[:, None]


def _residual(w: np.ndarray, q: QTensor) -> np.ndarray:
    return w.astype(np.float32) - coded_values(q)


def packed(case: Case) -> Packed:
    """The tensors of the case quantized here, low-rank factors with the signs of those stored."""

    def make() -> Packed:
        config, tensors = _rules(case), case.tensors
        made = quantize(tensors, config, _hessians(case) if "calibration" in case.seen else case.under("hessian/"))
        for name in case.under("lowrank_a/"):
            if made.get(name) and made[name].lowrank:
                theirs = (case.own[f"lowrank_{x}/{name}"].astype(np.float32) for x in "ab")
                factors = aligned(_residual(tensors[name], made[name]), config.lowrank.rank, *theirs)
                made[name] = replace(made[name], lowrank=pack(*factors, config.lowrank.group))
        return made

    return case.refs.once(("packed", case.where), make)


def dequantized(case: Case, own: bool) -> Arrays:
    """Weights after quantization: our own, or the stored codes times their scales with the rest quantized here."""

    def make() -> Arrays:
        if own:
            return dequantize_all(packed(case))
        scales, factors = case.under("scale/"), _stored_factors(case)
        codes = {n: c for n, c in case.under("codes/").items() if "@" not in n}
        given = {n: QTensor("int8", "float32", codes=c, scale=scales[n], lowrank=factors.get(n)) for n, c in codes.items()}
        rest = {n: x for n, x in case.tensors.items() if n not in given}
        return dequantize_all(given | quantize(rest, _rules(case)))

    return case.refs.once(("dequantized", case.where, own), make)


def _stored_factors(case: Case) -> dict[str, tuple[QTensor, QTensor]]:
    """The low-rank corrections of the case by tensor."""

    def factor(x: str, name: str) -> QTensor:
        scale = case.own[f"lowrank_{x}_scale/{name}"].reshape(-1)
        return QTensor("int8", "float32", codes=case.own[f"lowrank_{x}/{name}"], scale=scale)

    return {name: (factor("a", name), factor("b", name)) for name in case.under("lowrank_a/")}


def _hessians(case: Case) -> Arrays:
    """Our own, from the calibration tokens."""

    def make() -> Arrays:
        config = resolve(case.model, jax.default_backend())
        return collect_hessians(config, case.params, case.seen["calibration"], case.mesh)

    return case.refs.once(("hessians", case.where), make)


def _artifact(case: Case) -> None:
    """The packed file that the script wrote holds the arrays stored beside it; they are all there is of tensors without weights here."""
    if "artifact" not in case.own:
        return
    try:
        found = read_packed_codes(case.own["artifact"].tobytes())
    except NotInstalled as e:
        case.refs.not_checked[f"{case.where}/artifact"] = str(e)
        return
    case.added.add("artifact")
    ours = _outputs(found)
    for item, want in case.held.items():
        base, _, spec = item.partition("@")
        what, _, name = base.partition("/")
        absent = name not in case.tensors
        if what in ("codes", "scale", "values") or (absent and base in ours and what in ("kind", "dequantized")):
            x = ours.get(base, np.zeros(0))
            case.add(f"artifact/{item}", *((x == want, True) if what == "kind" else (np.asarray(x)[case.index(spec)], want)))
            case.added |= {item} if absent else set()
