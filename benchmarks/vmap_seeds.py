"""Is one program with several seeds (`vmap` over parameters and optimizer state) faster than the same steps in turn?

    python benchmarks/vmap_seeds.py [WIDTH LAYERS TOKENS ROWS SEEDS]

The quickstart's step at that size, on one device, best of six of each, in turn. Prints milliseconds and the gain.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import load_recipe
from golf_jax.data.loader import Batch
from golf_jax.mesh import make_mesh
from golf_jax.model import init_params, resolve
from golf_jax.optim.schedules import Clock
from golf_jax.training.phases import phases
from golf_jax.training.state import init_state
from golf_jax.training.step import make_step, step_inputs


def main(width: int = 128, layers: int = 2, tokens: int = 64, rows: int = 8, seeds: int = 3) -> None:
    recipe = load_recipe("quickstart")
    model = replace(recipe.model, width=width, num_layers=layers, num_heads=4, num_kv_heads=2, xsa_last_n=layers, rope_dims=0)
    data = replace(recipe.data, seq_len=tokens, ranks=1, rows_per_rank=rows)
    recipe = replace(recipe, model=resolve(model, jax.default_backend()), data=data)
    mesh = make_mesh(1)
    text = np.random.default_rng(0).integers(0, model.vocab_size, (rows, tokens + 1)).astype(np.int32)
    batch, inputs = Batch(text[:, :-1], text[:, 1:]), step_inputs(recipe, Clock(0, 0.0))
    starts = [init_state(recipe, mesh, seed, init_params(recipe.model, jax.random.key(seed))) for seed in range(seeds)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    step = make_step(recipe, mesh, phases(recipe)[-1])
    many = jax.jit(jax.vmap(step, in_axes=(0, None, None)), donate_argnums=0)
    state = {"in turn": starts[0], "vmapped": stacked}

    def run(name: str, function: Callable[..., Any], times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            state[name], _ = jax.block_until_ready(function(state[name], batch, inputs))
        return time.perf_counter() - begin

    best = dict.fromkeys(state, float("inf"))
    for repetition in range(7):
        for name, function, times in (("in turn", step, seeds), ("vmapped", many, 1)):
            seconds = run(name, function, times)
            best[name] = min(best[name], seconds) if repetition else best[name]  # the first one compiles
    milliseconds = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in best.items())
    size = f"width {width}, {layers} layers, {rows} x {tokens} tokens, {seeds} seeds"
    print(f"{size}: {milliseconds}; gain {best['in turn'] / best['vmapped']:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
