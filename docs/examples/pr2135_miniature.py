"""PR 2135's legal variant at a size for minutes on a CPU, on the text that every Python carries: every part of it runs.

python -m golf_jax.train docs/examples/pr2135_miniature.py --devices 1
"""

from dataclasses import replace

from golf_jax.config import BudgetConfig, DataConfig, QuantRule, load_recipe


def recipe():
    r = load_recipe("pr2135_legal")
    shape = dict(vocab_size=1024, num_layers=4, width=64, num_heads=4, num_kv_heads=2, rope_dims=8, xsa_last_n=4, dtype="float32")
    model = replace(r.model, **shape, two_lanes_from=3, loop_start=1, loop_end=2, loop_repeats=1)
    ttt = dict(rank=4, alpha=7.2, lr=1e-3, chunk=32, seq_len=128, batch=16, prefix=16, global_chunk=1024, global_lr=0.003)
    documents = replace(r.eval.documents, **ttt, tilt=replace(r.eval.documents.tilt, order=8))
    groups = tuple(replace(g, momentum_warmup_steps=30) if g.kind == "muon" else g for g in r.optim.groups)
    rules = (QuantRule("", "float16", max_numel=2048), *r.quant.rules[1:])  # so that the small matrices meet GPTQ
    return replace(
        r,
        name="pr2135_miniature",
        model=model,
        data=DataConfig(train="embedded", order="documents", seq_len=128, ranks=8, rows_per_rank=2),
        optim=replace(r.optim, clip_per_rank=False, groups=groups),
        budget=BudgetConfig(steps=60),
        quant=replace(r.quant, rules=rules, gptq_batches=4),
        eval=replace(r.eval, every=0, documents=documents),
        log_every=20,
    )
