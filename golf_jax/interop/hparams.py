"""The pull requests' hyperparameters as our configuration.

Every PR names its settings in its own way: environment variables in upper case (PR 372), a nested `env` (PR 638), plain fields. They
are brought to one set of lower-case names, missing ones take the PR's value, and whatever asks for a part that does not exist here is
refused by name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from golf_jax.config import FakeQuantConfig, GolfError, ModelConfig, load_recipe

RECIPES = ("pr372", "pr562", "pr638", "pr1182", "pr2005")

_SHAPE = {
    "vocab_size": 1024, "num_layers": 11, "model_dim": 512, "num_heads": 8, "num_kv_heads": 4, "mlp_mult": 3.0,
    "rope_base": 10_000.0, "qk_gain_init": 1.5, "logit_softcap": 30.0, "tied_embed_init_std": 0.005, "bigram_vocab_size": 2048,
    "bigram_dim": 128, "xsa_last_n": 0,
}  # fmt: skip
_TRAIN = {
    "iterations": 0, "warmdown_iters": 3500, "tied_embed_lr": 0.035, "matrix_lr": 0.025, "scalar_lr": 0.025, "muon_momentum": 0.99,
    "muon_momentum_warmup_start": 0.92, "muon_momentum_warmup_steps": 1500, "muon_backend_steps": 5, "beta1": 0.9, "beta2": 0.95,
    "adam_eps": 1e-8, "grad_clip_norm": 0.3, "ema_decay": 0.997, "muon_wd": 0.04, "adam_wd": 0.04,
}  # fmt: skip

# What each PR's script does when a setting is absent.
DEFAULTS: dict[str, dict[str, Any]] = {
    "pr372": _SHAPE
    | {"rope_base": 500_000.0, "bigram_dim": 64, "xsa_last_n": 4, "qat_numel_threshold": 65_536, "late_k_fp16_layers": 1}
    | {"use_int6_qat": True, "use_int5_mlp": True}
    | _TRAIN
    | {"warmdown_iters": 2000, "warmdown_lr_floor": 0.1, "tied_embed_lr": 0.03, "matrix_lr": 0.02, "scalar_lr": 0.02}
    | {"muon_momentum": 0.95, "muon_momentum_warmup_start": 0.85, "muon_momentum_warmup_steps": 500, "grad_clip_norm": 0.0}
    | {"adam_wd": 0.0},
    "pr562": _SHAPE
    | {"num_layers": 10, "xsa_last_n": 4, "ln_scale": True, "leaky_slope": 0.5, "rope_dims": 0, "value_residual": True}
    | {"gated_attention": True, "trigram": True}
    | _TRAIN
    | {"tied_embed_lr": 0.03, "matrix_lr": 0.02, "scalar_lr": 0.02, "weight_decay": 0.04, "swa_enabled": True, "swa_every": 50}
    | {"swa_start_frac": 0.4, "late_qat": False, "qat_threshold": 0.5},
    "pr638": _SHAPE
    | {"bigram_vocab_size": 4096, "xsa_last_n": 11, "ln_scale": True, "leaky_relu": True, "leaky_slope": 0.5, "rope_dims": 16}
    | {"rope_train_seq_len": 1024, "value_residual": True, "gated_attention": True}
    | _TRAIN,
    "pr1182": _SHAPE
    | {"bigram_dim": 96, "xsa_last_n": 7, "ln_scale": True, "rope_dims": 16, "rope_train_seq_len": 1024, "value_residual": True}
    | {"leaky_slope": 0.5, "trigram_vocab_size": 1024, "trigram_dim": 128, "ve_enabled": True, "ve_dim": 128, "ve_layers": "5,9,10"}
    | _TRAIN
    | {"swa_enabled": True, "swa_every": 50, "late_qat_threshold": 0.0, "compile_warmup_steps": 0},
    "pr2005": {k: v for k, v in _SHAPE.items() if not k.startswith("bigram")}
    | {"vocab_size": 8192, "mlp_mult": 4.0, "qk_gain_init": 5.25, "xsa_last_n": 11, "ln_scale": True, "rope_dims": 16}
    | {"train_seq_len": 2048, "gated_attn": "headwise", "skip_gates_enabled": True, "parallel_residual_start": 7, "num_loops": 2}
    | {"loop_start": 3, "loop_end": 5, "leaky_slope": 0.5}
    | _TRAIN
    | {"warmdown_frac": 0.72, "min_lr": 0.0, "enable_looping_at": 0.35, "tied_embed_lr": 0.03, "matrix_lr": 0.022}
    | {"scalar_lr": 0.02, "muon_wd": 0.095, "adam_wd": 0.02, "embed_wd": 0.085, "ema_decay": 0.9965, "muon_row_normalize": True},
}
_ALIASES = {"xsa_layers": "xsa_last_n", "golden_numel": "qat_numel_threshold", "leakyrelu_slope": "leaky_slope"}
# Parts of a network that only some of the PRs have. Where a PR does not list one above, it may only be named to be off.
_PARTS = (
    "value_residual", "gated_attention", "gated_attn", "trigram", "trigram_vocab_size", "ve_enabled", "num_loops", "skip_gates_enabled",
    "dtg_enabled", "mtp_num_heads", "canon_last_n", "delta_gate", "normuon", "value_residual_alpha", "etlb_enabled", "ln_scale",
    "leaky_slope", "leaky_relu", "rope_dims", "lora_ttt",
)  # fmt: skip


def hyperparameters(recipe: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` under lower-case names with the PR's defaults filled in, every value of its default's type.

    Raises GolfError for an unknown recipe, a value of the wrong kind, or a part of the network that is not implemented for the PR.
    """
    if recipe not in RECIPES:
        raise GolfError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    defaults = DEFAULTS[recipe]
    given: dict[str, Any] = {}
    env = config.get("env", {})
    for source in (config, env if isinstance(env, Mapping) else {}):
        given |= {_ALIASES.get(k.lower(), k.lower()): v for k, v in source.items() if k != "env"}
    if not _boolean(given.get("tie_embeddings", True)):
        raise GolfError(f"{recipe}: tie_embeddings is off, and an untied head is not implemented")
    width = given.get("model_dim", defaults["model_dim"])
    if given.get("embedding_dim", width) != width:
        raise GolfError(f"{recipe}: embedding_dim {given['embedding_dim']} differs from model_dim: its projection is not implemented")
    for part in _PARTS:
        if part in given and part not in defaults and _boolean(given[part]):
            raise GolfError(f"{recipe}: {part} = {given[part]!r} asks for a part that is not implemented for this PR")
    return {key: _typed(recipe, key, given[key], value) if key in given else value for key, value in defaults.items()}


