"""Quantization: codes, scales, pass-through values, dequantized weights, and the script's own packed file read back."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from golf_jax.artifact.calibration import collect_hessians
from golf_jax.interop.checks.reference import Arrays, Case, tensor_of
from golf_jax.interop.packed import read_packed_codes
from golf_jax.interop.pgrp import NotInstalled
from golf_jax.mesh import make_mesh
from golf_jax.model import resolve
from golf_jax.quant import QTensor, dequantize, dequantize_all, quantize, rules_for
from golf_jax.quant.gptq import gptq_codes
from golf_jax.quant.lowrank import low_rank, pack, residual_norm
from golf_jax.quant.rounding import prune_by_magnitude, sorted_rows, torch_quantile
from golf_jax.quant.schemes import INT8_QUANTILE, coded_values, sd_scale

Packed = dict[str, QTensor]

NO_WEIGHTS = "the set holds no weights of this tensor"


def check_quant(case: Case) -> None:
    tensors, config = case.tensors, rules_for(case.model, case.recipe.quant)
    stored, made = case.under("hessian/", "own"), packed(case)
    ours: dict[str, Any] = {}
    residuals: Arrays = {}
    for name, q in made.items():
        if q.codes is not None:
            residuals[name] = tensors[name].astype(np.float32) - coded_values(q)
            ours[f"residual_norm/{name}"] = residual_norm(residuals[name])
        ours |= {f"kind/{name}": _kind(q), f"dequantized/{name}": dequantize(q).astype(np.float32)}
        ours |= {f"values/{name}": q.values} if q.codes is None else {f"codes/{name}": q.codes, f"scale/{name}": q.scale}
    ours |= {f"clip/{n}": torch_quantile(sorted_rows(tensors[n]), INT8_QUANTILE) for n in case.under("clip/", "own")}
    if "calibration" in case.seen:
        own = _hessians(case)
        ours |= {f"hessian/{n}": h for n, h in own.items()} | {f"trace/{n}": np.trace(h.astype(np.float64)) for n, h in own.items()}
        ours |= {f"hessian_norm/{n}": np.linalg.norm(h.astype(np.float64)) for n, h in own.items()}
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
    for name in case.under("lowrank_a/", "own"):
        if name in residuals and made[name].lowrank:
            theirs = (case.own[f"lowrank_{x}/{name}"].astype(np.float32) for x in "ab")
            factors = pack(*aligned(residuals[name], config.lowrank.rank, *theirs), config.lowrank.group)
            ours[f"dequantized/{name}"] = dequantize(replace(made[name], lowrank=factors)).astype(np.float32)
            for x, q in zip("ab", factors, strict=True):
                shape = case.own[f"lowrank_{x}_scale/{name}"].shape
                ours |= {f"lowrank_{x}/{name}": q.codes, f"lowrank_{x}_scale/{name}": np.reshape(q.scale, shape)}  # pyright: ignore
    _artifact(case)
    alone = [item for item in case.held if "/" in item and item not in case.added and tensor_of(item.partition("@")[0]) not in tensors]
    case.refs.not_checked |= {f"{case.where}/{item}": NO_WEIGHTS for item in alone}
    case.compare(ours)


def _kind(q: QTensor) -> str:
    """As the sets call it: int6, int6+lqer_asym, float16."""
    return q.kind + (("+lqer_asym" if q.lowrank[0].kind == "int2" else "+lqer") if q.lowrank else "")


def aligned(residual: np.ndarray, rank: int, stored_a: np.ndarray, stored_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Our factors, each singular pair with the sign of the stored one (floats or codes): an SVD leaves it open."""
    a_RK, b_KC = low_rank(residual, rank)
    sign_K = np.sign((a_RK * stored_a).sum(axis=0) / a_RK.max() + (b_KC * stored_b).sum(axis=1) / b_KC.max()).astype(np.float32)
    return a_RK * sign_K, b_KC * sign_K[:, None]


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
        scales, factors = case.under("scale/", "own"), _stored_factors(case)
        codes = {n: c for n, c in case.under("codes/", "own").items() if "@" not in n}
        given = {n: QTensor("int8", "float32", codes=c, scale=scales[n], lowrank=factors.get(n)) for n, c in codes.items()}
        rest = {n: x for n, x in case.tensors.items() if n not in given}
        return dequantize_all(given | quantize(rest, rules_for(case.model, case.recipe.quant)))

    return case.refs.once(("dequantized", case.where, own), make)


def _stored_factors(case: Case) -> dict[str, tuple[QTensor, QTensor]]:
    """The low-rank corrections of the case by tensor."""

    def factor(x: str, name: str) -> QTensor:
        scale = case.own[f"lowrank_{x}_scale/{name}"].reshape(-1)
        return QTensor("int8", "float32", codes=case.own[f"lowrank_{x}/{name}"], scale=scale)

    return {name: (factor("a", name), factor("b", name)) for name in case.under("lowrank_a/", "own")}


def _hessians(case: Case) -> Arrays:
    """Our own, from the calibration tokens."""

    def make() -> Arrays:
        config = resolve(case.model, jax.default_backend())
        return collect_hessians(config, case.params, case.seen["calibration"], make_mesh(case.refs.devices))

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
    for item, want in case.held.items():
        base, _, spec = item.partition("@")
        what, _, name = base.partition("/")
        absent, q = name not in case.tensors, found.get(name)
        if what in ("codes", "scale", "values"):
            ours = np.zeros(0) if q is None else np.asarray(getattr(q, what))[case.index(spec)]
        elif absent and q is not None and what == "dequantized":
            ours = dequantize(q).astype(np.float32)[case.index(spec)]
        elif absent and q is not None and what == "kind":
            ours, want = _kind(q) == want, True
        else:
            continue
        case.add(f"artifact/{item}", ours, want)
        if absent:
            case.added.add(item)
