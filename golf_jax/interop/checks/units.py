"""Single parts against stored vectors: attention modules, XSA, RoPE, hash buckets, fake quantization."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import ModelConfig
from golf_jax.interop.checks.base import CheckResult, Comparison, Context, Measure, Reference
from golf_jax.kernels.attention import xsa_attention
from golf_jax.kernels.attention.xsa import exclude_self_value
from golf_jax.kernels.fake_quant import RowScheme, fake_quant
from golf_jax.model import layers as ops
from golf_jax.model.gpt import attention
from golf_jax.quant.schemes import SCHEMES, sorted_rows, torch_quantile

BAR: dict[str, tuple[float, Measure]] = {"pr372": (1e-4, "of max"), "pr1182": (1e-5, "rel L2"), "pr2005": (1e-4, "of max")}


def check_units(ctx: Context) -> list[CheckResult]:
    """Whichever of the unit files there are."""
    readers: dict[str, Callable[[Context, Reference], list[Comparison]]] = {
        "rope": _rope_372,
        "attn_gqa": _attention_372,
        "fakequant": _fake_quant_372,
        "attn_unit": _attention_1182,
        "hash": _hash_1182,
        "units": _units_2005,
    }
    found = [c for name, read in readers.items() if ctx.has(name) for c in read(ctx, ctx.file(name))]
    return [c.result() for c in found if c.compared]


def _module(config: ModelConfig, w: dict[str, np.ndarray], x: np.ndarray, v0: Any = None, ve: Any = None) -> tuple[np.ndarray, dict]:
    """Output and taps of one attention layer with weights in the PR's orientation (out, in)."""
    turned = {k: jnp.asarray(v.T if v.ndim == 2 else v) for k, v in w.items()}
    tables = ops.rope_tables(x.shape[1], config.rope_dims or config.head_dim, config.rope_base, config.rope_train_len, False)
    taps: dict[str, jax.Array] = {}
    out, _ = attention(config, 0, turned, jnp.asarray(x), v0, ve, tables, None, taps.__setitem__)
    return np.asarray(out), {k: np.asarray(v) for k, v in taps.items()}


def _one_layer(h: dict[str, Any], **parts: Any) -> ModelConfig:
    common = dict(num_layers=1, dtype="float32", attention="xla", width=h["dim"], num_kv_heads=h["num_kv_heads"])
    return ModelConfig(num_heads=h["num_heads"], **common, **parts)  # pyright: ignore[reportArgumentType]


def _rope_372(ctx: Context, z: Reference) -> list[Comparison]:
    c, h, pick = Comparison("RoPE tables", 1e-5, "abs"), z.config(), z["rows"]
    low = Comparison("RoPE tables, bfloat16 frequencies", 2.0**-8, "abs")
    for kind, bf16, target in (("fp32", False, c), ("bf16inv_exactpos", True, low)):
        cos, sin = ops.rope_tables(h["seq"], h["head_dim"], h["base"], 0, bf16)
        target.add(f"cos_{kind}", np.asarray(cos)[pick], z[f"cos_{kind}"])
        target.add(f"sin_{kind}", np.asarray(sin)[pick], z[f"sin_{kind}"])
    return [c, low]


def _attention_372(ctx: Context, z: Reference) -> list[Comparison]:
    h, c, ids = z.config(), Comparison("attention unit", *BAR["pr372"]), Comparison("hash unit", 0.0, "equal")
    p = z.under("param/")
    w = {"q": p["c_q.weight"], "k": p["c_k.weight"], "v": p["c_v.weight"], "o": p["proj.weight"], "q_gain": p["q_gain"]}
    for key, xsa in (("y_no_xsa", 0), ("y_xsa", 1)):
        config = _one_layer(h, rope_base=h["rope_base"], xsa_last_n=xsa)
        c.add(key, _module(config, w, z["x"])[0], z[key])
    if "xsa_unit/y" in z:
        c.add("xsa_unit", exclude_self_value(jnp.asarray(z["xsa_unit/y"]), jnp.asarray(z["xsa_unit/v"])), z["xsa_unit/out"])
    if "rope_unit/x" in z:
        x = np.moveaxis(z["rope_unit/x"], 1, 2)
        tables = ops.rope_tables(x.shape[1], x.shape[-1], h["rope_base"], 0, False)
        c.add("rope_unit", np.moveaxis(np.asarray(ops.rope(jnp.asarray(x), *tables)), 1, 2), z["rope_unit/out"])
    for key in z:
        if key.startswith("hash_unit/ids_"):
            ids.add(key, ops.bigram_ids(jnp.asarray(z["hash_unit/tokens"]), int(key.split("_")[-1])), z[key])
    return [c, ids]


def _fake_quant_372(ctx: Context, z: Reference) -> list[Comparison]:
    c = Comparison("fake quantization unit", 0.0, "equal")
    w = jnp.asarray(z["W"])
    for name, levels, scheme in (("int6", 31, "int6_row"), ("int5", 15, "int5_row")):
        grid = RowScheme(levels, -levels - 1 if levels == 15 else -levels, absmax_floor=1e-8)
        column = jnp.arange(w.shape[1], dtype=jnp.float32)
        ours, pull = jax.vjp(lambda w, grid=grid: fake_quant(w, grid, axis=1), w)
        c.add(f"{name}/fake", ours, z[f"{name}/fake"])
        c.add(f"{name}/gradient", pull(jnp.broadcast_to(column, w.shape))[0], z[f"{name}/grad_of_sum_o_times_col"])
        _codes(c, z, name, scheme)
    _codes(c, z, "int8", "int8_percentile")
    if "int8/clip_abs" in z:
        c.add("int8/clip_abs", torch_quantile(sorted_rows(z["W"]), 99.99984 / 100), z["int8/clip_abs"])
    return [c]


