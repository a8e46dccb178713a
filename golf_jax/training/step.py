"""One training step, compiled once per phase: gradients, averaging over devices, optimizer, weight averages.

The whole step runs inside one shard_map over the `data` axis, so custom kernels see local arrays and the collectives are the ones the
optimizer names. Everything that changes from step to step enters as a traced scalar (`StepInputs`); only the phase (depth
recurrence, sequence length) changes the graph.
"""

import math
import time
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from golf_jax.ahead import kept
from golf_jax.config import GolfError, Recipe
from golf_jax.data.loader import Batch
from golf_jax.kernels.attention import prepare
from golf_jax.mesh import AXIS, REPLICATED, ROWS, replicated, rows
from golf_jax.model.gpt import nll
from golf_jax.optim import schedules
from golf_jax.optim.averaging import EMAScalars, ema_update, swa_update
from golf_jax.optim.optimizer import GroupScalars, group_scalars, norm_clip_factor, squared_norm
from golf_jax.optim.schedules import Clock
from golf_jax.training.phases import Phase
from golf_jax.training.state import TrainState, frozen_names, graph, optimizer, state_shapes, state_specs


class StepInputs(NamedTuple):
    """Traced scalars of one step."""

    lr_factor: Any
    groups: dict[str, GroupScalars]
    """Settings of every optimizer group."""
    clip_norm: Any
    """Limit of the gradient norm; infinity: no clipping."""
    fake_quant: Any
    """Strength of fake quantization in the training forward."""
    ema: EMAScalars
    swa_collect: Any
    """Boolean: add the weights after this step to the stochastic weight average."""


def step_inputs(recipe: Recipe, clock: Clock) -> StepInputs:
    """Host values of the traced scalars of the step that starts at `clock`."""
    factor = schedules.lr_factor(recipe.schedule, recipe.budget, clock)
    return StepInputs(
        np.float32(factor),
        group_scalars(recipe.optim, clock.step),
        np.float32(recipe.optim.clip_norm or math.inf),
        np.float32(schedules.fake_quant_strength(recipe.schedule, factor)),
        EMAScalars.of(recipe.schedule.ema_decay),
        np.bool_(schedules.swa_collects(recipe.schedule, factor, clock.step + 1)),
    )


class StepMetrics(NamedTuple):
    loss: jax.Array
    """Mean over the batch before the update, nats per token, []."""
    grad_norm: jax.Array
    """Global norm before clipping (after averaging; per rank: see micro_norm), []."""
    micro_loss: jax.Array
    """Mean loss of every micro-batch in rank order, [micro-batches]."""
    micro_norm: jax.Array
    """Gradient norm of every micro-batch before its own clip (only with clip_per_rank, else zeros)."""


class CompiledStep(NamedTuple):
    run: Any
    """Compiled (state, batch, inputs) -> (state, metrics); state donated."""
    seconds: float
    """That it took to trace and compile it, or to find it in the cache."""


def micro_rows(recipe: Recipe, devices: int) -> int:
    """Sequences per device and forward pass; an `auto` not yet resolved counts as 0. Raises GolfError if the batch does not divide."""
    d = recipe.data
    total = d.batch_shape[0]
    if total % devices:
        what = "data.ranks" if d.packed else "data.ranks * data.rows_per_rank"
        raise GolfError(f"a batch of {total} sequences ({what}) does not divide over {devices} devices")
    local = total // devices
    asked = 0 if recipe.micro_rows == "auto" else recipe.micro_rows
    count = min(asked or d.rank_rows, local)
    if local % count:
        raise GolfError(f"micro_rows {count} does not divide the {local} sequences of one device")
    if recipe.optim.clip_per_rank and d.ranks % devices:
        raise GolfError(f"optim.clip_per_rank: data.ranks {d.ranks} must be a multiple of the {devices} devices")
    return count


def make_step(recipe: Recipe, mesh: Mesh, phase: Phase) -> Any:
    """Compiled-on-first-use function (state, batch, inputs) -> (state, metrics); state donated.

    batch: `Batch` of `data.batch_shape`, rows split over the mesh in rank order; the step cuts it to the phase's sequences.
    recipe.model must be resolved (no `auto`). Recipes of one `graph` share the function.
    """
    return _make_step(graph(recipe), mesh, phase)


