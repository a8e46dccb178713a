"""Forward passes: logits, losses, per-token losses, activations, hash buckets; variants of a model; long contexts."""

import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import ModelConfig
from golf_jax.interop.checks.base import CheckResult, Comparison, Context, Model, Reference, compiler_options
from golf_jax.interop.hparams import model_config
from golf_jax.interop.torch_names import from_torch
from golf_jax.kernels.attention import xsa_attention
from golf_jax.model import layers as ops
from golf_jax.model import logits
from golf_jax.model.gpt import nll

Taps = dict[str, np.ndarray]

# Tolerances of the INDEX files: (logits, measure), loss (absolute; PR 638 relative), (activations, measure).
LOGITS: dict[str, tuple[float, Any]] = {
    "pr372": (1e-4, "of max"), "pr562": (1e-4, "abs"), "pr638": (1e-4, "abs"), "pr1182": (1e-4, "abs"), "pr2005": (1e-4, "of max"),
}  # fmt: skip
# PR 638's INDEX allows 1e-4 absolute for activations too, but its residual stream reaches 1,000, where neighbouring float32 numbers are
# 6e-5 to 1.2e-4 apart: against a float64 run the stored stream is itself off by 3.3e-4, ours by 5.8e-4. 1e-5 of the maximum is the
# stricter of the two wherever a tensor stays below 10, and possible above.
ACTS: dict[str, tuple[float, Any]] = LOGITS | {"pr1182": (1e-4, "of max"), "pr638": (1e-5, "of max")}
LOSS: dict[str, tuple[float, Any]] = dict.fromkeys(LOGITS, (1e-5, "abs")) | {"pr638": (1e-6, "rel"), "pr2005": (1e-5, "rel")}


@dataclass(frozen=True)
class Outcome:
    """Host arrays of one forward pass."""

    logits: np.ndarray
    """[B, T, V]"""
    nll: np.ndarray
    """[B, T], by the training path (fused cross entropy)."""
    taps: Taps

    @property
    def loss(self) -> np.floating:
        return self.nll.mean(dtype=np.float64)


def run(ctx: Context, config: ModelConfig, params: dict, tokens: np.ndarray, targets: np.ndarray, looping: bool = True) -> Outcome:
    """Logits, per-token losses and every tapped activation."""

    def forward(params: dict, tokens_BT: jax.Array, targets_BT: jax.Array):
        taps: dict[str, jax.Array] = {}
        out = logits(config, params, tokens_BT, looping=looping, tap=taps.__setitem__)
        return out, nll(config, params, tokens_BT, targets_BT, looping=looping), taps

    compiled = ctx.once(("forward", config, tokens.shape, looping), lambda: jax.jit(forward, compiler_options=compiler_options()))
    out, losses, taps = compiled(params, tokens.astype(np.int32), targets.astype(np.int32))
    return Outcome(np.asarray(out), np.asarray(losses), {name: np.asarray(x) for name, x in taps.items()})


def check_model(ctx: Context) -> list[CheckResult]:
    """model.npz, model_b.npz (or the portable file's model)."""
    names = ["portable"] if ctx.portable else [n for n in ("model", "model_b") if ctx.has(n)]
    return [result for name in names for result in _check_one(ctx, name)]


