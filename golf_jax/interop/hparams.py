"""The pull requests' hyperparameters as our configuration.

Every PR names its settings in its own way: environment variables in upper case (PR 372), a nested `env` (PR 638), plain fields. They
are brought to one set of lower-case names and laid on the shipped recipe, whose values stand where a setting is missing. Whatever asks
for a part that does not exist here is refused by name.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from golf_jax.config import GolfError, ModelConfig, load_recipe

# The PR's name -> our field of ModelConfig, or of `fake_quant` behind a dot.
_SHAPE = {
    "vocab_size": "vocab_size", "num_layers": "num_layers", "model_dim": "width", "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads", "mlp_mult": "mlp_ratio", "rope_base": "rope_base", "qk_gain_init": "q_gain_init",
    "logit_softcap": "softcap", "tied_embed_init_std": "embed_init_std", "xsa_last_n": "xsa_last_n",
}  # fmt: skip
_BIGRAM = {"bigram_vocab_size": "bigram_buckets", "bigram_dim": "bigram_dim"}
_LATER = {"leaky_slope": "mlp_slope", "rope_dims": "rope_dims"}
_FIELDS: dict[str, dict[str, str]] = {
    "pr372": _SHAPE | _BIGRAM | {"qat_numel_threshold": "fake_quant.min_numel", "late_k_fp16_layers": "fake_quant.late_k_layers"},
    "pr562": _SHAPE | _BIGRAM | _LATER,
    "pr638": _SHAPE | _BIGRAM | _LATER | {"rope_train_seq_len": "rope_train_len"},
    "pr1182": _SHAPE | _BIGRAM | _LATER | {
        "rope_train_seq_len": "rope_train_len", "trigram_vocab_size": "trigram_buckets", "trigram_dim": "trigram_dim",
        "ve_dim": "value_embed_dim", "ve_layers": "value_embed_layers",
    },
    "pr2005": _SHAPE | _LATER | {
        "train_seq_len": "rope_train_len", "parallel_residual_start": "parallel_from", "loop_start": "loop_start", "loop_end": "loop_end",
        "num_loops": "loop_repeats",
    },
}  # fmt: skip
RECIPES = tuple(_FIELDS)
# Parts that the PR can leave out, all of them there in its recipe: what our fields are then.
_OFF: dict[str, dict[str, Any]] = {
    "ln_scale": {"layer_scale": False}, "value_residual": {"value_residual": False, "value_residual_first": False},
    "gated_attention": {"head_gate": "off"}, "gated_attn": {"head_gate": "off"}, "leaky_relu": {"mlp_slope": 0.0},
    "trigram": {"trigram": "off"}, "trigram_vocab_size": {"trigram": "off"}, "ve_enabled": {"value_embed_layers": ()},
    "skip_gates_enabled": {"skip": "add"}, "num_loops": {"loop_start": -1, "loop_end": -1},
    "use_int6_qat": {"fake_quant.matrices": "none", "fake_quant.in_eval": False}, "use_int5_mlp": {"fake_quant.mlp_levels": 31},
}  # fmt: skip
_KEPT = ("use_int6_qat", "use_int5_mlp")  # PR 372's; scripts after it may carry the names, and mean nothing by them
_PARTS = {
    "pr372": _KEPT,
    "pr562": ("ln_scale", "value_residual", "gated_attention", "trigram"),
    "pr638": ("ln_scale", "value_residual", "gated_attention", "leaky_relu"),
    "pr1182": ("ln_scale", "value_residual", "trigram_vocab_size", "ve_enabled"),
    "pr2005": ("ln_scale", "gated_attn", "skip_gates_enabled", "num_loops"),
}
# Parts that no PR here has: they may only be named to be off, as those of another PR.
_ABSENT = ("dtg_enabled", "mtp_num_heads", "canon_last_n", "delta_gate", "normuon", "value_residual_alpha", "etlb_enabled", "lora_ttt")
_ALIASES = {"xsa_layers": "xsa_last_n", "golden_numel": "qat_numel_threshold", "leakyrelu_slope": "leaky_slope"}
_RULES = "numel_threshold", "embed_clip_sigmas", "attn_clip_sigmas", "mlp_clip_sigmas"
# Names of PR 2135's evaluation -> dotted field of the recipe.
_SCORING = {
    "gptq_calibration_batches": "quant.gptq_batches", "lqer_rank": "quant.lowrank.rank", "lqer_top_k": "quant.lowrank.top",
    "lqer_asym_group": "quant.lowrank.group", "eval_seq_len": "eval.packed.seq_len", "world_size": "eval.packed.ranks",
    "ttt_lora_rank": "eval.documents.rank", "ttt_lora_alpha": "eval.documents.alpha", "ttt_lora_lr": "eval.documents.lr",
    "ttt_beta2": "eval.documents.beta2", "ttt_lora_eps": "eval.documents.eps", "ttt_weight_decay": "eval.documents.weight_decay",
    "ttt_chunk_size": "eval.documents.chunk", "ttt_eval_seq_len": "eval.documents.seq_len", "ttt_batch_size": "eval.documents.batch",
    "phased_ttt_prefix_docs": "eval.documents.prefix", "global_ttt_lr": "eval.documents.global_lr",
    "global_ttt_momentum": "eval.documents.global_momentum", "global_ttt_chunk_tokens": "eval.documents.global_chunk",
    "global_ttt_grad_clip": "eval.documents.clip_norm", "token_threshold": "eval.documents.tilt.threshold",
    "token_boost": "eval.documents.tilt.boost", "token_order": "eval.documents.tilt.order",
}  # fmt: skip

# What the sets of that evaluation say of a case in words alone; a new set says it by the case's `config`.
_NOTES = {"the same run scored without the tilt": {"eval.documents.tilt.order": 0}}


def model_config(recipe: str, config: Mapping[str, Any]) -> ModelConfig:
    """The PR's network as it is computed in float32 with exact RoPE frequencies, `attention="xla"`.

    Parts keep the PR's semantics (PR 638: XSA over the mixed value, ...); sizes may be any. Raises GolfError for an unknown recipe, a
    value of the wrong kind, or a part of the network that is not implemented for the PR.
    """
    if recipe not in RECIPES:
        raise GolfError(f"unknown recipe {recipe!r}; known: {', '.join(RECIPES)}")
    model = replace(load_recipe(recipe).model, rope_bf16_frequencies=False, dtype="float32", attention="xla")
    given, fields, parts = _given(config), _FIELDS[recipe], _PARTS[recipe]
    _refuse(recipe, given, model, {*fields, *parts, *_KEPT})
    changes = {field: _typed(recipe, name, given[name], _at(model, field)) for name, field in fields.items() if name in given}
    for part in parts:
        if part in given and not _boolean(given[part]):
            changes |= _OFF[part]
    model = replace(model, fake_quant=replace(model.fake_quant, **_under("fake_quant.", changes)))
    layers = changes.get("num_layers", model.num_layers)
    changes["xsa_last_n"] = min(changes.get("xsa_last_n", model.xsa_last_n), layers)
    if changes.get("parallel_from", model.parallel_from) >= layers:
        changes["parallel_from"] = -1
    return replace(model, **{field: value for field, value in changes.items() if "." not in field})


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under lower-case names; those of a nested `env` count before the others."""
    env = config.get("env", {})
    found: dict[str, Any] = {}
    for source in (config, env if isinstance(env, Mapping) else {}):
        found |= {_ALIASES.get(k.lower(), k.lower()): v for k, v in source.items() if k != "env"}
    return found


