"""Settings that a set of PR 2135 gives only as the script's hyperparameters, as fields of the recipe."""

from collections.abc import Mapping
from typing import Any

_RULES = "numel_threshold", "embed_clip_sigmas", "attn_clip_sigmas", "mlp_clip_sigmas"
_SAME = {
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


_CASES = {"ttt/notilt": {"eval.documents.tilt.order": 0}}  # what a case says by its name alone


def settings(recipe: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Dotted field -> value for the case `where`; nothing for other recipes, and for sets that have no evaluation."""
    if recipe != "pr2135" or not {*_RULES, "ttt_lora_rank"} <= {*given}:
        return {}
    rows = given["val_batch_tokens"] // (8 if given["world_size"] == 1 else given["world_size"]) // given["eval_seq_len"]
    found = {field: given[name] for name, field in _SAME.items() if name in given}
    found |= {"eval.packed.rows": rows, "eval.documents.ranks": given["world_size"]}
    numel, table, attention, mlp = (given[name] for name in _RULES)
    found["quant.rules"] = [
        {"pattern": "", "scheme": "float16", "max_numel": numel},
        {"pattern": "tok_emb", "scheme": "gptq_int7", "sigmas": table},
        {"pattern": ".attn.", "scheme": "gptq_int6", "sigmas": attention},
        {"pattern": "", "scheme": "gptq_int6", "sigmas": mlp},
    ]
    found |= {"model.rope_bf16_frequencies": False, "model.dtype": "float32"}  # the scripts ran in float32
    return found | _CASES.get(where, {})
