"""PR 1182's one side effect of its discarded compile warm-up: gradients of the frozen trigram table that survive it.

docs/recipes/pr1182.md, section 7.1.

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
from golf_jax.data.loader import Batch, Loader
from golf_jax.data.prefetch import place_batch
from golf_jax.mesh import put_replicated, rows
from golf_jax.optim.optimizer import group_scalars
from golf_jax.optim.schedules import Clock
from golf_jax.training.state import TrainState
from golf_jax.training.step import StepMetrics, step_inputs


def leaked_state(recipe: Recipe, mesh: Mesh, state: TrainState, loader: Loader, step: Any) -> TrainState:
    """`state` with the stale gradients of `schedule.leak_warmup_steps` discarded steps; the loader goes back to where it was.

    step: the compiled training step.
    """
    position = loader.state()

    batches = (place_batch(mesh, loader, loader.next_batch()) for _ in range(recipe.schedule.leak_warmup_steps))
    state, _ = warm_up(recipe, mesh, state, batches, step)
    loader.restore(position)
    return state


def warm_up(recipe: Recipe, mesh: Mesh, state: TrainState, batches: Iterable[Batch], step: Any) -> tuple[TrainState, list[StepMetrics]]:
    """(the state as it was but for its stale gradients, metrics of the discarded steps).

    batches: on the mesh. step: the compiled training step.
    """
    # Full learning rates, the momentum after its own warm-up, no clipping.
    warm = max((g.momentum_warmup_steps for g in recipe.optim.groups), default=0)
    inputs = step_inputs(recipe, Clock(0, 0.0))._replace(
        lr_factor=np.float32(1),
        groups=group_scalars(recipe.optim, warm),
        clip_norm=np.float32(np.inf),
        fake_quant=np.float32(0),
        swa_collect=np.bool_(False),
    )
    inputs = put_replicated(mesh, inputs)
    sharding = rows(mesh)
    over_ranks = jax.jit(
        lambda stale: jax.tree.map(lambda g: jnp.broadcast_to(jnp.mean(g, 0, keepdims=True), g.shape), stale),
        out_shardings=sharding,
    )
    kept = jax.tree.map(jnp.copy, state)
    metrics = []
    for batch in batches:
        state, metric = step(state, batch, inputs)
        state = state._replace(stale=over_ranks(state.stale))
        metrics.append(metric)
    return kept._replace(stale=state.stale), metrics