@kept(8)
def compile_step(recipe: Recipe, mesh: Mesh, phase: Phase) -> CompiledStep:
    """`make_step` compiled, for a recipe that is its own `graph`."""
    begin = time.perf_counter()
    d = recipe.data
    tokens = jax.ShapeDtypeStruct(d.batch_shape, jnp.int32, sharding=rows(mesh))
    batch = Batch(tokens, tokens, tokens if d.packed else None)
    kinds = step_inputs(recipe, Clock(0, 0.0))
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=replicated(mesh)), kinds)
    lowered = _make_step(recipe, mesh, phase).lower(state_shapes(recipe, mesh), batch, inputs)
    prepare(recipe.model.attention)
    return CompiledStep(lowered.compile(), time.perf_counter() - begin)


@lru_cache(maxsize=8)
def _make_step(recipe: Recipe, mesh: Mesh, phase: Phase) -> Any:
    devices = mesh.shape[AXIS]
    sequences = micro_rows(recipe, devices) * (recipe.data.batch_shape[1] // phase.seq_len)
    longest = recipe.data.seq_len if recipe.data.packed else None
    frozen = frozen_names(recipe)
    qat = recipe.schedule.fake_quant_below > 0

    def loss_fn(params: dict, micro: Batch, fake_quant: jax.Array) -> jax.Array:
        how: dict = {"segments_BT": micro.segments, "longest": longest, "looping": phase.looping, "training": True}
        return jnp.mean(nll(recipe.model, params, micro.inputs, micro.targets, fake_quant=fake_quant if qat else None, **how))

    def clip_one_rank(grads: dict, stale: dict, limit: jax.Array) -> tuple[dict, dict, jax.Array]:
        """PR 1182: the rank's own norm, over what it just computed and what was never cleared."""
        grads = grads | {n: grads[n] + stale[n] for n in stale}
        norm, factor = norm_clip_factor(squared_norm(grads), limit)
        grads = jax.tree.map(lambda g: g * factor, grads)
        return grads, {n: grads[n] for n in stale}, norm

    def local_step(state: TrainState, batch: Batch, inputs: StepInputs):
        params: Any = state.params
        opt = optimizer(recipe, params, devices, AXIS if devices > 1 else None)
        micros = jax.tree.map(lambda a_RT: a_RT.reshape(-1, sequences, phase.seq_len), batch)
        count = micros.inputs.shape[0]

        def one(total: dict, given: tuple[Batch, dict]):
            micro, stale = given
            loss, grads = jax.value_and_grad(loss_fn)(params, micro, inputs.fake_quant)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            norm = jnp.zeros([], jnp.float32)
            if recipe.optim.clip_per_rank:
                grads, stale, norm = clip_one_rank(grads, stale, inputs.clip_norm)
            return jax.tree.map(jnp.add, total, grads), (loss, norm, stale)

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        if count == 1:
            grads, out = one(zeros, jax.tree.map(lambda a: a[0], (micros, state.stale or {})))
            losses, norms, stale = jax.tree.map(lambda a: a[None], out)
        else:
            grads, (losses, norms, stale) = jax.lax.scan(one, zeros, (micros, state.stale or {}))
        grads = {n: (g / count).astype(params[n].dtype) for n, g in grads.items()}
        clip = jnp.float32(jnp.inf) if recipe.optim.clip_per_rank else inputs.clip_norm
        updates: Any
        opt_state: Any
        updates, opt_state, grad_norm = opt.update(
            {n: g for n, g in grads.items() if n not in frozen} | {n: jnp.zeros_like(params[n]) for n in frozen},
            state.opt,
            params,
            lr_factor=inputs.lr_factor,
            groups=inputs.groups,
            clip_norm=clip,
        )
        params = optax.apply_updates(params, updates)
        loss = jnp.mean(losses)
        if devices > 1:
            loss = jax.lax.pmean(loss, AXIS)
        new = TrainState(
            params,
            opt_state,
            None if state.ema is None else ema_update(state.ema, params, inputs.ema),
            None if state.swa is None else swa_update(state.swa, params, inputs.swa_collect),
            None if state.stale is None else stale,
        )
        return new, StepMetrics(loss, grad_norm, losses, norms)

    specs = state_specs(recipe)
    partitions: Any = (REPLICATED, REPLICATED, ROWS, ROWS)
    metrics = StepMetrics(*partitions)
    sharded = jax.shard_map(local_step, mesh=mesh, in_specs=(specs, ROWS, REPLICATED), out_specs=(specs, metrics), check_vma=False)
    return jax.jit(sharded, donate_argnums=0)
