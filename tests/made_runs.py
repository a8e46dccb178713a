"""What the files of a finished run say, made up."""

import math
from typing import Any

ENVIRONMENT = {"devices": ["cpu"] * 4, "devices_used": 2, "packages": {"jax": "0.10.2", "numpy": "2.4.6", "golf-jax": "0.1.0"}}
FACTS = {"targets": 1_000, "covered": 1_000, "duplicates": 0, "order_violations": 0, "updates": 0, "causal": True}
TRAIN = {"steps": 10, "seconds": 500.0, "final_loss": 3.0, "compile_seconds": {"train": 1.0}}
TEXT = {"tokenizer": "0" * 64, "train": [], "val": [{"name": "val_0.bin", "bytes": 9, "content": "0"}], "digest": "0"}

KEPT: dict[str, Any] = {"recipe": {}, "text": TEXT, "dtype": "float32"}  # what a run adds to its checkpoints


def evaluation(nats: float = 3_000.0, tokens: int = 1_000, count: int = 2_400) -> dict[str, Any]:
    score = {"nll_nats": nats, "tokens": tokens, "bytes": count, "val_loss": nats / tokens, "val_bpb": nats / count / math.log(2)}
    facts = FACTS | {"targets": tokens, "covered": tokens, "normalization_error": 1e-7, "exactly_once": True}
    legal = {"mode": "standard", "legal": True, "partial": False, "facts": facts}
    return score | legal | {"seconds": {"compile": 1.0, "score": 2.0, "train": 0.0}}


def pack_facts(artifact: int = 10, code: int = 3, raw: int = 9) -> dict[str, Any]:
    sizes = {"artifact_bytes": artifact, "code_bytes": code, "code_bytes_raw": raw, "total_bytes": artifact + code, "headroom_bytes": 1}
    return sizes | {"pre_quantization": evaluation(), "train_and_calibration_seconds": 505.0, "quantization_seconds": 1.0}


def stages() -> dict[str, Any]:
    pack = pack_facts() | {"sha256": "0" * 64}
    return {"text": TEXT, "train": TRAIN, "pack": pack, "evaluations": {"standard": evaluation()}, "changes": []}


def result(**over: Any) -> dict[str, Any]:
    about = {"recipe": "tiny", "steps": 10, "train_seconds": 500.0, "train_loss": 3.0, "tokenizer_sha256": "0" * 64, "text": TEXT}
    return about | {"evaluations": {"standard": evaluation()}, "changes": []} | pack_facts() | over
