"""What survives the discarded compile warm-up of two records, although everything is restored after it.

PR 1182: gradients of the frozen trigram table (docs/recipes/pr1182.md, section 7.1); PR 2135: in distributed runs Muon's momentum
(docs/recipes/pr2135_model_training.md, section 7.3), which is no part of the state that it saves.

PR 1182: frozen parameters belong to no optimizer, so nobody clears their gradients. The warm-up steps run unclipped at full learning
rate and average all gradients over the ranks; afterwards weights, optimizer and data position are restored, the stale gradients are
not, and from then on each rank adds its own to them and counts them in its clip norm.
"""

from collections.abc import Iterable, Iterator, Sequence
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
    return jax.block_until_ready(state)  # the clock starts behind it


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


def momentum_leaks(recipe: Recipe) -> bool:
    """Whether Muon starts with the momentum of discarded steps: as the record ran, on several ranks."""
    return recipe.schedule.leak_momentum_steps > 0 and recipe.numerics == "as_run" and recipe.data.ranks > 1


def leaked_momentum(recipe: Recipe, mesh: Mesh, state: TrainState, loader: Loader, steps: Sequence[Any]) -> TrainState:
    """`state` with Muon's momentum after `schedule.leak_momentum_steps` discarded steps of every phase; the loader goes back.

    steps: the compiled training step of every phase. The first batch was the record's for passes without update: it is left out.
    """
    position = loader.state()
    loader.next_batch()
    batches = iter(lambda: place_batch(mesh, loader, loader.next_batch()), None)
    state, _ = warm_momentum(recipe, mesh, state, batches, steps, recipe.schedule.leak_momentum_steps)
    loader.restore(position)
    return jax.block_until_ready(state)  # the clock starts behind it


def warm_momentum(
    recipe: Recipe, mesh: Mesh, state: TrainState, batches: Iterator[Batch], steps: Sequence[Any], count: int
) -> tuple[TrainState, list[StepMetrics]]:
    """(the state as it was but for the momentum of Muon's groups, metrics of the discarded steps): `count` of each of `steps`.

    batches: on the mesh. The learning rate is whole and the momentum that of step 0, 1, ..., anew in every phase; clipping is as always.
    """
    kept, metrics = jax.tree.map(jnp.copy, state), []
    for step in steps:
        for number in range(count):
            inputs = step_inputs(recipe, Clock(number, 0.0))._replace(lr_factor=np.float32(1), swa_collect=np.bool_(False))
            state, metric = step(state, next(batches), put_replicated(mesh, inputs))
            metrics.append(metric)
    return kept._replace(opt=kept.opt | {g.name: state.opt[g.name] for g in recipe.optim.groups if g.kind == "muon"}), metrics