def _check_one(ctx: Context, name: str) -> list[CheckResult]:
    z, m = ctx.file(name), ctx.model(name)
    label = "model" if name == "portable" else name
    c_logits = Comparison(f"{label}: logits", *((1e-4, "abs") if ctx.portable else LOGITS[ctx.recipe]))
    c_loss = Comparison(f"{label}: loss", *((1e-5, "abs") if ctx.portable else LOSS[ctx.recipe]))
    c_acts = Comparison(f"{label}: activations", *((1e-4, "of max") if ctx.portable else ACTS[ctx.recipe]))
    c_ids = Comparison(f"{label}: hash buckets", 0.0, "equal")
    modes = {"_loop": True, "_noloop": False} if ctx.recipe == "pr2005" else {"": True}
    taps: dict[str, Taps] = {}
    for suffix, looping in modes.items():
        if f"logits{suffix}" in z:
            ours = run(ctx, m.config, m.params, z["tokens"], z["targets"], looping)
            taps[suffix] = ours.taps
            _compare_logits(c_logits, z, suffix, ours.logits)
            _compare_losses(c_loss, z, suffix, ours)
    for key, config in _variants(ctx.recipe, m).items():
        if any(f"{what}_{key}" in z for what in ("logits", "loss")):
            ours = run(ctx, config, m.params, z["tokens"], z["targets"])
            if f"logits_{key}" in z:
                c_logits.add(f"logits_{key}", ours.logits, z[f"logits_{key}"])
            if f"loss_{key}" in z:
                c_loss.add(f"loss_{key}", ours.loss, z[f"loss_{key}"])
            if f"logits_{key}_last16" in z:
                want = z[f"logits_{key}_last16"]
                c_logits.add(f"logits_{key}_last16", ours.logits[:, -want.shape[1] :], want)
    if "logits_short" in z:  # PR 1182: a row shorter than the RoPE reference length
        want, length = z["logits_short"], int(z["short_len"])
        x, y = (z[k][: len(want), :length] for k in ("tokens", "targets"))
        c_logits.add("logits_short", run(ctx, m.config, m.params, x, y).logits[:, -want.shape[1] :], want)
    _compare_acts(ctx, c_acts, z.under("acts/"), m.config, taps)
    _compare_ids(c_ids, z, m.config)
    return [c.result() for c in (c_logits, c_loss, c_acts, c_ids) if c.compared]


def _variants(recipe: str, m: Model) -> dict[str, ModelConfig]:
    """Changed models that a model file may hold results of, by the end of their keys (`logits_...`, `loss_...`)."""

    def in_eval(on: bool) -> ModelConfig:
        return replace(m.config, fake_quant=replace(m.config.fake_quant, in_eval=on))

    return {
        "pr372": {"noqat": in_eval(False)},
        "pr562": {"qat_train_mode": in_eval(True)},
        "pr638": {"rope_train16": replace(m.config, rope_train_len=16)},
        "pr1182": {"qat_train_mode": in_eval(True), "no_ntk": replace(m.config, rope_train_len=1024)},
        "pr2005": {},
    }[recipe]


def _compare_logits(c: Comparison, z: Reference, suffix: str, ours: np.ndarray) -> None:
    want = z[f"logits{suffix}"]
    if want.ndim == 3:
        return c.add(f"logits{suffix}", ours, want)
    flat = ours.reshape(-1, ours.shape[-1])  # PR 2005: whole rows at some positions, and all positions at some token ids
    c.add(f"logits{suffix}", flat[z["logit_positions"]], want)
    if f"logits{suffix}_vocab" in z:
        c.add(f"logits{suffix}_vocab", flat[:, z["logit_vocab_ids"]], z[f"logits{suffix}_vocab"])


def _compare_losses(c: Comparison, z: Reference, suffix: str, ours: Outcome) -> None:
    if f"loss{suffix}" in z:
        c.add(f"loss{suffix}", ours.loss, z[f"loss{suffix}"])
    if f"nll{suffix}" in z:
        c.add(f"mean of nll{suffix}", ours.loss, z[f"nll{suffix}"].mean(dtype=np.float64))
    if f"logsumexp{suffix}" in z:
        lse = np.log(np.exp(ours.logits.astype(np.float64)).sum(-1)).mean()
        c.add(f"mean of logsumexp{suffix}", lse, z[f"logsumexp{suffix}"].mean(dtype=np.float64))


