"""The project's own compiled training step on stored batches, and what it leaves step by step."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import Recipe
from golf_jax.data.loader import Batch
from golf_jax.interop.checks.base import compiler_options
from golf_jax.interop.checks.reference import Set
from golf_jax.mesh import make_mesh, replicated, rows
from golf_jax.model import to_tensors
from golf_jax.optim import schedules
from golf_jax.optim.averaging import swa_mean
from golf_jax.optim.schedules import Clock
from golf_jax.training.leak import warm_momentum, warm_up
from golf_jax.training.phases import Phase, phase_at, phases
from golf_jax.training.state import graph, init_state
from golf_jax.training.step import make_step, step_inputs

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Batches:
    """int32 [steps, ranks, rows, T], in the order of training."""

    x: np.ndarray
    y: np.ndarray
    segments: np.ndarray | None = None

    def rows(self, step: int) -> Batch:
        """The global batch of a step, rank-major [ranks * rows, T]."""
        parts = Batch(self.x, self.y, self.segments)
        return jax.tree.map(lambda a: np.ascontiguousarray(a[step].reshape(-1, a.shape[-1]), np.int32), parts)


@dataclass
class History:
    """What a run leaves, per step and at the end; tensors by the challenge's names."""

    loss: list[float] = field(default_factory=list)
    micro_loss: list[np.ndarray] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    rank_norm: list[np.ndarray] = field(default_factory=list)
    trigram_norm: list[np.ndarray] = field(default_factory=list)
    """PR 1182: per rank, the norm of the trigram table's never-cleared gradient before clipping."""
    lr_factor: list[float] = field(default_factory=list)
    momentum: list[float] = field(default_factory=list)
    looping: list[bool] = field(default_factory=list)
    warm_up_loss: list[np.ndarray] = field(default_factory=list)
    after: dict[int, Tensors] = field(default_factory=dict)
    ema: Tensors = field(default_factory=dict)
    swa: Tensors = field(default_factory=dict)
    swa_count: int = 0


def simulate(
    refs: Set,
    recipe: Recipe,
    params: Tensors,
    batches: Batches,
    keep: Iterable[int] = (),
    *,
    clear_stale: bool = False,
    warm: Batches | None = None,
) -> History:
    """Train `recipe` (float32) from `params` on the stored batches. keep: step counts after which to keep all tensors.

    clear_stale: PR 1182's frozen gradients cleared after every step (those of the warm-up still enter the first one).
    warm: discarded steps before, as many of every phase, whose Muon momentum the run starts with (PR 2135).
    """
    mesh = make_mesh(refs.devices if recipe.data.ranks % refs.devices == 0 else 1)
    state = init_state(recipe, mesh, 0, {k: jnp.asarray(v) for k, v in params.items()})
    on_mesh = rows(mesh)
    history, steps = History(), len(batches.x)
    matrices = next((g for g in recipe.optim.groups if g.kind == "muon"), None)

    def batch(i: int, source: Batches = batches) -> Batch:
        return jax.device_put(source.rows(i), on_mesh)

    def compiled(phase: Phase) -> Any:
        # Runs of one file differ in scalars and parameters only: one compiled step serves them all.
        def build() -> Any:
            lowered = make_step(recipe, mesh, phase).lower(state, batch(0), inputs)
            return lowered.compile(compiler_options() if mesh.size == 1 else None)

        return refs.once(("step", graph(recipe), batches.x.shape[1:], phase, mesh.size), build)

    inputs = jax.device_put(step_inputs(recipe, Clock(0, 0.0)), replicated(mesh))
    if recipe.schedule.leak_warmup_steps:
        given = (batch(i) for i in range(recipe.schedule.leak_warmup_steps))
        state, metrics = warm_up(recipe, mesh, state, given, compiled(phases(recipe)[-1]))
        history.warm_up_loss = [np.asarray(m.micro_loss) for m in metrics]
    if warm is not None:
        given, all_phases = (batch(i, warm) for i in range(len(warm.x))), phases(recipe)
        state, metrics = warm_momentum(recipe, mesh, state, given, [compiled(p) for p in all_phases], len(warm.x) // len(all_phases))
        history.warm_up_loss = [np.asarray(m.micro_loss) for m in metrics]
    for i in range(steps):
        phase = phase_at(recipe, Clock(i, 0.0))
        inputs = jax.device_put(step_inputs(recipe, Clock(i, 0.0)), replicated(mesh))
        state, metric = compiled(phase)(state, batch(i), inputs)
        metric = jax.tree.map(np.asarray, metric)
        history.loss.append(float(metric.loss))
        history.micro_loss.append(metric.micro_loss)
        history.grad_norm.append(float(metric.grad_norm))
        history.rank_norm.append(metric.micro_norm)
        history.lr_factor.append(schedules.lr_factor(recipe.schedule, recipe.budget, Clock(i, 0.0)))
        history.momentum += [schedules.muon_momentum(matrices, i)] if matrices else []
        history.looping.append(phase.looping)
        if state.stale and "trigram_table" in state.stale:
            clipped = np.sqrt(np.square(np.asarray(state.stale["trigram_table"], np.float64)).sum((1, 2)))
            history.trigram_norm.append(clipped / np.minimum(1, recipe.optim.clip_norm / (metric.micro_norm + 1e-6)))
        if clear_stale:
            state = state._replace(stale=jax.tree.map(jnp.zeros_like, state.stale))
        if i + 1 in {*keep, steps}:
            history.after[i + 1] = to_tensors(recipe.model, state.params)
    if state.ema is not None:
        history.ema = to_tensors(recipe.model, state.ema)
    if state.swa is not None and int(state.swa.count):
        history.swa, history.swa_count = to_tensors(recipe.model, swa_mean(state.swa)), int(state.swa.count)
    return history
