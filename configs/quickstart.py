"""Quickstart: a small model on the text every Python carries, on a laptop CPU in minutes.

    python -m golf_jax.train

A miniature of the records: U-Net of blocks with XSA, partial RoPE, SmearGate, BigramHash and LeakyReLU(0.5)^2, Muon and AdamW, linear
warmdown, EMA, int6 rows, zstd. Schedules run on steps, so the run is reproducible.
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
        name="quickstart",
        model=ModelConfig(
            vocab_size=1024,
            num_layers=4,
            width=192,
            num_heads=6,
            num_kv_heads=3,
            mlp_ratio=3.0,
            mlp_slope=0.5,
            rope_dims=16,
            smear_gate=True,
            bigram_buckets=2048,
            bigram_dim=64,
            xsa_last_n=4,
            layer_scale=True,
        ),
        data=DataConfig(train="embedded", seq_len=256, ranks=8, rows_per_rank=2),
        optim=OptimConfig(
            groups=(
                GroupConfig(
                    "matrix",
                    ("matrix", "proj", "gate"),
                    "muon",
                    lr=0.03,
                    weight_decay=0.04,
                    momentum=0.95,
                    momentum_start=0.85,
                    momentum_warmup_steps=100,
                ),
                GroupConfig("token", ("token", "table"), "adamw", lr=0.03, weight_decay=0.04),
                GroupConfig("vector", ("vector",), "adamw", lr=0.02, weight_decay=0.04),
            ),
        ),
        budget=BudgetConfig(steps=400),
        schedule=ScheduleConfig(warmdown_frac=0.6, ema_decay=0.98, export="ema"),
        quant=QuantConfig(rules=(QuantRule("", "float16", max_numel=8192), QuantRule("", "int6_row")), compressor="zstd", level=22),
        eval=EvalConfig(sliding=SlidingConfig(stride=64, windows="exact")),
        numerics="fp32",
        micro_rows=2,
    )
