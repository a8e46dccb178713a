"""PR 2135, the last record: CaseOps text, packed documents, two-lane decoder, narrow head gate, input-gated smear, Polar-Express Muon.

    python -m golf_jax.train pr2135

Full size as run: 35,945,673 parameters, 786,432 tokens per step (8 ranks x one packed row of 98,304, documents cut at 2048), 599.5 s on
8xH100. Layers 3-5 run three times from 35 % of the run on.
Expected (mean of 3 seeds): 1.0607 bpb of the average weights before quantization, 1.05651 bpb after the record's quantizer, test-time
training and tilt; 95 ms per step, 139 ms with looping; 4,994 steps. bpb counts bytes of the original text, by the sidecar.
What the PR says and what ran:
- "BOS-fixed SmearGate": the command switches the fix off, so a document's first token mixes with the document before it
  (`model.boundary_token` is the fix).
- "AsymLogit rescale": two scalars that start at 30 and are in no optimizer; the training loss has the fixed softcap 30.
- "Parallel decoder" is not PR 2005's: two lanes whose lambdas start at 1.1015625, bfloat16 of 1.1.
- The head gate's scale 0.5 is inside the sigmoid and its weights start at zero: every gate starts at 0.5, not at 1.
- Gradients are clipped per rank before averaging; Muon's momentum ends at 0.97 and survives the discarded warm-up of distributed runs.
- The q gain starts at 5.0, not at PR 2005's 5.25; RoPE positions run over the packed row and are never rescaled.
- Every row's last token is only a target, so one prediction between two rows is never made.
"""

from golf_jax.config import (
    BudgetConfig,
    DataConfig,
    DocumentsConfig,
    EvalConfig,
    GroupConfig,
    LowRankConfig,
    ModelConfig,
    OptimConfig,
    PackedConfig,
    QuantConfig,
    QuantRule,
    Recipe,
    ScheduleConfig,
    SlidingConfig,
    TiltConfig,
)

POLAR_EXPRESS = (  # (a, b, c) of the five steps; docs/recipes/pr2135_model_training.md, section 5.3
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def recipe() -> Recipe:
    return Recipe(
        name="pr2135",
        model=ModelConfig(
            vocab_size=8192,
            num_layers=11,
            width=512,
            num_heads=8,
            num_kv_heads=4,
            mlp_ratio=4.0,
            mlp_slope=0.5,
            rope_dims=16,
            rope_bf16_frequencies=True,
            q_gain_init=5.0,
            asym_softcap=True,
            input_smear_gate=True,
            gate_window=12,
            xsa_last_n=11,
            head_gate="narrow",
            head_gate_scale=0.5,
            layer_scale=True,
            skip="gated",
            two_lanes_from=8,
            loop_start=3,
            loop_end=5,
            loop_repeats=2,
            bf16_params=("tok_emb",),
        ),
        data=DataConfig(
            train="data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved/fineweb_train_*.bin",
            val="data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved/fineweb_val_*.bin",
            tokenizer="data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",
            order="documents",
        ),
        optim=OptimConfig(
            groups=(
                GroupConfig(
                    "matrix",
                    ("matrix", "proj", "gate"),
                    "muon",
                    lr=0.028,
                    weight_decay=0.095,
                    momentum=0.97,
                    newton_schulz_coefficients=POLAR_EXPRESS,
                    row_normalize=True,
                    bf16_momentum=True,
                ),
                GroupConfig("token", ("token", "table", "trigram"), "adamw", lr=0.03, weight_decay=0.085, betas=(0.9, 0.99)),
                GroupConfig("vector", ("vector",), "adamw", lr=0.02, weight_decay=0.02, betas=(0.9, 0.99)),
                GroupConfig("softcap", ("softcap",), "frozen"),
            ),
            clip_per_rank=True,
        ),
        budget=BudgetConfig(seconds=599.5),
        schedule=ScheduleConfig(warmdown_frac=0.85, lr_floor=0.1, loop_from=0.35, ema_decay=0.9965, export="ema", leak_momentum_steps=20),
        quant=QuantConfig(
            rules=(
                QuantRule("", "float16", max_numel=65_536),
                QuantRule("tok_emb", "gptq_int7", sigmas=14.0),
                QuantRule(".attn.", "gptq_int6", sigmas=13.0),
                QuantRule("", "gptq_int6", sigmas=11.5),
            ),
            lowrank=LowRankConfig(rank=4, top=3, group=32),
            gptq_batches=32,
            compressor="rans",
            level=11,
        ),
        eval=EvalConfig(
            every=4000,
            sliding=SlidingConfig(stride=0),
            packed=PackedConfig(rows=25),
            documents=DocumentsConfig(rank=80, tilt=TiltConfig(order=16, state="corpus")),
        ),
        seed=42,
    )
