"""PR 372: 11 layers, XSA on the last 4, EMA, int5 MLP / int6 attention fake quantization from the first step to the last evaluation.

    python -m golf_jax.train pr372

Full size as run: 26,666,073 parameters, 524,288 tokens per step (8 ranks x 32 sequences x 2048), 600 s on 8xH100.
Expected (mean of 3 seeds): 1.1361 bpb sliding (stride 64) after quantization, 15,826,438 bytes with code, 65.7 ms per step, 9,126 steps.
The README says otherwise than the code, which is followed here: output projections start at zero (not orthogonal / sqrt(2L)), int5 has
31 levels (-16 is unreachable), the bigram table is int8 (not fp16), XSA removes the component along the own value (not the value), the
learning rate ends at 10 % of its peak, weight decay comes after the update and only on Muon's matrices.
There is no log in the PR; the two sizes in its submission.json are not consistent with each other.
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
    SlidingConfig,
)


def recipe() -> Recipe:
    return Recipe(
        name="pr372",
        model=ModelConfig(
            vocab_size=1024,
            num_layers=11,
            width=512,
            num_heads=8,
            num_kv_heads=4,
            mlp_ratio=3.0,
            rope_base=500_000.0,
            rope_bf16_frequencies=True,
            smear_gate=True,
            bigram_buckets=2048,
            bigram_dim=64,
            xsa_last_n=4,
            fake_quant=FakeQuantConfig(matrices="all", attn_levels=31, mlp_levels=15, min_numel=65_536, late_k_layers=1, in_eval=True),
            bf16_params=("tok_emb",),
        ),
        data=DataConfig(
            train="data/datasets/fineweb10B_sp1024/fineweb_train_*.bin",
            val="data/datasets/fineweb10B_sp1024/fineweb_val_*.bin",
            tokenizer="data/tokenizers/fineweb_1024_bpe.model",
            rows_per_rank=32,
        ),
        optim=OptimConfig(
            groups=(
                GroupConfig(
                    "matrix",
                    ("matrix", "proj", "gate"),
                    "muon",
                    lr=0.02,
                    weight_decay=0.04,
                    momentum=0.95,
                    momentum_start=0.85,
                    momentum_warmup_steps=500,
                ),
                GroupConfig("token", ("token", "table", "trigram"), "adamw", lr=0.03),
                GroupConfig("vector", ("vector",), "adamw", lr=0.02),
            ),
            decay_last=True,
            clip_norm=0.0,
        ),
        budget=BudgetConfig(seconds=600.0),
        schedule=ScheduleConfig(warmdown_steps=2000, lr_floor=0.1, ema_decay=0.997, export="ema", fake_quant_below=1.0),
        quant=QuantConfig(
            rules=(
                QuantRule("attn_scale|mlp_scale|resid_mix|q_gain|skip_weight|bigram", "float32", max_numel=65_536),
                QuantRule("", "float16", max_numel=65_536),
                QuantRule("tok_emb", "float16"),  # and the last key matrix: model.fake_quant.late_k_layers
                QuantRule(".mlp.", "int5_row"),
                QuantRule("bigram.embed", "int8_percentile"),
                QuantRule("", "int6_row"),
            ),
            compressor="zstd",
            level=22,
        ),
        eval=EvalConfig(every=1000, sliding=SlidingConfig(stride=64, windows="pr372")),
    )