def _codes(c: Comparison, z: Reference, name: str, scheme: str) -> None:
    codes, scale = SCHEMES[scheme].make(z["W"], 1.0, None)
    c.add(f"{name}/codes", codes, z[f"{name}/codes"])
    c.add(f"{name}/scale", scale, z[f"{name}/scale_fp16"])


def _attention_1182(ctx: Context, z: Reference) -> list[Comparison]:
    h, c = z.config(), Comparison("attention unit", *BAR["pr1182"])
    h |= {"num_heads": h["heads"], "num_kv_heads": h["kv_heads"]}
    w = {"q": z["q_w"], "k": z["k_w"], "v": z["v_w"], "o": z["out_w"], "q_gain": z["q_gain"], "vr_lambda": z["vr_lambda"]}
    tables = Comparison("RoPE tables", 1e-5, "abs")
    for key in z:
        if key.startswith("y/xsa"):
            xsa, ve, v0 = (key.split("/")[1].split("_")[i][-1] == "1" for i in range(3))
            config = _one_layer(
                h, rope_dims=h["rope_dims"], rope_train_len=h["rope_train_seq_len"], xsa_last_n=int(xsa), value_residual=True
            )
            embed, first = (jnp.asarray(z["v_embed"]) if ve else None), (jnp.asarray(z["v0"]) if v0 else None)
            out, taps = _module(config, w, z["x"], first, embed)
            c.add(key, out, z[key])
            if not (xsa or v0) and f"raw_v/ve{int(ve)}" in z:
                c.add(f"raw_v/ve{int(ve)}", taps["v_raw"], z[f"raw_v/ve{int(ve)}"])
        elif key.startswith("rope/") and key.endswith("/pos"):
            length, reference = (int(part.lstrip("Ttrain")) for part in key.split("/")[1].split("_"))
            cos, sin = ops.rope_tables(length, h["rope_dims"], 10_000.0, reference, False)
            tables.add(key.replace("pos", "cos"), np.asarray(cos)[z[key]], z[key.replace("pos", "cos")])
            tables.add(key.replace("pos", "sin"), np.asarray(sin)[z[key]], z[key.replace("pos", "sin")])
    if "rope_apply_in" in z:
        x = jnp.asarray(z["rope_apply_in"])
        cos_sin = ops.rope_tables(x.shape[1], h["rope_dims"], 10_000.0, h["rope_train_seq_len"], False)
        c.add("rope applied", ops.rope(x, *cos_sin), z["rope_apply_out"])
    if "xsa_in_y" in z:
        c.add("xsa unit", exclude_self_value(jnp.asarray(z["xsa_in_y"]), jnp.asarray(z["xsa_in_v"])), z["xsa_out"])
    return [c, tables]


def _hash_1182(ctx: Context, z: Reference) -> list[Comparison]:
    c, h = Comparison("hash unit", 0.0, "equal"), z.config()
    for prefix in ("", "big_"):  # big_: token ids up to 65535, where the int32 products wrap
        if f"{prefix}tokens" in z:
            tokens = jnp.asarray(z[f"{prefix}tokens"])
            c.add(f"{prefix}bigram", ops.bigram_ids(tokens, h["bigram_buckets"]), z[f"{prefix}bigram"])
            c.add(f"{prefix}trigram", ops.trigram_ids(tokens, h["trigram_buckets"], bigram_at_1=True), z[f"{prefix}trigram"])
    return [c]


def _units_2005(ctx: Context, z: Reference) -> list[Comparison]:
    c, tables = Comparison("attention unit", *BAR["pr2005"]), Comparison("RoPE tables", 1e-5, "abs")
    settings = ctx.model().config if ctx.has("model") else None
    dims = settings.rope_dims if settings else 16
    if "attn/x" in z:
        w = {ours: z[f"attn/{k}_A"] @ z[f"attn/{k}_B"] for ours, k in (("q", "c_q"), ("k", "c_k"), ("v", "c_v"), ("o", "proj"))}
        heads, kv, width = z["attn/q"].shape[2], z["attn/k"].shape[2], z["attn/x"].shape[-1]
        h = {"dim": width, "num_heads": heads, "num_kv_heads": kv}
        config = _one_layer(h, rope_dims=dims, xsa_last_n=1, head_gate="query_rows")
        out, taps = _module(config, w | {"q_gain": z["attn/q_gain"]}, z["attn/x"])
        plain = xsa_attention(*(jnp.asarray(taps[k]) for k in "qkv"), xsa=False)
        pairs = {"q": taps["q"], "k": taps["k"], "v": taps["v"], "sdpa": plain, "after_xsa": taps["y"], "gate_logits": taps["gate"]}
        for key, ours in (pairs | {"preproj": taps["o_in"], "out": out}).items():
            if f"attn/{key}" in z:
                c.add(f"attn/{key}", ours, z[f"attn/{key}"])
    for key in z:
        if key.startswith("rope/cos_T"):
            length = int(key.removeprefix("rope/cos_T"))
            train_len = min(int(k.removeprefix("rope/cos_T")) for k in z if k.startswith("rope/cos_T"))
            cos, sin = ops.rope_tables(length, dims, 10_000.0, train_len, False)
            tables.add(key, cos, z[key])
            tables.add(key.replace("cos", "sin"), sin, z[key.replace("cos", "sin")])
    return [c, tables]
