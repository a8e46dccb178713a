"""Quantization: codes, scales, pass-through values, dequantized weights, and the PR's own packed file read back."""

import importlib.util
import json
import re
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from golf_jax.artifact.calibration import collect_hessians
from golf_jax.config import QuantConfig, load_recipe
from golf_jax.interop.checks.base import CheckResult, Comparison, Context, Reference
from golf_jax.interop.hparams import model_config
from golf_jax.interop.packed import canonical_name, read_packed_codes, split_banks
from golf_jax.mesh import make_mesh
from golf_jax.model.params import to_tensors
from golf_jax.quant import QTensor, dequantize, dequantize_all, quantize, rules_for
from golf_jax.quant.gptq import gptq_codes
from golf_jax.quant.rounding import prune_by_magnitude, sorted_rows, torch_quantile
from golf_jax.quant.schemes import SCHEMES, sd_scale

Tensors = dict[str, np.ndarray]

# Fraction of codes that may differ: none, or one in 1e5 where the INDEX allows another rounding of a division (PRs 372, 562).
CODES = {"pr372": 1e-5, "pr562": 1e-5, "pr638": 0.0, "pr1182": 0.0, "pr2005": 1e-3}
END_TO_END = 5e-3  # PR 2005 with Hessians of our own
LIMITS = ("qat_numel_threshold", "quant_passthrough_numel", "pass_numel", "numel_threshold_for_quantization")


def quant_config(ctx: Context, settings: dict[str, Any], limit: int | None = None) -> QuantConfig:
    """The recipe's rules with the size limits of the reference run."""
    config = load_recipe(ctx.recipe).quant
    if limit is None:
        lower = {k.lower(): v for k, v in settings.items()}
        limit = next((int(lower[k]) for k in LIMITS if k in lower), None)
    rules = config.rules if limit is None else tuple(replace(r, max_numel=limit) if r.max_numel else r for r in config.rules)
    config = replace(config, rules=rules, prune_min_numel=int(settings.get("prune_numel", config.prune_min_numel)))
    return rules_for(model_config(ctx.recipe, settings), config)


def check_quant(ctx: Context) -> list[CheckResult]:
    """quant.npz, quant_large.npz (or the portable file)."""
    results: list[Comparison] = []
    if ctx.portable:
        return [c.result() for c in _portable(ctx)]
    if ctx.has("quant"):
        z, m = ctx.file("quant"), ctx.model()
        roots = sorted({k.split("/")[0] + "/" for k in z if k.endswith("/pass_numel")}) or [""]
        for root in roots:
            limit = int(z[f"{root}pass_numel"]) if root else None
            config = quant_config(ctx, m.settings | z.config(), limit)
            results += _one(ctx, f"quant {root}".strip(" /"), z, root, to_tensors(m.config, m.params), config)
        results += _units(ctx, z)
    if ctx.has("quant_large"):
        z = ctx.file("quant_large")
        results += _one(ctx, "quant_large", z, "", canonical(z.under("param/")), quant_config(ctx, z.config()))
        results.append(_pruning(z))
    return [c.result() for c in results if c.compared]


def canonical(tensors: Tensors) -> Tensors:
    """By canonical name, banks split into layers."""
    return split_banks({canonical_name(n): x for n, x in tensors.items()})


def _stored(z: Reference, root: str) -> tuple[Tensors, Tensors, Tensors]:
    """(codes, scales, pass-through values) by canonical name, in any of the five key layouts."""
    parts: dict[str, Tensors] = {"codes": {}, "scale": {}, "pass": {}}
    spelling = {"q": "codes", "scale_fp16": "scale", "pass_fp16": "pass", "fp16": "pass"}
    for key in z:
        match = re.fullmatch(re.escape(root) + r"(codes|q|scale|scale_fp16|pass|pass_fp16|fp16)/(.+)", key)
        if match:
            parts[spelling.get(match[1], match[1])][canonical_name(match[2])] = z[key]
    return parts["codes"], parts["scale"], parts["pass"]


