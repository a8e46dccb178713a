"""Training trajectories: the project's own compiled step on stored batches, and what it leaves step by step."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import GolfError, Recipe
from golf_jax.data.loader import Batch
from golf_jax.interop.checks.base import compiler_options
from golf_jax.interop.checks.reference import Arrays, Case, Set
from golf_jax.mesh import make_mesh, replicated, rows
from golf_jax.model import to_tensors
from golf_jax.optim import schedules
from golf_jax.optim.averaging import swa_mean
from golf_jax.optim.schedules import Clock
from golf_jax.training.leak import warm_momentum, warm_up
from golf_jax.training.phases import Phase, phase_at, phases
from golf_jax.training.state import graph, init_state
from golf_jax.training.step import make_step, step_inputs


@dataclass
class History:
    """What a run leaves, by the format's names."""

    steps: int
    seen: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    """Numbers of every step: loss, grad_norm, ..."""
    weights: dict[str, Arrays] = field(default_factory=dict)
    """Tensors by the challenge's names: `after/STEP`, ema, swa."""
    swa_count: int = 0


def check_train(case: Case) -> None:
    recipe, run = case.recipe, history(case)
    ours: dict[str, Any] = dict(run.seen)
    # Where a lone process clips what it computed itself, that norm is the gradient's; the averaged one is already clipped.
    if recipe.optim.clip_per_rank and recipe.data.ranks == 1:
        ours["grad_norm"] = np.ravel(run.seen["grad_norm_per_rank"])
    if run.swa_count:
        ours["swa_count"] = run.swa_count
    ours |= {f"lr/{g.name}": g.lr * np.array(run.seen["lr_factor"]) for g in recipe.optim.groups}
    ours |= {f"{what}/{n}": x for what, tensors in run.weights.items() for n, x in tensors.items()}
    for fact, what in (("norm", f"after/{run.steps}"), ("ema_norm", "ema")):
        ours |= {f"{fact}/{n}": np.linalg.norm(x.astype(np.float64)) for n, x in run.weights.get(what, {}).items()}
    case.compare(ours, start=case.tensors)


def history(case: Case) -> History:
    """Our run of the case, trained once."""

    def train() -> History:
        recipe, tokens = case.recipe, case.seen["tokens"]
        if recipe.data.packed:  # its segments are stored: here seq_len only bounds how long they are
            recipe = replace(recipe, data=replace(recipe.data, seq_len=tokens.shape[-1] - 1, rows_per_rank=1))
        ranks, per_rank = recipe.data.ranks, recipe.data.rank_rows
        if tokens[0].size != ranks * per_rank * tokens.shape[-1]:
            raise GolfError(f"{case.refs.path}: {case.where}: tokens {tokens.shape} are not cut into {ranks} ranks of {per_rank} rows")
        keep = {int(k.split("/")[1]) for k in case.own if k.startswith("after/")}
        clear, batches = bool(case.settings.get("clear_stale")), stored_batches(case)
        warm = stored_batches(case, "warmup_") if "warmup_tokens" in case.own else None
        return simulate(case.refs, recipe, case.params, batches, keep, clear_stale=clear, warm=warm)

    return case.refs.once(("run", case.where), train)


def stored_batches(case: Case, prefix: str = "") -> list[Batch]:
    """Global batches of a case by step, rank-major int32 [ranks * rows, T]; with the prefix `warmup_` those of its discarded steps."""
    tokens, segments = case.seen[f"{prefix}tokens"], case.seen.get(f"{prefix}segments")
    cut = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    parts = cut[..., :-1], cut[..., 1:], None if segments is None else segments.reshape(*cut.shape[:-1], -1)
    return [Batch(*(None if a is None else np.ascontiguousarray(a[step], np.int32) for a in parts)) for step in range(len(cut))]


def weights(case: Case, which: str) -> Arrays:
    """What our own run of the case leaves: final, ema or swa."""
    run = history(case)
    found = run.weights.get(f"after/{run.steps}" if which == "final" else which)
    if not found:
        raise GolfError(f"{case.refs.path}: own/{case.where}/{which}: the run leaves no such weights")
    return found


def simulate(
    refs: Set,
    recipe: Recipe,
    params: Arrays,
    batches: list[Batch],
    keep: Iterable[int] = (),
    *,
    clear_stale: bool = False,
    warm: list[Batch] | None = None,
) -> History:
    """Train `recipe` (float32) from `params` on the stored batches. keep: step counts after which to keep all tensors.

    clear_stale: PR 1182's frozen gradients cleared after every step (those of the warm-up still enter the first one).
    warm: discarded steps before, as many of every phase, whose Muon momentum the run starts with (PR 2135).
    """
    mesh = make_mesh(refs.devices if recipe.data.ranks % refs.devices == 0 else 1)
    state = init_state(recipe, mesh, 0, {k: jnp.asarray(v) for k, v in params.items()})
    run, on_mesh = History(len(batches)), rows(mesh)
    matrices = next((g for g in recipe.optim.groups if g.kind == "muon"), None)
    inputs = jax.device_put(step_inputs(recipe, Clock(0, 0.0)), replicated(mesh))

    def compiled(phase: Phase) -> Any:
        # Runs of one file differ in scalars and parameters only: one compiled step serves them all.
        def build() -> Any:
            lowered = make_step(recipe, mesh, phase).lower(state, jax.device_put(batches[0], on_mesh), inputs)
            return lowered.compile(compiler_options() if mesh.size == 1 else None)

        return refs.once(("step", graph(recipe), batches[0].inputs.shape, phase, mesh.size), build)

    discarded = []
    if recipe.schedule.leak_warmup_steps:
        given = (jax.device_put(batch, on_mesh) for batch in batches[: recipe.schedule.leak_warmup_steps])
        state, discarded = warm_up(recipe, mesh, state, given, compiled(phases(recipe)[-1]))
    if warm is not None:
        given, steps = (jax.device_put(batch, on_mesh) for batch in warm), [compiled(p) for p in phases(recipe)]
        state, discarded = warm_momentum(recipe, mesh, state, given, steps, len(warm) // len(steps))
    for metric in discarded:
        run.seen["warmup_loss_per_rank"].append(np.asarray(metric.micro_loss))
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
        if state.stale and "trigram_table" in state.stale:  # PR 1182: per rank, the never-cleared gradient's norm before clipping
            clipped = np.sqrt(np.square(np.asarray(state.stale["trigram_table"], np.float64)).sum((1, 2)))
            of_step["stale_norm_per_rank"] = clipped / np.minimum(1, recipe.optim.clip_norm / (metric.micro_norm + 1e-6))
        for name, value in of_step.items():
            run.seen[name].append(value)
        if clear_stale:
            state = state._replace(stale=jax.tree.map(jnp.zeros_like, state.stale))
        if i + 1 in {*keep, len(batches)}:
            run.weights[f"after/{i + 1}"] = to_tensors(recipe.model, state.params)
    if state.ema is not None:
        run.weights["ema"] = to_tensors(recipe.model, state.ema)
    if state.swa is not None and (count := int(state.swa.count)):
        run.weights["swa"], run.swa_count = to_tensors(recipe.model, swa_mean(state.swa)), count
    return run
