"""PR 562: 10 layers, value residual, gated attention, trigram hash, SWA, pruning, int5/int6, 22 epochs of test-time training.

    python -m golf_jax.train pr562

Full size as run: 24,509,621 parameters, 786,432 tokens per step (8 ranks x 48 sequences x 2048), 600 s on 8xH100.
Expected (one seed): 1.1354 bpb sliding (stride 64) after test-time training, 15,352,153 bytes with code, 115.4 ms per step, 5,195 steps.
What the PR says and what ran:
- **The test-time training is illegal** (C3): it trains on the whole validation set before any of it is scored, and evaluation took
  603 s. It is reproduced as a reference; `--eval.adapt-first.epochs 0` gives the honest score of the model.
- The log of 1.1354 comes from a script without the trigram lookup (`--model.trigram off`); no parameter differs.
- README: matrix learning rate 0.03; log: 0.02. Late QAT never reached the compiled training graph, but acts in every TTT forward.
- Full RoPE (the blurb's 16 of 64 dimensions is not what the default runs).
- The key matrix of the last layer but one is kept in fp16: a left-over default, which runs.
"""

from golf_jax.config import (
    AdaptFirstConfig,
    BudgetConfig,
    DataConfig,
    EvalConfig,
    FakeQuantConfig,
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
        name="pr562",
        model=ModelConfig(
            vocab_size=1024,
            num_layers=10,
            width=512,
            num_heads=8,
            num_kv_heads=4,
            mlp_ratio=3.0,
            mlp_slope=0.5,
            smear_gate=True,
            bigram_buckets=2048,
            bigram_dim=128,
            trigram="shared",
            xsa_last_n=4,
            value_residual=True,
            value_residual_first=True,
            head_gate="linear",
            layer_scale=True,
            fake_quant=FakeQuantConfig(matrices="all", attn_levels=31, mlp_levels=31, scale_floor=1 / 31),
            bf16_params=("tok_emb", "bigram_table", "gate"),
        ),
        data=DataConfig(
            train="data/datasets/fineweb10B_sp1024/fineweb_train_*.bin",
            val="data/datasets/fineweb10B_sp1024/fineweb_val_*.bin",
            tokenizer="data/tokenizers/fineweb_1024_bpe.model",
        ),
        optim=OptimConfig(
            groups=(
                GroupConfig("matrix", ("matrix", "proj", "gate"), "muon", lr=0.02, weight_decay=0.04),
                GroupConfig("token", ("token", "table", "trigram"), "adamw", lr=0.03, weight_decay=0.04),
                GroupConfig("vector", ("vector",), "adamw", lr=0.02, weight_decay=0.04),
            ),
        ),
        budget=BudgetConfig(seconds=600.0),
        schedule=ScheduleConfig(warmdown_steps=3500, ema_decay=0.0, swa_every=50, swa_below=0.4, export="swa"),
        quant=QuantConfig(
            rules=(
                QuantRule("", "float16", max_numel=8192),
                QuantRule("tok_emb|blocks.-2.attn.c_k", "float16"),
                QuantRule(".mlp.", "int5_row_search"),
                QuantRule("", "int6_row_search"),
            ),
            prune_fraction=0.03,
            prune_min_numel=65_536,
            compressor="zstd",
            level=22,
        ),
        eval=EvalConfig(
            every=500,
            sliding=SlidingConfig(stride=64, windows="tail_min"),
            adapt_first=AdaptFirstConfig(
                stride=64,
                windows="tail_min",
                lr=5e-4,
                epochs=22,
                fake_quant=True,
                proj_lr_scale=3.0,
                fc_lr_scale=0.5,
            ),
        ),
        seed=42,
    )