def _boolean(value: Any) -> bool:
    return value.lower() not in ("", "0", "false", "off", "none", "no", "0.0") if isinstance(value, str) else bool(value)


def _typed(recipe: str, key: str, value: Any, default: Any) -> Any:
    if isinstance(default, bool):
        return _boolean(value)
    if key == "ve_layers" and not isinstance(value, str):
        return ",".join(str(v) for v in value)
    try:
        return type(default)(float(value) if isinstance(default, int) else value)
    except (TypeError, ValueError):
        raise GolfError(f"{recipe}: hyperparameter {key} is {value!r}, expected {type(default).__name__}") from None


def model_config(recipe: str, config: Mapping[str, Any]) -> ModelConfig:
    """The PR's network as it is computed in float32 with exact RoPE frequencies, `attention="xla"`.

    Parts keep the PR's semantics (PR 638: XSA over the mixed value, ...); sizes may be any. Raises GolfError (see `hyperparameters`).
    """
    h = hyperparameters(recipe, config)
    return replace(
        load_recipe(recipe).model,
        vocab_size=h["vocab_size"],
        num_layers=h["num_layers"],
        width=h["model_dim"],
        num_heads=h["num_heads"],
        num_kv_heads=h["num_kv_heads"],
        mlp_ratio=float(h["mlp_mult"]),
        rope_base=h["rope_base"],
        rope_bf16_frequencies=False,
        q_gain_init=h["qk_gain_init"],
        softcap=h["logit_softcap"],
        embed_init_std=h["tied_embed_init_std"],
        xsa_last_n=min(h["xsa_last_n"], h["num_layers"]),
        layer_scale=h.get("ln_scale", False),
        dtype="float32",
        attention="xla",
        **_PARTS_OF[recipe](h),
    )