# Reference name of an activation (after the layer) -> our tap; `^` marks [B, heads, T, dim].
_IN_LAYER = {
    "in": "in", "in_after_skip": "in", "out": "out", "attn_norm": "attn_in", "attn_in": "attn_in", "c_q": "q_proj", "cq_out": "q_proj",
    "c_k": "k_proj", "c_v": "v_raw", "cv_out": "v_raw", "raw_v": "v_raw", "q_after_rope": "^q_rope", "k_after_rope": "^k",
    "q_final": "^q", "k_final": "^k", "q_roped_gained": "q", "k_roped": "k", "q": "q", "k": "k", "v": "v", "v_mixed": "v",
    "sdpa": "sdpa", "sdpa_before_xsa": "^sdpa", "sdpa_out": "sdpa", "sdpa_y": "sdpa", "xsa_out": "y", "xsa_y": "y", "gate_logit": "gate",
    "attn_before_proj": "o_in", "attn_after_xsa_before_proj": "o_in", "attn_preproj": "o_in", "attn_pre_proj": "o_in", "preproj": "o_in",
    "attn_out": "attn_out", "attn_proj_out": "attn_out", "mlp_hidden_sq": "down_in", "mlp_out": "mlp_out",
}  # fmt: skip
_HEADS_FIRST = {"pr372": ("sdpa",), "pr638": ("v_mixed",)}
_GLOBAL = {
    "tok_emb": "tok_emb", "bigram_out": "bigram", "hash_emb_out": "bigram", "bigram": "bigram", "trigram": "trigram",
    "emb_sum": "emb_sum", "emb_norm": "emb_norm", "emb_norm_before_smear": "emb_norm", "emb_normed": "emb_norm", "emb": "x0",
    "x0": "x0", "x0_after_smear": "x0", "x0_after_norm_and_smear": "x0", "ve_shared": "ve_shared", "final_norm": "final_norm",
    "final_norm_out": "final_norm",
}  # fmt: skip


def _compare_acts(ctx: Context, c: Comparison, acts: dict[str, np.ndarray], config: ModelConfig, taps: dict[str, Taps]) -> None:
    default = taps.get("", taps.get("_loop", {}))
    encoder, decoder = config.layer_order(looping=True)
    for name, want in acts.items():
        found, step_taps, looping = name, default, True
        if name.startswith(("loop/", "noloop/")) or name.endswith("_noloop"):
            looping = "noloop" not in name
            found = name.removesuffix("_noloop").split("/")[-1]
            step_taps = taps["_loop" if looping else "_noloop"]
        order = encoder + decoder if looping and config.loop_repeats else tuple(range(config.num_layers))
        ours = _activation(ctx.recipe, found, config, order, step_taps, want)
        if ours is None:
            c.fail(f"{name}: no such activation here")
            continue
        if ctx.portable:
            ours = ours[0]  # the portable files keep row 0 of the batch
        c.add(name, ours.reshape(want.shape) if ours.size == want.size else ours, want)


def _activation(recipe: str, name: str, config: ModelConfig, order: tuple[int, ...], taps: Taps, want: np.ndarray) -> np.ndarray | None:
    last = len(order) - 1
    if name in _GLOBAL:
        return taps.get(_GLOBAL[name])
    if name == "layer_order":
        return np.array(order)
    if name == "layer_out_b0":
        return np.stack([taps[f"{s}/out"][0] for s in range(len(order))])
    if name in ("last_out", "last_block_out"):
        return taps[f"{last}/out"]
    if match := re.fullmatch(r"dec(\d+)_in", name):
        return taps[f"{len(config.layer_order(looping=False)[0]) + int(match[1])}/in"]
    match = re.fullmatch(r"(block|attn|mlp)(\d+)[._](.+)", name)
    if not match:
        return None
    kind, layer, what = match[1], int(match[2]), match[3]
    if kind != "block" and f"{kind}_{what}" in _IN_LAYER:
        what = f"{kind}_{what}"
    tap = _IN_LAYER.get(what)
    if tap is None or layer not in order:
        return None
    step = order.index(layer)
    heads_first = tap.startswith("^") or what in _HEADS_FIRST.get(recipe, ())
    tap = tap.removeprefix("^")
    if tap in ("in", "out"):
        return taps[f"{step}/{tap}"]
    if tap == "sdpa":
        q, k, v = (taps[f"{step}/{layer}/{x}"] for x in "qkv")
        found = np.asarray(xsa_attention(*(jax.numpy.asarray(x) for x in (q, k, v)), xsa=False))
    else:
        found = taps[f"{step}/{layer}/{tap}"]
    return np.moveaxis(found, 1, 2) if heads_first else found