def _one(ctx: Context, label: str, z: Reference, root: str, tensors: Tensors, config: QuantConfig) -> list[Comparison]:
    codes, scales, passed = _stored(z, root)
    hessians = None
    if ctx.recipe == "pr2005":
        hessians = _hessians(ctx, z)
    ours = quantize(tensors, config, hessians)
    tolerance = END_TO_END if hessians is not None else CODES[ctx.recipe]
    c_codes, c_scale = Comparison(f"{label}: codes", tolerance, "equal"), Comparison(f"{label}: scales", min(tolerance, 1e-3), "equal")
    c_pass, c_deq = Comparison(f"{label}: pass-through", 0.0, "equal"), Comparison(f"{label}: dequantized", tolerance, "equal")
    _compare(ours, codes, scales, passed, c_codes, c_scale, c_pass)
    for key, want in z.under(f"{root}deq/").items():
        if (name := canonical_name(key)) in ours:
            c_deq.add(key, dequantize(ours[name]), want)
    for key, want in z.under(f"{root}deq_head64/").items():
        if (name := canonical_name(key)) in ours:
            c_deq.add(key, dequantize(ours[name])[: len(want)], want)
    packed = _artifact(ctx, label, z, root, codes, scales, passed)
    return [c_codes, c_scale, c_pass, c_deq, *packed, *_from_stored_hessians(ctx, z, tensors)]


def dequantized(ctx: Context) -> Tensors:
    """The dequantized weights of quant.npz (or the portable file), by canonical name: the stored codes times their scales. Tensors that
    are not coded are rounded here by the recipe's rules; their own check compares them."""

    def make() -> Tensors:
        z, m = ctx.file("quant"), ctx.model()
        codes, scales, _ = _stored(z, "")
        others = {n: x for n, x in to_tensors(m.config, m.params).items() if n not in codes}
        coded = {n: QTensor("int8", "float32", codes=c, scale=scales[n]) for n, c in codes.items()}
        return dequantize_all(coded | quantize(others, quant_config(ctx, m.settings | z.config())))

    return ctx.once("dequantized", make)


def _compare(ours: dict[str, QTensor], codes: Tensors, scales: Tensors, passed: Tensors, *cs: Comparison) -> None:
    c_codes, c_scale, c_pass = cs
    for name in [n for n in {**codes, **passed} if n in ours]:
        q = ours[name]
        if (name in codes) != (q.codes is not None):
            c_codes.fail(f"{name}: stored as {'codes' if name in codes else 'floats'}, here as {q.kind}")
        elif name in codes:
            c_codes.add(name, q.codes, codes[name])
            c_scale.add(name, q.scale, scales[name])
        elif q.values is not None:
            c_pass.add(name, q.values, passed[name])


def _artifact(ctx: Context, label: str, z: Reference, root: str, codes: Tensors, scales: Tensors, passed: Tensors) -> list[Comparison]:
    """The packed file the PR wrote holds the codes stored beside it."""
    if f"{root}artifact" not in z:
        return []
    c = Comparison(f"{label}: packed file read", 0.0, "equal")
    if importlib.util.find_spec("torch") is None:
        ctx.not_checked[c.name] = "needs torch: pip install 'golf-jax[torch]'"
        return []
    found = read_packed_codes(ctx.recipe, z[f"{root}artifact"].tobytes())
    for name, want in codes.items():
        c.add(f"{name} codes", found[name].codes, want)
        c.add(f"{name} scale", found[name].scale, scales[name])
    for name, want in passed.items():
        c.add(name, found[name].values, want)
    return [c]


def _hessians(ctx: Context, z: Reference) -> Tensors:
    """Our own, from the calibration tokens."""
    m = ctx.model()
    return ctx.once("hessians", lambda: collect_hessians(m.config, m.params, z["calibration_tokens"], make_mesh(ctx.devices)))


def _from_stored_hessians(ctx: Context, z: Reference, tensors: Tensors) -> list[Comparison]:
    """PR 2005: codes from the Hessians the file holds."""
    c = Comparison("quant: codes from stored Hessians", CODES["pr2005"], "equal")
    if ctx.recipe == "pr2005":
        codes, _, _ = _stored(z, "")
        for name, hessian in z.under("hessian/").items():
            high, sigmas = (63, 15.0) if "tok_emb" in name else (31, 12.85)
            w = tensors[name].astype(np.float32)
            c.add(name, gptq_codes(w, hessian, sd_scale(w, high, sigmas), high), codes[name])
    return [c]


