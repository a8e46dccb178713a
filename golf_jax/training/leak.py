"""PR 1182's one side effect of its discarded compile warm-up: gradients of the frozen trigram table that survive it (spec 7.1).

Frozen parameters belong to no optimizer, so nobody clears their gradients. The warm-up steps run unclipped at full learning rate and
average all gradients over the ranks; afterwards weights, optimizer and data position are restored, the stale gradients are not, and
from then on each rank adds its own to them and counts them in its clip norm.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from golf_jax.config import Recipe
from golf_jax.data.loader import Loader
from golf_jax.mesh import put_replicated, rows
from golf_jax.training.state import TrainState
from golf_jax.training.step import StepInputs, StepMetrics, make_step


def leaked_state(recipe: Recipe, mesh: Mesh, state: TrainState, loader: Loader, step: Any) -> TrainState:
    """`state` with the stale gradients of `schedule.leak_warmup_steps` discarded steps; the loader goes back to where it was.

    step: the compiled training step.
    """
    position = loader.state()

    def batches() -> Iterable[tuple[jax.Array, jax.Array]]:
        for _ in range(recipe.schedule.leak_warmup_steps):
            x, y = loader.next_batch()
            yield tuple(jax.make_array_from_process_local_data(rows(mesh), a, loader.global_shape) for a in (x, y))  # pyright: ignore

    state, _ = warm_up(recipe, mesh, state, batches(), step)
    loader.restore(position)
    return state


def warm_up(
    recipe: Recipe, mesh: Mesh, state: TrainState, batches: Iterable[tuple[Any, Any]], step: Any = None
) -> tuple[TrainState, list[StepMetrics]]:
    """(the state as it was but for its stale gradients, metrics of the discarded steps).

    batches: inputs and targets on the mesh, int32 [sequences, T]. step: the compiled training step, where there is one already.
    """
    step = step or make_step(recipe, mesh, state, looping=True)
    scalars: Any = (np.float32(1.0), np.float32(recipe.optim.momentum), np.float32(np.inf), np.float32(0.0), np.bool_(False))
    inputs = put_replicated(mesh, StepInputs(*scalars))
    sharding = rows(mesh)
    over_ranks = jax.jit(
        lambda stale: jax.tree.map(lambda g: jnp.broadcast_to(jnp.mean(g, 0, keepdims=True), g.shape), stale),
        out_shardings=sharding,
    )
    kept = jax.tree.map(jnp.copy, state)
    metrics = []
    for x, y in batches:
        state, metric = step(state, x, y, inputs)
        state = state._replace(stale=over_ranks(state.stale))
        metrics.append(metric)
    return kept._replace(stale=state.stale), metrics
