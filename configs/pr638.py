"""PR 638: 11 layers, XSA on all of them, value residual, gated attention, LeakyReLU(0.5)^2, everything int6.

    python -m golf_jax.train pr638

Full size as run: 27,137,223 parameters, 786,432 tokens per step (8 ranks x 48 sequences x 2048), 7,500 steps without a time limit.
Expected (one seed): 1.1164 bpb sliding (stride 64), 1.1401 standard, 15,941,860 bytes with code, 1,064 ms per step on one H100 NVL.
On 8xH100 a step took 93.6 ms, so the 7,500 steps need 702 s: **the reported score is outside the 10-minute rule**
(`--budget.steps 0` trains for 600 s instead, about 6,400 steps).
The README says otherwise than the code, which is followed here: the value residual has two raw learned scalars per layer and no sigmoid;
the two embedding tables are int8 and every tensor up to 65,536 elements fp16, not "int6 on everything"; the RoPE base is rescaled
to 22,081.8 at 2048 tokens because the trained length is hard-coded to 1024. Layer 0's value-residual scalars are never used.
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
        name="pr638",
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
            bigram_buckets=4096,
            bigram_dim=128,
            xsa_last_n=11,
            value_residual=True,
            head_gate="linear",
            layer_scale=True,
            bf16_params=("tok_emb", "bigram_table"),
        ),
        data=DataConfig(
            train="data/datasets/fineweb10B_sp1024/fineweb_train_*.bin",
            val="data/datasets/fineweb10B_sp1024/fineweb_val_*.bin",
            tokenizer="data/tokenizers/fineweb_1024_bpe.model",
        ),
        optim=OptimConfig(
            groups=(
                GroupConfig("matrix", ("matrix", "proj"), "muon", lr=0.025, weight_decay=0.04),
                GroupConfig("token", ("token", "table", "trigram"), "adamw", lr=0.035, weight_decay=0.04),
                GroupConfig("vector", ("vector", "gate"), "adamw", lr=0.025, weight_decay=0.04),
            ),
        ),
        budget=BudgetConfig(steps=7500),
        schedule=ScheduleConfig(warmdown_steps=3500, ema_decay=0.997, export="ema"),
        quant=QuantConfig(
            rules=(
                QuantRule("", "float16", max_numel=65_536),
                QuantRule(".mlp.|.attn.", "int6_row_floor"),
                QuantRule("", "int8_percentile"),
            ),
            compressor="zstd",
            level=21,
        ),
        eval=EvalConfig(every=1000, sliding=SlidingConfig(stride=64, windows="tail")),
    )