def _units(ctx: Context, z: Reference) -> list[Comparison]:
    """Stand-alone matrices: true row lengths, zero rows, ties, synthetic Hessians, a bfloat16 table."""
    c, gptq = Comparison("quant: unit matrices", 0.0, "equal"), Comparison("quant: synthetic GPTQ", CODES["pr2005"], "equal")
    for size in {k.split("/")[1] for k in z if re.fullmatch(r"unit/\w+/w", k)}:  # PR 1182
        w = z[f"unit/{size}/w"]
        for scheme, tag in (("int6_matrix_search", "int6"), ("int8_percentile", "int8")):
            codes, scale = SCHEMES[scheme].make(w, 1.0, None)
            c.add(f"{size}/{tag}", codes, z[f"unit/{size}/{tag}_q"])
            c.add(f"{size}/{tag} scale", scale, z[f"unit/{size}/{tag}_scale"])
    if "unit/in" in z:  # PR 638
        for scheme, tag in (("int6_row_floor", "int6"), ("int8_percentile", "int8")):
            codes, scale = SCHEMES[scheme].make(z["unit/in"], 1.0, None)
            c.add(f"unit/{tag}", codes, z[f"unit/{tag}_q"])
            c.add(f"unit/{tag} scale", scale, z[f"unit/{tag}_scale_fp16"])
    if "bf16case/in" in z:
        table = {"tok_emb.weight": z["bf16case/in"].astype(ml_dtypes.bfloat16)}
        q = quantize(table, quant_config(ctx, ctx.model().settings))["tok_emb.weight"]
        c.add("bf16case", q.codes, z["bf16case/q"])
        c.add("bf16case dequantized", dequantize(q).astype(np.float32), z["bf16case/deq"])
    for key in z:
        if match := re.fullmatch(r"syn/(\w+)/W", key):  # PR 2005
            case = f"syn/{match[1]}"
            high, sigmas = int(z[f"{case}/clip_range"]), float(z[f"{case}/clip_sigmas"])
            gptq.add(case, gptq_codes(z[key], z[f"{case}/H"], sd_scale(z[key], high, sigmas), high), z[f"{case}/q"])
        elif key.startswith("int8_clip_abs/") and (w := ctx.model().params) is not None:
            name = canonical_name(key.removeprefix("int8_clip_abs/"))
            c.add(key, torch_quantile(sorted_rows(to_tensors(ctx.model().config, w)[name]), 99.99984 / 100), z[key])
    return [c, gptq]


def _pruning(z: Reference) -> Comparison:
    """PR 562: thresholds and numbers of zeroed weights."""
    c = Comparison("quant_large: pruning", 0.0, "equal")
    for name, threshold, count in zip(json.loads(str(z["prune/names"])), z["prune/threshold"], z["prune/zeroed"], strict=True):
        if f"param/{name}" in z:
            w = z[f"param/{name}"]
            c.add(f"{name} threshold", torch_quantile(np.sort(np.abs(w), axis=None), 0.03), np.float32(threshold))
            c.add(f"{name} zeroed", (prune_by_magnitude(w, 0.03) == 0).sum(), count)
    return c


def _portable(ctx: Context) -> list[Comparison]:
    z, m = ctx.file("portable"), ctx.model("portable")
    hessians = _hessians(ctx, z) if ctx.recipe == "pr2005" else None
    ours = quantize(to_tensors(m.config, m.params), quant_config(ctx, m.settings), hessians)
    tolerance = 1e-3 if hessians is not None else 0.0
    c_codes, c_scale = Comparison("quant: codes", tolerance, "equal"), Comparison("quant: scales", tolerance, "equal")
    c_kind, c_deq = Comparison("quant: kinds", 0.0, "equal"), Comparison("quant: dequantized", tolerance, "equal")
    codes, scales, _ = _stored(z, "")
    _compare(ours, codes, scales, {}, c_codes, c_scale, c_kind)
    for key in z:
        if key.startswith("kind/"):
            c_kind.add(key, ours[canonical_name(key[5:])].kind == str(z[key]), True)
        elif key.startswith("dequant/"):
            c_deq.add(key, dequantize(ours[canonical_name(key[8:])]), z[key])
    return [c_codes, c_scale, c_kind, c_deq, *_artifact(ctx, "quant", z, "", codes, scales, {}), *_from_stored_hessians_portable(ctx, z)]


def _from_stored_hessians_portable(ctx: Context, z: Reference) -> list[Comparison]:
    m = ctx.model("portable")
    return [c for c in _from_stored_hessians(ctx, z, to_tensors(m.config, m.params)) if c.compared]