def _refuse(recipe: str, given: Mapping[str, Any], model: ModelConfig, known: set[str]) -> None:
    if not _boolean(given.get("tie_embeddings", True)):
        raise GolfError(f"{recipe}: tie_embeddings is off, and an untied head is not implemented")
    width = given.get("model_dim", model.width)
    if given.get("embedding_dim", width) != width:
        raise GolfError(f"{recipe}: embedding_dim {given['embedding_dim']} differs from model_dim: its projection is not implemented")
    for part in (*_OFF, *_LATER, *_ABSENT):
        if part in given and part not in known and _boolean(given[part]):
            raise GolfError(f"{recipe}: {part} = {given[part]!r} asks for a part that is not implemented for this PR")
    gate = given.get("gated_attn", "headwise")
    if recipe == "pr2005" and _boolean(gate) and gate != "headwise":
        raise GolfError(f"pr2005: gated_attn = {gate!r} is not implemented, only 'headwise'")


def _boolean(value: Any) -> bool:
    return value.lower() not in ("", "0", "false", "off", "none", "no", "0.0") if isinstance(value, str) else bool(value)


def _at(model: ModelConfig, field: str) -> Any:
    return getattr(model.fake_quant, field.removeprefix("fake_quant.")) if "." in field else getattr(model, field)


def _under(prefix: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {field.removeprefix(prefix): value for field, value in changes.items() if field.startswith(prefix)}


def _typed(recipe: str, key: str, value: Any, like: Any) -> Any:
    """`value` in the type of our field."""
    try:
        if isinstance(like, tuple):
            return tuple(int(i) for i in (value.split(",") if isinstance(value, str) else value) if str(i).strip())
        return type(like)(float(value))
    except (TypeError, ValueError):
        raise GolfError(f"{recipe}: hyperparameter {key} is {value!r}, expected {type(like).__name__}") from None


def scoring_settings(given: Mapping[str, Any], note: str) -> dict[str, Any]:
    """How a script with PR 2135's names quantizes and scores: dotted field of the recipe -> value. Nothing where it names neither.

    note: of the case of a reference set that is about to be computed.
    """
    if not {*_RULES, "ttt_lora_rank"} <= {*given}:
        return {}
    rows = given["val_batch_tokens"] // (8 if given["world_size"] == 1 else given["world_size"]) // given["eval_seq_len"]
    found = {field: given[name] for name, field in _SCORING.items() if name in given}
    found |= {"eval.packed.rows": rows, "eval.documents.ranks": given["world_size"]}
    numel, table, attention, mlp = (given[name] for name in _RULES)
    found["quant.rules"] = [
        {"pattern": "", "scheme": "float16", "max_numel": numel},
        {"pattern": "tok_emb", "scheme": "gptq_int7", "sigmas": table},
        {"pattern": ".attn.", "scheme": "gptq_int6", "sigmas": attention},
        {"pattern": "", "scheme": "gptq_int6", "sigmas": mlp},
    ]
    found |= {"model.rope_bf16_frequencies": False, "model.dtype": "float32"}  # the scripts ran in float32
    return found | _NOTES.get(note, {})
