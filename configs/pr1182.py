"""PR 1182: 11 layers in parameter banks, Parallel Muon, XSA on the last 7, bigram and trigram tables, value embeddings, score-first TTT.

    python -m golf_jax.train pr1182

Full size as run: 27,108,468 parameters, 786,432 tokens per step (8 ranks x 48 sequences x 2048), 600 s on 8xH100.
Expected (seed 1337): 1.1227 bpb after score-first test-time training, 1.1247 sliding, 1.1481 standard, 15,944,685 bytes with code,
92.5 ms per step, 6,487 steps.
What the PR says and what ran:
- The trigram table is in no optimizer: it starts at zero and learns only in test-time training. Its gradient is never cleared, starts
  from the compile warm-up (`schedule.leak_warmup_steps`) and enters every rank's clip norm.
- Gradients are clipped per rank, before averaging.
- Late QAT never reached the compiled training graph; it acts in the training forwards of TTT, on three small projections.
- SWA is computed and thrown away; EMA is exported. "int6 per row": the embedding tables are int8, small tensors fp16.
- README: 90.8 ms per step and evaluation under 600 s; log: 92.5 ms, and 94 + 337 + 580 s of evaluation.
"""

from golf_jax.config import (
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
    ScoreFirstConfig,
    SlidingConfig,
)


def recipe() -> Recipe:
    return Recipe(
        name="pr1182",
        model=ModelConfig(
            vocab_size=1024,
            num_layers=11,
            width=512,
            num_heads=8,
            num_kv_heads=4,
            mlp_ratio=3.0,
            mlp_slope=0.5,
            rope_dims=16,
            rope_train_len=1024,
            smear_gate=True,
            bigram_buckets=2048,
            bigram_dim=96,
            trigram="table",
            trigram_buckets=1024,
            trigram_dim=128,
            hash_proj_init="orthogonal",
            xsa_last_n=7,
            value_residual=True,
            layer_scale=True,
            value_embed_layers=(5, 9, 10),
            value_embed_dim=128,
            fake_quant=FakeQuantConfig(matrices="projections", attn_levels=31, scale_floor=1 / 31),
            bf16_params=("tok_emb", "bigram_table", "trigram_table", "ve_shared_table"),
        ),
        data=DataConfig(
            train="data/datasets/fineweb10B_sp1024/fineweb_train_*.bin",
            val="data/datasets/fineweb10B_sp1024/fineweb_val_*.bin",
            tokenizer="data/tokenizers/fineweb_1024_bpe.model",
        ),
        optim=OptimConfig(
            groups=(
                GroupConfig("matrix", ("matrix",), "muon", lr=0.025, weight_decay=0.04, bf16_momentum=True),
                GroupConfig("token", ("token", "table"), "adamw", lr=0.035, weight_decay=0.04),
                GroupConfig("vector", ("vector", "proj", "gate"), "adamw", lr=0.025, weight_decay=0.04),
                GroupConfig("trigram", ("trigram",), "frozen"),
            ),
            clip_per_rank=True,
        ),
        budget=BudgetConfig(seconds=600.0),
        schedule=ScheduleConfig(warmdown_steps=3500, ema_decay=0.997, swa_every=50, swa_below=0.2, export="ema", leak_warmup_steps=20),
        quant=QuantConfig(
            rules=(
                QuantRule("", "float16", max_numel=65_536),
                QuantRule(".mlp.|.attn.|.proj.", "int6_matrix_search"),
                QuantRule("", "int8_percentile"),
            ),
            compressor="lzma",
            level=6,
        ),
        eval=EvalConfig(
            sliding=SlidingConfig(stride=64, windows="tail"),
            score_first=ScoreFirstConfig(stride=64, windows="tail_min", lr=0.002, momentum=0.9, epochs=4, fake_quant=True),
        ),
    )
