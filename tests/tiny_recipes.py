"""The shipped recipes with every size shrunk and every part kept: seconds on CPU, the same code paths."""

from dataclasses import replace

from golf_jax.config import DataConfig, Recipe, load_recipe

SHIPPED = ("baseline", "pr372", "pr562", "pr638", "pr1182", "pr2005")


def tiny(name: str, *, steps: int = 20, vocab_size: int = 64, seq_len: int = 16, rows_per_rank: int = 1, numerics: str = "fp32") -> Recipe:
    """Recipe `name` at width 32 and 3 layers (PR 2005: 4), 8 ranks, schedules squeezed so that every phase happens within `steps`."""
    r = load_recipe(name)
    m, s = r.model, r.schedule
    layers = 4 if m.loop_repeats else 3
    model = replace(
        m,
        vocab_size=vocab_size,
        num_layers=layers,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        rope_dims=min(m.rope_dims, 4),
        rope_train_len=min(m.rope_train_len, seq_len),
        xsa_last_n=min(m.xsa_last_n, 2),
        bigram_buckets=min(m.bigram_buckets, 48),
        bigram_dim=24,
        trigram_buckets=min(m.trigram_buckets, 40),
        trigram_dim=24,
        value_embed_layers=(0, 2) if m.value_embed_layers else (),
        value_embed_dim=12,
        parallel_from=3 if m.parallel_from >= 0 else -1,
        loop_start=1 if m.loop_repeats else -1,
        loop_end=2 if m.loop_repeats else -1,
        loop_repeats=min(m.loop_repeats, 1),
        fake_quant=replace(m.fake_quant, min_numel=min(m.fake_quant.min_numel, 256), late_k_layers=min(m.fake_quant.late_k_layers, 1)),
        dtype="float32",
    )
    return replace(
        r,
        model=model,
        data=DataConfig(train="none", val="none", tokenizer="none", order=r.data.order, seq_len=seq_len, rows_per_rank=rows_per_rank),
        optim=replace(r.optim, momentum_warmup_steps=10),
        budget=replace(r.budget, steps=steps),
        schedule=replace(
            s,
            warmdown_steps=max(steps // 2, 1),
            swa_every=min(s.swa_every, 2),
            ema_decay=min(s.ema_decay, 0.9),
            leak_warmup_steps=min(s.leak_warmup_steps, 2),
        ),
        quant=replace(r.quant, gptq_batches=min(r.quant.gptq_batches, 2)),
        eval=replace(
            r.eval,
            stride=min(r.eval.stride, 8),
            batch_rows=8,
            every=0,
            ttt=replace(r.eval.ttt, epochs=min(r.eval.ttt.epochs, 2), chunk_tokens=8 * seq_len, batch_rows=2),
        ),
        numerics=numerics,
        log_every=5,
    )
