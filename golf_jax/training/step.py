"""One training step, compiled once per phase: gradients, averaging over devices, optimizer, weight averages.

The whole step runs inside one shard_map over the `data` axis, so custom kernels see local arrays and the collectives are the ones the
optimizer names. Everything that changes from step to step enters as a traced scalar (`StepInputs`); only depth recurrence changes the
graph.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from golf_jax.config import GolfError, Recipe
from golf_jax.mesh import AXIS, REPLICATED, ROWS
from golf_jax.model.gpt import nll
from golf_jax.optim.averaging import ema_update, swa_update
from golf_jax.optim.optimizer import norm_clip_factor, squared_norm
from golf_jax.training.state import TrainState, frozen_names, optimizer, state_specs


class StepInputs(NamedTuple):
    """Traced scalars of one step."""

    lr_factor: jax.Array
    momentum: jax.Array
    clip_norm: jax.Array
    """Limit of the gradient norm; infinity: no clipping."""
    fake_quant: jax.Array
    """Strength of fake quantization in the training forward."""
    swa_collect: jax.Array
    """Boolean: add the weights after this step to the stochastic weight average."""


class StepMetrics(NamedTuple):
    loss: jax.Array
    """Mean over the batch before the update, nats per token, []."""
    grad_norm: jax.Array
    """Global norm before clipping (after averaging; per rank: see micro_norm), []."""
    micro_loss: jax.Array
    """Mean loss of every micro-batch in rank order, [micro-batches]."""
    micro_norm: jax.Array
    """Gradient norm of every micro-batch before its own clip (only with clip_per_rank, else zeros)."""


def micro_rows(recipe: Recipe, devices: int) -> int:
    """Sequences per device and forward pass. Raises GolfError if the batch does not divide."""
    d = recipe.data
    total = d.ranks * d.rows_per_rank
    if total % devices:
        raise GolfError(f"a batch of {total} sequences (data.ranks * data.rows_per_rank) does not divide over {devices} devices")
    local = total // devices
    rows = min(recipe.micro_rows or d.rows_per_rank, local)
    if local % rows:
        raise GolfError(f"micro_rows {rows} does not divide the {local} sequences of one device")
    if recipe.optim.clip_per_rank and d.ranks % devices:
        raise GolfError(f"optim.clip_per_rank: data.ranks {d.ranks} must be a multiple of the {devices} devices")
    return rows


def make_step(recipe: Recipe, mesh: Mesh, state: TrainState, *, looping: bool) -> Any:
    """Compiled-on-first-use function (state, x, y, inputs) -> (state, metrics); state donated.

    state: shapes or arrays. x, y: int32 [sequences, T], rows split over the mesh in rank order.
    recipe.model must be resolved (no `auto`).
    """
    devices = mesh.shape[AXIS]
    rows = micro_rows(recipe, devices)
    opt = optimizer(recipe, state.params, devices, AXIS if devices > 1 else None)
    frozen = frozen_names(recipe)
    qat = recipe.schedule.fake_quant_below > 0

    def loss_fn(params: dict, x_BT: jax.Array, y_BT: jax.Array, fake_quant: jax.Array) -> jax.Array:
        strength = fake_quant if qat else None
        return jnp.mean(nll(recipe.model, params, x_BT, y_BT, looping=looping, fake_quant=strength, training=True))

    def clip_one_rank(grads: dict, stale: dict, limit: jax.Array) -> tuple[dict, dict, jax.Array]:
        """PR 1182: the rank's own norm, over what it just computed and what was never cleared."""
        grads = grads | {n: grads[n] + stale[n] for n in stale}
        norm, factor = norm_clip_factor(squared_norm(grads), limit)
        grads = jax.tree.map(lambda g: g * factor, grads)
        return grads, {n: grads[n] for n in stale}, norm

    def local_step(state: TrainState, x_RT: jax.Array, y_RT: jax.Array, inputs: StepInputs):
        params: Any = state.params
        micros = tuple(a.reshape(-1, rows, a.shape[-1]) for a in (x_RT, y_RT))
        count = micros[0].shape[0]

        def one(total: dict, micro: tuple):
            x_BT, y_BT, stale = micro
            loss, grads = jax.value_and_grad(loss_fn)(params, x_BT, y_BT, inputs.fake_quant)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
            norm = jnp.zeros([], jnp.float32)
            if recipe.optim.clip_per_rank:
                grads, stale, norm = clip_one_rank(grads, stale, inputs.clip_norm)
            return jax.tree.map(jnp.add, total, grads), (loss, norm, stale)

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        if count == 1:
            grads, out = one(zeros, jax.tree.map(lambda a: a[0], (*micros, state.stale or {})))
            losses, norms, stale = jax.tree.map(lambda a: a[None], out)
        else:
            grads, (losses, norms, stale) = jax.lax.scan(one, zeros, (*micros, state.stale or {}))
        grads = {n: (g / count).astype(params[n].dtype) for n, g in grads.items()}
        clip = jnp.float32(jnp.inf) if recipe.optim.clip_per_rank else inputs.clip_norm
        updates: Any
        opt_state: Any
        updates, opt_state = opt.update(
            {n: g for n, g in grads.items() if n not in frozen} | {n: jnp.zeros_like(params[n]) for n in frozen},
            state.opt,
            params,
            lr_factor=inputs.lr_factor,
            momentum=inputs.momentum,
            clip_norm=clip,
        )
        params = optax.apply_updates(params, updates)
        loss = jnp.mean(losses)
        if devices > 1:
            loss = jax.lax.pmean(loss, AXIS)
        new = TrainState(
            params,
            opt_state,
            None if state.ema is None else ema_update(state.ema, params, recipe.schedule.ema_decay),
            None if state.swa is None else swa_update(state.swa, params, inputs.swa_collect),
            None if state.stale is None else stale,
        )
        return new, StepMetrics(loss, opt_state["grad_norm"], losses, norms)

    specs = state_specs(state)
    partitions: Any = (REPLICATED, REPLICATED, ROWS, ROWS)
    metrics = StepMetrics(*partitions)
    sharded = jax.shard_map(
        local_step, mesh=mesh, in_specs=(specs, ROWS, ROWS, PartitionSpec()), out_specs=(specs, metrics), check_vma=False
    )
    return jax.jit(sharded, donate_argnums=0)
