"""PR 2005: SP8192, depth recurrence, parallel residuals, headwise gate, MuonEq-R, GPTQ int6/int7, brotli, score-first TTT.

    python -m golf_jax.train pr2005

Full size as run: 35,989,592 parameters, 786,432 tokens per step (8 ranks x 48 sequences x 2048), 588 s on 8xH100 (12 s of the 600 are
kept for GPTQ). Layers 3-5 run three times from 35 % of the run on.
Expected (mean of 3 seeds): 1.0805 bpb after score-first test-time training, 1.0821 sliding, 1.0988 standard; 15.70 MB of weights,
15,744,000 to 15,748,000 bytes with code; 104 ms per step, 154 ms with looping; 4,467 steps.
What the PR says and what ran: the README's command lacks QK_GAIN_INIT=5.25; its artifact sizes leave out the code; the token table decays
with 0.085, not 0.02; Hessians alone took 13.1 s, so training and GPTQ ended after 601 s; "loops 2x" means two extra passes, three in
all. The committed script is not the file that ran (51,496 against 50,027 bytes).
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
    ScoreFirstConfig,
    SlidingConfig,
)


def recipe() -> Recipe:
    return Recipe(
        name="pr2005",
        model=ModelConfig(
            vocab_size=8192,
            num_layers=11,
            width=512,
            num_heads=8,
            num_kv_heads=4,
            mlp_ratio=4.0,
            mlp_slope=0.5,
            rope_dims=16,
            rope_train_len=2048,
            rope_bf16_frequencies=True,
            q_gain_init=5.25,
            xsa_last_n=11,
            head_gate="query_rows",
            layer_scale=True,
            skip="gated",
            parallel_from=7,
            loop_start=3,
            loop_end=5,
            loop_repeats=2,
            bf16_params=("tok_emb",),
        ),
        data=DataConfig(
            train="data/datasets/fineweb10B_sp8192/fineweb_train_*.bin",
            val="data/datasets/fineweb10B_sp8192/fineweb_val_*.bin",
            tokenizer="data/tokenizers/fineweb_8192_bpe.model",
            order="shuffled",
        ),
        optim=OptimConfig(
            groups=(
                GroupConfig("matrix", ("matrix", "proj", "gate"), "muon", lr=0.022, weight_decay=0.095, row_normalize=True),
                GroupConfig("token", ("token", "table", "trigram"), "adamw", lr=0.03, weight_decay=0.085),
                GroupConfig("vector", ("vector",), "adamw", lr=0.02, weight_decay=0.02),
            ),
        ),
        budget=BudgetConfig(seconds=588.0),
        schedule=ScheduleConfig(warmdown_frac=0.72, loop_from=0.35, ema_decay=0.9965, export="ema"),
        quant=QuantConfig(
            rules=(
                QuantRule("", "float16", max_numel=65_536),
                QuantRule("tok_emb", "gptq_int7"),
                QuantRule("", "gptq_int6"),
            ),
            gptq_batches=64,
            compressor="brotli",
            level=11,
        ),
        eval=EvalConfig(
            every=500,
            sliding=SlidingConfig(stride=64, windows="exact"),
            score_first=ScoreFirstConfig(stride=64, windows="exact", lr=0.005, momentum=0.9, epochs=3),
        ),
        seed=42,
    )
