"""Training trajectories: the project's own compiled step on stored batches, and what it leaves step by step."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import GolfError
from golf_jax.data.loader import Batch
from golf_jax.interop.reference import Arrays, Case
from golf_jax.mesh import make_mesh, replicated, rows
from golf_jax.model import to_tensors
from golf_jax.optim import schedules
from golf_jax.optim.averaging import swa_mean
from golf_jax.optim.schedules import Clock
from golf_jax.training.leak import warm_momentum, warm_up
from golf_jax.training.phases import Phase, phase_at, phases
from golf_jax.training.state import graph, init_state
from golf_jax.training.step import make_step, step_inputs


def check_train(case: Case) -> None:
    recipe, ours = case.recipe, dict(history(case))
    ours |= {f"lr/{g.name}": g.lr * np.array(ours["lr_factor"]) for g in recipe.optim.groups}
    for fact, what in (("norm", "final/"), ("ema_norm", "ema/")):
        ours |= {f"{fact}/{n}": np.linalg.norm(x.astype(np.float64)) for n, x in _under(ours, what).items()}
    case.compare(ours, start=case.tensors)


def weights(case: Case, which: str) -> Arrays:
    """What our own run of the case leaves: final, ema or swa."""
    if not (found := _under(history(case), f"{which}/")):
        raise GolfError(f"{case.refs.path}: own/{case.where}/{which}: the run leaves no such weights")
    return found


def _under(of: dict[str, Any], prefix: str) -> Arrays:
    return {item.removeprefix(prefix): x for item, x in of.items() if item.startswith(prefix)}


def stored_batches(case: Case, prefix: str = "") -> list[Batch]:
    """Global batches of a case by step, rank-major int32 [ranks * rows, T]; with the prefix `warmup_` those of its discarded steps."""
    tokens, segments = case.seen[f"{prefix}tokens"], case.seen.get(f"{prefix}segments")
    cut = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    parts = cut[..., :-1], cut[..., 1:], None if segments is None else segments.reshape(*cut.shape[:-1], -1)
    return [Batch(*(None if a is None else np.ascontiguousarray(a[step], np.int32) for a in parts)) for step in range(len(cut))]


def history(case: Case) -> dict[str, Any]:
    """What our run of the case leaves, by the format's names and `final/NAME`; trained once."""
    return case.refs.once(("run", case.where), lambda: _train(case))


def _train(case: Case) -> dict[str, Any]:
    """The recipe trained in float32 on the stored batches, from the weights of the case.

    With `warmup_tokens` Muon's momentum starts from discarded steps, as many of every phase (PR 2135); with the setting `clear_stale`
    PR 1182's frozen gradients are cleared after every step (those of the warm-up still enter the first one).
    """
    recipe, tokens, batches = case.recipe, case.seen["tokens"], stored_batches(case)
    if recipe.data.packed:  # its segments are stored: here seq_len only bounds how long they are
        recipe = replace(recipe, data=replace(recipe.data, seq_len=tokens.shape[-1] - 1, rows_per_rank=1))
    ranks, per_rank = recipe.data.ranks, recipe.data.rank_rows
    if tokens[0].size != ranks * per_rank * tokens.shape[-1]:
        raise GolfError(f"{case.refs.path}: {case.where}: tokens {tokens.shape} are not cut into {ranks} ranks of {per_rank} rows")
    keep = {int(k.split("/")[1]) for k in case.own if k.startswith("after/")}
    mesh = make_mesh(case.refs.devices if ranks % case.refs.devices == 0 else 1)
    state = init_state(recipe, mesh, 0, {k: jnp.asarray(v) for k, v in case.params.items()})
    on_mesh, seen, ours = rows(mesh), defaultdict[str, list[Any]](list), {}
    matrices = next((g for g in recipe.optim.groups if g.kind == "muon"), None)
    inputs = jax.device_put(step_inputs(recipe, Clock(0, 0.0)), replicated(mesh))

    def compiled(phase: Phase) -> Any:
        # Runs of one file differ in scalars and parameters only: one compiled step serves them all.
        step = lambda: make_step(recipe, mesh, phase).lower(state, jax.device_put(batches[0], on_mesh), inputs).compile()  # noqa: E731
        return case.refs.once(("step", graph(recipe), batches[0].inputs.shape, phase, mesh.size), step)

    discarded = []
    if leak := recipe.schedule.leak_warmup_steps:
        given = (jax.device_put(batch, on_mesh) for batch in batches[:leak])
        state, discarded = warm_up(recipe, mesh, state, given, compiled(phases(recipe)[-1]))
    if "warmup_tokens" in case.own:
        warm, steps = stored_batches(case, "warmup_"), [compiled(p) for p in phases(recipe)]
        given = (jax.device_put(batch, on_mesh) for batch in warm)
        state, discarded = warm_momentum(recipe, mesh, state, given, steps, len(warm) // len(steps))
    seen["warmup_loss_per_rank"] = [np.asarray(metric.micro_loss) for metric in discarded]
    for i, batch in enumerate(batches):
        clock = Clock(i, 0.0)
        phase = phase_at(recipe, clock)
        inputs = jax.device_put(step_inputs(recipe, clock), replicated(mesh))
        state, metric = compiled(phase)(state, jax.device_put(batch, on_mesh), inputs)
        metric = jax.tree.map(np.asarray, metric)
        of_step = {
            "loss": metric.loss, "loss_per_rank": metric.micro_loss, "grad_norm": metric.grad_norm, "looping": phase.looping,
            "grad_norm_per_rank": metric.micro_norm, "lr_factor": schedules.lr_factor(recipe.schedule, recipe.budget, clock),
        }  # fmt: skip
        if matrices:
            of_step["momentum"] = schedules.muon_momentum(matrices, i)
        if recipe.optim.clip_per_rank and ranks == 1:  # a lone process clips what it computed itself: the averaged norm is a clipped one
            of_step["grad_norm"] = metric.micro_norm[0]
        if state.stale and "trigram_table" in state.stale:  # PR 1182: per rank, the never-cleared gradient's norm before clipping
            clipped = np.sqrt(np.square(np.asarray(state.stale["trigram_table"], np.float64)).sum((1, 2)))
            of_step["stale_norm_per_rank"] = clipped / np.minimum(1, recipe.optim.clip_norm / (metric.micro_norm + 1e-6))
        for name, value in of_step.items():
            seen[name].append(value)
        if case.settings.get("clear_stale"):
            state = state._replace(stale=jax.tree.map(jnp.zeros_like, state.stale))
        if i + 1 in keep:
            ours |= {f"after/{i + 1}/{n}": x for n, x in to_tensors(recipe.model, state.params).items()}
    left = {"final": state.params, "ema": state.ema}
    if state.swa is not None and (count := int(state.swa.count)):
        left["swa"], ours["swa_count"] = swa_mean(state.swa), count
    for what, params in left.items():
        ours |= {f"{what}/{n}": x for n, x in to_tensors(recipe.model, params).items()} if params is not None else {}
    return ours | seen