def _pr372(h: dict[str, Any]) -> dict[str, Any]:
    fake_quant = FakeQuantConfig(
        matrices="all" if h["use_int6_qat"] else "none",
        attn_levels=31,
        mlp_levels=15 if h["use_int5_mlp"] else 31,
        min_numel=h["qat_numel_threshold"],
        late_k_layers=h["late_k_fp16_layers"],
        in_eval=h["use_int6_qat"],
    )
    return _bigram(h) | {"fake_quant": fake_quant}


def _pr562(h: dict[str, Any]) -> dict[str, Any]:
    return _bigram(h) | _values_and_gate(h) | {
        "mlp_slope": h["leaky_slope"],
        "rope_dims": h["rope_dims"],
        "trigram": "shared" if h["trigram"] else "off",
        "value_residual_first": h["value_residual"],
    }  # fmt: skip


def _pr638(h: dict[str, Any]) -> dict[str, Any]:
    return _bigram(h) | _values_and_gate(h) | {
        "mlp_slope": h["leaky_slope"] if h["leaky_relu"] else 0.0,
        "rope_dims": h["rope_dims"],
        "rope_train_len": h["rope_train_seq_len"],
    }  # fmt: skip


def _pr1182(h: dict[str, Any]) -> dict[str, Any]:
    layers = tuple(int(i) for i in h["ve_layers"].split(",") if i.strip()) if h["ve_enabled"] else ()
    return _bigram(h) | {
        "mlp_slope": h["leaky_slope"],
        "rope_dims": h["rope_dims"],
        "rope_train_len": h["rope_train_seq_len"],
        "value_residual": h["value_residual"],
        "trigram": "table" if h["trigram_vocab_size"] else "off",
        "trigram_buckets": h["trigram_vocab_size"],
        "trigram_dim": h["trigram_dim"],
        "value_embed_layers": layers,
        "value_embed_dim": h["ve_dim"],
    }


def _pr2005(h: dict[str, Any]) -> dict[str, Any]:
    if _boolean(h["gated_attn"]) and h["gated_attn"] != "headwise":
        raise GolfError(f"pr2005: gated_attn = {h['gated_attn']!r} is not implemented, only 'headwise'")
    looped = h["num_loops"] > 0
    return {
        "mlp_slope": h["leaky_slope"],
        "rope_dims": h["rope_dims"],
        "rope_train_len": h["train_seq_len"],
        "head_gate": "query_rows" if _boolean(h["gated_attn"]) else "off",
        "skip": "gated" if h["skip_gates_enabled"] else "add",
        "parallel_from": h["parallel_residual_start"] if h["parallel_residual_start"] < h["num_layers"] else -1,
        "loop_start": h["loop_start"] if looped else -1,
        "loop_end": h["loop_end"] if looped else -1,
        "loop_repeats": h["num_loops"] if looped else 0,
    }


def _bigram(h: dict[str, Any]) -> dict[str, Any]:
    return {"bigram_buckets": h["bigram_vocab_size"], "bigram_dim": h["bigram_dim"]}


def _values_and_gate(h: dict[str, Any]) -> dict[str, Any]:
    return {"value_residual": h["value_residual"], "head_gate": "linear" if h["gated_attention"] else "off"}


_PARTS_OF = {"pr372": _pr372, "pr562": _pr562, "pr638": _pr638, "pr1182": _pr1182, "pr2005": _pr2005}