def _compare_ids(c: Comparison, z: Reference, config: ModelConfig) -> None:
    tokens = jnp.asarray(z["tokens"], jnp.int32)
    for key in ("bigram_ids", "bigram_hash_ids", "bigram_hash"):
        if key in z:
            c.add(key, ops.bigram_ids(tokens, config.bigram_buckets), z[key])
    for key in ("trigram_ids", "trigram_hash"):
        if key in z:
            table = config.trigram == "table"
            buckets = config.trigram_buckets if table else config.bigram_buckets
            c.add(key, ops.trigram_ids(tokens, buckets, bigram_at_1=table), z[key])


def check_variants(ctx: Context) -> list[CheckResult]:
    """variants.npz of PR 562: the same parameters with one technique switched (and fewer heads, fake quantization)."""
    z, m, source = ctx.file("variants"), ctx.model(), ctx.file("model")
    c_logits, c_loss = Comparison("variants: logits", 1e-4, "abs"), Comparison("variants: loss", 1e-5, "abs")
    for name, about in z.config().items():
        settings = m.settings | {k.lower(): v for k, v in about["env"].items()}
        settings["trigram"] = m.settings.get("trigram", True) and about["script"] != "0323"
        config, params = from_torch(ctx.recipe, settings, source.under("param/") | z.under(f"{name}/param/"))
        if about["qat"] and about["train_mode"]:
            config = replace(config, fake_quant=replace(config.fake_quant, in_eval=True))
        ours = run(ctx, config, params, source["tokens"][:1], source["targets"][:1])
        if f"{name}/logits" in z:
            want = z[f"{name}/logits"]
            stride = -(-ours.logits.shape[1] // want.shape[1])
            c_logits.add(f"{name}/logits", ours.logits[:, ::stride], want)
        if f"{name}/loss" in z:
            c_loss.add(f"{name}/loss", ours.loss, z[f"{name}/loss"])
    return [c_logits.result(), c_loss.result()]


def check_rope_long(ctx: Context) -> list[CheckResult]:
    """rope_long.npz of PR 638: the parameters of model.npz beyond 1024 tokens, where the RoPE base is rescaled."""
    z, m = ctx.file("rope_long"), ctx.model()
    config = model_config(ctx.recipe, z.config())
    ours = run(ctx, config, m.params, z["tokens"], z["targets"])
    c_logits, c_loss = Comparison("rope_long: logits", 1e-4, "abs"), Comparison("rope_long: loss", *LOSS[ctx.recipe])
    c_nll, c_tables = Comparison("rope_long: nll", 1e-4, "abs"), Comparison("rope_long: tables", 1e-4, "abs")
    if "logits_last64" in z:
        c_logits.add("logits_last64", ours.logits[0, -len(z["logits_last64"]) :], z["logits_last64"])
    c_loss.add("loss", ours.loss, z["loss"])
    if "nll" in z:
        c_nll.add("nll", ours.nll.reshape(z["nll"].shape), z["nll"])
    for name, length in (("T", z["tokens"].shape[1]), ("2048", 2048), ("1024", 1024)):
        if f"cos_{name}" in z:
            cos, sin = ops.rope_tables(length, config.rope_dims or config.head_dim, config.rope_base, config.rope_train_len, False)
            c_tables.add(f"cos_{name}", cos, z[f"cos_{name}"])
            c_tables.add(f"sin_{name}", sin, z[f"sin_{name}"])
    return [c.result() for c in (c_logits, c_loss, c_nll, c_tables) if c.compared]
