"""The shipped recipes with every size shrunk and every part kept: seconds on CPU, the same code paths."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import golf_jax
from golf_jax.config import DataConfig, Recipe, load_recipe, to_dict
from golf_jax.data.build import build_documents

SHIPPED = ("baseline", "pr372", "pr562", "pr638", "pr1182", "pr2005")


def tiny(name: str, *, steps: int = 20, vocab_size: int = 64, seq_len: int = 16, rows_per_rank: int = 1, numerics: str = "fp32") -> Recipe:
    """Recipe `name` at width 32 and 3 layers (PR 2005: 4), 8 ranks, schedules squeezed so that every phase happens within `steps`."""
    r = load_recipe(name)
    m, s, e = r.model, r.schedule, r.eval
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
        two_lanes_from=3 if m.two_lanes_from >= 0 else -1,
        loop_start=1 if m.loop_repeats else -1,
        loop_end=2 if m.loop_repeats else -1,
        loop_repeats=min(m.loop_repeats, 1),
        fake_quant=replace(m.fake_quant, min_numel=min(m.fake_quant.min_numel, 256), late_k_layers=min(m.fake_quant.late_k_layers, 1)),
        dtype="float32",
    )
    groups = tuple(replace(g, momentum_warmup_steps=10) if g.kind == "muon" else g for g in r.optim.groups)
    return replace(
        r,
        model=model,
        data=DataConfig(train="none", val="none", tokenizer="none", order=r.data.order, seq_len=seq_len, rows_per_rank=rows_per_rank),
        optim=replace(r.optim, groups=groups),
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
            batch_rows=8,
            every=0,
            sliding=replace(e.sliding, stride=min(e.sliding.stride, 8)),
            score_first=replace(e.score_first, stride=8, epochs=min(e.score_first.epochs, 2), chunk_tokens=8 * seq_len, batch_rows=2),
            adapt_first=replace(e.adapt_first, stride=8, epochs=min(e.adapt_first.epochs, 2), batch_rows=2),
            packed=replace(e.packed, rows=min(e.packed.rows, 2), seq_len=seq_len * 5 // 4, ranks=2),
            documents=replace(
                e.documents,
                rank=min(e.documents.rank, 2),
                chunk=8,
                seq_len=seq_len * 5 // 4,
                batch=8,
                prefix=16,
                global_chunk=5 * seq_len,
                ranks=2,
                lr=1e-3,
                global_lr=1e-3,
                tilt=replace(e.documents.tilt, order=min(e.documents.tilt.order, 4)),
            ),
        ),
        numerics=numerics,
        log_every=5,
    )


def some(names: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test: those in `quick` always, the others with `-m slow`, where every record compiles its own programs."""
    values = [name if isinstance(name, tuple) else (name,) for name in names]
    return [pytest.param(*v, marks=() if v in quick or v[0] in quick else pytest.mark.slow) for v in values]


def build_text(directory: Path, vocab_size: int = 300, transform: str = "") -> Path:
    """Shards, tokenizer and manifest of generated sentences, a few thousand validation tokens; with a transform, some capitals."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    words = ["".join(rng.choice(letters, rng.integers(2, 7))) for _ in range(200)]
    documents = [" ".join(words[i] for i in rng.zipf(1.3, 60) % len(words)) + "." for _ in range(600)]
    if transform:
        documents = [d.capitalize().replace(" the", " THE").replace(" o", " O") for d in documents]
    build_documents(
        lambda: documents, directory, source="generated", vocab_size=vocab_size, val_every=30, transform=transform, log=lambda line: None
    )
    return directory


def on_text(recipe: Recipe, directory: Path) -> Recipe:
    """`recipe` on the shards of `build_text`."""
    train, val, model = (str(directory / name) for name in ("train_*.bin", "val_*.bin", "tokenizer.model"))
    return replace(recipe, data=replace(recipe.data, train=train, val=val, tokenizer=model))


def recipe_file(recipe: Recipe, path: Path) -> Path:
    """A recipe file that returns `recipe`, for the command line."""
    lines = ["import json", "from golf_jax.config import Recipe, from_dict", f"DATA = json.loads({json.dumps(to_dict(recipe))!r})"]
    path.write_text("\n".join([*lines, "def recipe(): return from_dict(Recipe, DATA)", ""]))
    return path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", *map(str, arguments)]


def environment(programs: Path, devices: int = 8, **more: str) -> dict[str, str]:
    """Environment of a started process: fake devices, compilation as in this process, programs shared with it."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",  # the last one counts
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "PYTHONPATH": str(Path(golf_jax.__file__).parents[1]),
        **more,
    }
