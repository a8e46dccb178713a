"""PR 1182's warm-up: everything is restored but the never-cleared gradients; its reference numbers are in test_reproduce."""

from dataclasses import replace

import jax
import numpy as np

from golf_jax.config import DataConfig, EvalConfig, ModelConfig, SlidingConfig, load_recipe
from golf_jax.data.loader import StreamLoader
from golf_jax.mesh import make_mesh
from golf_jax.training.leak import leaked_state
from golf_jax.training.phases import phases
from golf_jax.training.state import init_state
from golf_jax.training.step import make_step

MODEL = ModelConfig(
    vocab_size=32, num_layers=2, width=16, num_heads=2, num_kv_heads=1, trigram="table", trigram_buckets=16, trigram_dim=4,
    dtype="float32", attention="xla",
)  # fmt: skip


def test_only_the_stale_gradients_survive():
    base = load_recipe("pr1182")
    recipe = replace(
        base,
        model=MODEL,
        data=DataConfig(seq_len=8, ranks=4, rows_per_rank=1),
        schedule=replace(base.schedule, leak_warmup_steps=2),
        eval=EvalConfig(sliding=SlidingConfig(stride=0)),
        numerics="fp32",
    )
    mesh = make_mesh(2)
    state = init_state(recipe, mesh, seed=0)
    before = jax.tree.map(np.asarray, state)
    loader = StreamLoader([np.arange(2000) % 32], ranks=4, rows=1, seq_len=8)
    loader.next_batch()
    position = loader.state()
    state = leaked_state(recipe, mesh, state, loader, make_step(recipe, mesh, phases(recipe)[-1]))
    assert loader.state() == position
    for part in ("params", "opt", "ema", "swa"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, part), getattr(state, part))
    stale = np.asarray(state.stale["trigram_table"])
    assert stale.shape == (4, 16, 4) and np.abs(stale).max() > 0
    np.testing.assert_allclose(stale, np.broadcast_to(stale[:1], stale.shape), rtol=1e-6)  # averaged over the ranks
