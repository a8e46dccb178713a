"""The training loop: compile every phase, then step until the budget is spent, reading metrics one step late."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from golf_jax.ahead import all_made
from golf_jax.config import GolfError, Recipe
from golf_jax.data.loader import Batch, Loader
from golf_jax.data.prefetch import Prefetcher
from golf_jax.kernels.attention import assert_backend
from golf_jax.mesh import platform, put_replicated, rows
from golf_jax.optim import schedules
from golf_jax.optim.averaging import swa_mean
from golf_jax.optim.schedules import Clock
from golf_jax.processes import CompileTimes, from_all
from golf_jax.progress import patience
from golf_jax.starting import work_begins
from golf_jax.training.checkpoints import Found
from golf_jax.training.clock import TrainingClock
from golf_jax.training.keep import Keeper
from golf_jax.training.leak import leaked_momentum, leaked_state, momentum_leaks
from golf_jax.training.phases import Phase, phase_at, phases
from golf_jax.training.rundir import RunDir
from golf_jax.training.state import TrainState, graph, init_state
from golf_jax.training.step import StepInputs, StepMetrics, compile_step, step_inputs

PROFILED_FROM = 5  # steps after the first, when caches and queues are warm

Validate = Callable[[dict[str, jax.Array], bool, bool], Any]


@dataclass(frozen=True)
class Trained:
    """What training leaves."""

    params: dict[str, jax.Array]
    """The weights that become the model (`schedule.export`), in their storage dtypes."""
    steps: int
    seconds: float
    """On the training clock."""
    final_loss: float
    """Training loss of the last step, nats per token."""
    compile_seconds: dict[str, float]


def compile_phases(recipe: Recipe, mesh: Mesh, state: Callable[[], TrainState], run: RunDir) -> tuple[dict[Phase, Any], dict[str, float]]:
    """The compiled step of every phase of the run, and the seconds each took to compile, in whatever thread and whenever that was.

    Each has run once, on a copy of the state: what a first call sets up (kernels, communicators) is not left to the clock. A process
    alone on a CPU has neither, and its first step would only come later. state: waited for after the first is compiled.
    """
    alone = platform(mesh) == "cpu" and jax.process_count() == 1
    tokens = np.zeros(recipe.data.batch_shape, np.int32)
    zeros = jax.make_array_from_callback(tokens.shape, rows(mesh), lambda index: tokens[index])
    inputs = put_replicated(mesh, step_inputs(recipe, Clock(0, 0.0)))
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    compiled, seconds, times = {}, {}, CompileTimes()
    for phase in phases(recipe):
        key = f"{graph(recipe)} {phase} {mesh.size} {platform(mesh)}"
        run.log(f"compiling {phase.name}{times.last(key)}")
        step, seconds[phase.name] = compile_step(graph(recipe), mesh, phase)
        compiled[phase] = step
        assert_backend(step.as_text() or "", recipe.model.attention)
        times.keep(key, seconds[phase.name])
        compiled_in = f"compiled {phase.name} in {seconds[phase.name]:.1f} s"
        if alone:
            run.log(compiled_in)
            continue
        now = state()
        from_all(phase.name)  # the first collective gives a process that still compiles half a minute only
        begin = time.perf_counter()
        jax.block_until_ready(step(copy(now), Batch(zeros, zeros, zeros if recipe.data.packed else None), inputs))
        run.log(f"{compiled_in}, first run {time.perf_counter() - begin:.1f} s")
    return compiled, seconds


def train(
    recipe: Recipe,
    mesh: Mesh,
    loader: Loader,
    run: RunDir,
    keeper: Keeper,
    *,
    found: Found | None = None,
    validate: Validate | None = None,
    profile: int = 0,
) -> Trained:
    """Train `recipe` (model resolved) on `loader`, from the checkpoint `found` if there is one.

    validate(params, looping, rehearse): called on the raw weights every `eval.every` steps, outside the clock; returns an object whose
    `score` gives loss and bpb. With `rehearse` it only has to compile what it needs. The state is saved at the end, whatever happened to
    the checkpoints before. profile: steps to be traced into the run directory, from the sixth on. Raises GolfError if the loss stops
    being finite, Interrupted (after saving) when a signal arrives.
    """
    step, clock = 0, TrainingClock()
    if found:
        step, clock = found.step, TrainingClock(found.meta["seconds"])
        loader.restore(found.meta["position"])
        run.truncate_metrics(step)
        keeper.starts_at(step, clock.local_seconds)
        run.log(f"resumed at step {step}, {clock.local_seconds:.1f} s of training")
    with ThreadPoolExecutor(1) as thread:  # XLA lets go of the interpreter while it compiles
        begun = thread.submit(lambda: found.state if found else init_state(recipe, mesh, recipe.seed))
        steps, compile_seconds = compile_phases(recipe, mesh, begun.result, run)
    state = begun.result()
    work_begins()
    if recipe.schedule.leak_warmup_steps and not step:
        state = leaked_state(recipe, mesh, state, loader, list(steps.values())[-1])
    if recipe.schedule.leak_momentum_steps and not step:
        warm = f"{recipe.schedule.leak_momentum_steps} discarded steps of {' and '.join(phase.name for phase in steps)}"
        if momentum_leaks(recipe):
            state = leaked_momentum(recipe, mesh, state, loader, list(steps.values()))
            run.log(f"Muon starts with the momentum of {warm}, as in the record's distributed run (numerics as_run)")
        else:
            run.log(f"Muon starts without momentum: that of {warm} is kept only with numerics as_run and data.ranks above 1")
    flags = dict.fromkeys(phase.looping for phase in steps)
    for looping in flags if validate and recipe.eval.every else ():
        begin = time.perf_counter()
        name = "validation_looping" if looping and len(flags) > 1 else "validation"
        with patience(run.log, f"compiling {name}"):
            validate(state.params, looping, True)  # pyright: ignore[reportOptionalCall]
        compile_seconds[name] = time.perf_counter() - begin
        run.log(f"compiled {name} in {compile_seconds[name]:.1f} s")
    watch, first = _Watch(recipe, run, keeper, found.meta.get("loss", math.nan) if found else math.nan), step
    pending: tuple[int, StepInputs, StepMetrics] | None = None

    if not recipe.budget.steps:
        all_made()  # what still compiles would take the clock's time
    with Prefetcher(loader, mesh, keeper.lookahead) as batches, keeper.signals.held(), jax.transfer_guard("disallow"):
        keeper.starts_with(batches)
        clock.start()
        while True:
            seconds = clock.seconds() if not recipe.budget.steps else clock.local_seconds
            if step >= recipe.budget.steps if recipe.budget.steps else step and seconds >= recipe.budget.seconds:
                break
            if validate and recipe.eval.every and step % recipe.eval.every == 0:
                jax.block_until_ready(state.params)
                with clock.paused(), jax.transfer_guard("allow"):
                    looping = phase_at(recipe, Clock(max(step - 1, 0), seconds)).looping
                    watch.validation(step, seconds, validate(state.params, looping, False))
            now = Clock(step, seconds)
            inputs = step_inputs(recipe, now)
            if profile and step - first in (PROFILED_FROM, PROFILED_FROM + profile):
                jax.block_until_ready(state.params)
                _trace(run, begins=step - first == PROFILED_FROM)
            try:
                batch = next(batches)
            except GolfError as error:  # a shard that was altered meanwhile, or holds no tokens of this vocabulary
                if pending:
                    watch.step(*pending, clock)
                with jax.transfer_guard("allow"):
                    raise keeper.without_data(str(error), step, state, clock.local_seconds, batches.state(), watch.loss) from None
            state, metrics = steps[phase_at(recipe, now)](state, batch, put_replicated(mesh, inputs))
            if pending:
                watch.step(*pending, clock)
            pending = (step, inputs, metrics)
            step += 1
            signal, due, trouble = keeper.asked(step, clock.local_seconds, batches)
            if signal or due or trouble:
                watch.step(*pending, clock)
                pending = None
                with clock.paused(), jax.transfer_guard("allow"):
                    arguments = (step, state, clock.local_seconds, batches.state(), watch.loss)
                    if signal:
                        raise keeper.stop(signal, *arguments)
                    if trouble:
                        raise keeper.without_data(trouble, *arguments)
                    keeper.save(*arguments)
        if pending:
            watch.step(*pending, clock)
        jax.block_until_ready(state.params)
        clock.stop()
        if profile and step - first <= PROFILED_FROM + profile:  # the run ended before its trace did
            if step - first > PROFILED_FROM:
                _trace(run, begins=False)
            else:
                run.log(f"profile: nothing traced, the run had no more than {PROFILED_FROM} steps")
        with jax.transfer_guard("allow"):
            if keeper.save(step, state, clock.local_seconds, batches.state(), watch.loss, wait=True):
                run.log(f"training complete: step {step} is saved")
    return Trained(exported(recipe, state), step, clock.local_seconds, watch.loss, compile_seconds)


def _trace(run: RunDir, begins: bool) -> None:
    """Begin or end a trace of the steps, in the run directory."""
    with jax.transfer_guard("allow"):
        if begins:
            jax.profiler.start_trace(run.path / "profile")
        else:
            jax.profiler.stop_trace()
            run.log(f"profile: {run.path / 'profile'} (tensorboard --logdir, or ui.perfetto.dev)")


def exported(recipe: Recipe, state: TrainState) -> dict[str, jax.Array]:
    """The weights that become the model, in the storage dtypes of the parameters."""
    if recipe.schedule.export == "ema":
        assert state.ema is not None
        return {n: e.astype(state.params[n].dtype) for n, e in state.ema.items()}
    if recipe.schedule.export == "swa":
        count = int(state.swa.count)
        if count < 2:
            raise GolfError(f"schedule.export 'swa': {count} checkpoint(s) collected; lower swa_every or raise swa_below")
        return swa_mean(state.swa)
    return state.params


class _Watch:
    """Reads metrics one step late, so that the device never waits for the host, and reports them."""

    def __init__(self, recipe: Recipe, run: RunDir, keeper: Keeper, loss: float) -> None:
        self.recipe, self.run, self.keeper = recipe, run, keeper
        self.total = recipe.budget.steps
        self.loss = loss
        self._first: tuple[int, float] | None = None

    def step(self, step: int, inputs: StepInputs, metrics: StepMetrics, clock: TrainingClock) -> None:
        self.loss, norm = (float(v) for v in jax.device_get((metrics.loss, metrics.grad_norm)))
        seconds = clock.local_seconds  # read after the wait: the time at which this step was done
        self.keeper.learned(step, self.loss)
        if not math.isfinite(self.loss):
            self.run.metrics("train", step=step, loss=None, seconds=seconds)
            raise self.keeper.diverged(step, self.loss)
        factor = float(inputs.lr_factor)
        momentum = next((schedules.muon_momentum(g, step) for g in self.recipe.optim.groups if g.kind == "muon"), None)
        self.run.metrics("train", step=step, loss=self.loss, lr_factor=factor, momentum=momentum, grad_norm=norm, seconds=round(seconds, 4))
        done = step + 1
        self._first = self._first or (done, seconds)
        rate = (done - self._first[0]) / max(seconds - self._first[1], 1e-9) or done / max(seconds, 1e-9)
        left = (self.total - done) / rate if self.total else max(self.recipe.budget.seconds - seconds, 0.0)
        total = self.total or round(done + left * rate)
        line = (
            f"step:{done}/{total} train_loss:{self.loss:.4f} train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / done:.2f}ms "
            f"lr:{factor:.3f} tok/s:{rate * self.recipe.data.batch_tokens:,.0f} eta:{left:.0f}s"
        )
        if done <= 3 or done % self.recipe.log_every == 0 or done == self.total:
            self.run.log(line)
        else:
            self.run.live(line)

    def validation(self, step: int, seconds: float, result: Any) -> None:
        score, average = result.score, 1000 * seconds / max(step, 1)
        self.run.metrics("validation", step=step, seconds=round(seconds, 4), val_loss=score.loss, val_bpb=score.bpb)
        self.run.log(f"step:{step}/{self.total} {score.line()} train_time:{1000 * seconds:.0f}ms step_avg:{average:.2f}ms")
