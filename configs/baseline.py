"""The challenge's naive baseline: 9 layers, relu^2, no trick of the records.

    python -m golf_jax.train baseline

Source: openai/parameter-golf, `train_gpt.py` as of the baseline record (2026-03-17). Full size as run: 17,059,912 parameters,
524,288 tokens per step (8 ranks x 64 sequences x 1024), 600 s on 8xH100.
Expected: 1.2244 bpb (standard evaluation of the int8 model, non-overlapping windows of 1024), 15,863,489 bytes with code, 43.5
ms per step, about 13,780 steps.
Differs from the original: the artifact is compressed by zstd instead of zlib.
"""

from golf_jax.config import (
    BudgetConfig,
    DataConfig,
    EvalConfig,
    GroupConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    QuantRule,
    Recipe,
    ScheduleConfig,
    SlidingConfig,
)


def recipe() -> Recipe:
    return Recipe(
        name="baseline",
        model=ModelConfig(vocab_size=1024, num_layers=9, width=512, num_heads=8, num_kv_heads=4, mlp_ratio=2.0, linear_init="uniform"),
        data=DataConfig(
            train="data/datasets/fineweb10B_sp1024/fineweb_train_*.bin",
            val="data/datasets/fineweb10B_sp1024/fineweb_val_*.bin",
            tokenizer="data/tokenizers/fineweb_1024_bpe.model",
            seq_len=1024,
            rows_per_rank=64,
        ),
        optim=OptimConfig(
            groups=(
                GroupConfig(
                    "matrix", ("matrix", "proj", "gate"), "muon", lr=0.04, momentum=0.95, momentum_start=0.85, momentum_warmup_steps=500
                ),
                GroupConfig("token", ("token", "table", "trigram"), "adamw", lr=0.05),
                GroupConfig("vector", ("vector",), "adamw", lr=0.04),
            ),
            clip_norm=0.0,
        ),
        budget=BudgetConfig(seconds=600.0),
        schedule=ScheduleConfig(warmdown_steps=1200, ema_decay=0.0, export="raw"),
        quant=QuantConfig(
            rules=(
                QuantRule("attn_scale|mlp_scale|resid_mix|q_gain|skip_weight", "float32", max_numel=65_536),
                QuantRule("", "float16", max_numel=65_536),
                QuantRule("", "int8_percentile"),
            ),
            compressor="zstd",
            level=22,
        ),
        eval=EvalConfig(every=1000, sliding=SlidingConfig(stride=0)),
    )
