"""Training trajectories: the project's own compiled step on stored batches, step by step against the PR's script."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import Recipe
from golf_jax.interop.checks.base import CheckResult, Comparison, Context, Measure, Reference, compiler_options
from golf_jax.interop.checks.gradients import slice_of
from golf_jax.interop.hparams import training_recipe
from golf_jax.interop.torch_names import from_torch, to_torch
from golf_jax.mesh import make_mesh, replicated, rows
from golf_jax.optim import schedules
from golf_jax.optim.averaging import swa_mean
from golf_jax.optim.schedules import Clock
from golf_jax.training.leak import warm_up
from golf_jax.training.loop import step_inputs
from golf_jax.training.state import init_state
from golf_jax.training.step import make_step

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Batches:
    """int32 [steps, ranks, rows, T], in the order of training."""

    x: np.ndarray
    y: np.ndarray

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The global batch of a step, rank-major [ranks * rows, T]."""
        return tuple(np.ascontiguousarray(a[step].reshape(-1, a.shape[-1]), np.int32) for a in (self.x, self.y))  # pyright: ignore


@dataclass
class History:
    """What a run leaves, per step and at the end; tensors by the PR's names."""

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
    ctx: Context, recipe: Recipe, params: Tensors, batches: Batches, keep: Iterable[int] = (), *, clear_stale: bool = False
) -> History:
    """Train `recipe` (float32) from `params` on the stored batches. keep: step counts after which to keep all tensors.

    clear_stale: PR 1182's frozen gradients cleared after every step (those of the warm-up still enter the first one).
    """
    mesh = make_mesh(ctx.devices if recipe.data.ranks % ctx.devices == 0 else 1)
    state = init_state(recipe, mesh, 0, {k: jnp.asarray(v) for k, v in params.items()})
    on_mesh = rows(mesh)
    history, compiled, steps = History(), {}, len(batches.x)

    def batch(i: int) -> tuple[jax.Array, jax.Array]:
        return tuple(jax.device_put(a, on_mesh) for a in batches.rows(i))  # pyright: ignore[reportReturnType]

    def phase(looping: bool) -> Any:
        # Runs of one file differ in scalars and parameters only: one compiled step serves them all.
        key = ("step", _graph(recipe), batches.x.shape[1:], looping, mesh.size)

        def build() -> Any:
            lowered = make_step(recipe, mesh, state, looping=looping).lower(state, *batch(0), inputs)
            return lowered.compile(compiler_options() if mesh.size == 1 else None)

        if looping not in compiled:
            compiled[looping] = ctx.once(key, build)
        return compiled[looping]

    inputs, _ = step_inputs(recipe, Clock(0, 0.0))
    inputs = jax.device_put(inputs, replicated(mesh))
    if recipe.schedule.leak_warmup_steps:
        warm = (batch(i) for i in range(recipe.schedule.leak_warmup_steps))
        state, metrics = warm_up(recipe, mesh, state, warm, phase(True))
        history.warm_up_loss = [np.asarray(m.micro_loss) for m in metrics]
    for i in range(steps):
        inputs, looping = step_inputs(recipe, Clock(i, 0.0))
        state, metric = phase(looping)(state, *batch(i), jax.device_put(inputs, replicated(mesh)))
        metric = jax.tree.map(np.asarray, metric)
        history.loss.append(float(metric.loss))
        history.micro_loss.append(metric.micro_loss)
        history.grad_norm.append(float(metric.grad_norm))
        history.rank_norm.append(metric.micro_norm)
        history.lr_factor.append(schedules.lr_factor(recipe.schedule, recipe.budget, Clock(i, 0.0)))
        history.momentum.append(schedules.muon_momentum(recipe.optim, i))
        history.looping.append(looping)
        if state.stale and "trigram_table" in state.stale:
            clipped = np.sqrt(np.square(np.asarray(state.stale["trigram_table"], np.float64)).sum((1, 2)))
            history.trigram_norm.append(clipped / np.minimum(1, recipe.optim.clip_norm / (metric.micro_norm + 1e-6)))
        if clear_stale:
            state = state._replace(stale=jax.tree.map(jnp.zeros_like, state.stale))
        if i + 1 in {*keep, steps}:
            history.after[i + 1] = to_torch(ctx.recipe, recipe.model, state.params)
    if state.ema is not None:
        history.ema = to_torch(ctx.recipe, recipe.model, state.ema)
    if state.swa is not None and int(state.swa.count):
        history.swa, history.swa_count = to_torch(ctx.recipe, recipe.model, swa_mean(state.swa)), int(state.swa.count)
    return history


def _graph(recipe: Recipe) -> Recipe:
    """The part of a recipe that shapes the compiled step: schedules reach it as scalars."""
    qat = float(recipe.schedule.fake_quant_below > 0)
    schedule = replace(recipe.schedule, warmdown_steps=0, warmdown_frac=0.0, fake_quant_below=qat, leak_warmup_steps=0)
    return dataclasses.replace(recipe, schedule=schedule, budget=replace(recipe.budget, steps=1))


@dataclass(frozen=True)
class Bars:
    """Tolerances of one run; losses absolute, norms relative, tensors relative L2 unless said otherwise."""

    loss: float
    tensors: float
    norm: float = 1e-3
    first_loss: float = 0.0
    """Of the steps before `noisy_from`, where fake quantization makes the rest chaotic."""
    noisy_from: int = 0
    average: float = 0.0
    early: float = 0.0
    """Of tensors after the first steps; 0: as `tensors`."""


BARS = {
    "pr372 train": Bars(5e-3, 2e-2, first_loss=1e-5, noisy_from=1, average=1e-3, early=1e-3),
    "pr372 train_noqat": Bars(1e-4, 1e-3, average=1e-4, early=1e-4),
    "pr562 train": Bars(1e-5, 1e-5, norm=1e-4),
    "pr562 train qat": Bars(2e-3, 5e-4, norm=2e-2, first_loss=1e-5),
    "pr638 train": Bars(1e-4, 2e-4),
    "pr638 train_prinit": Bars(1e-4, 2e-4),
    "pr1182 train": Bars(1e-4, 5e-4, average=1e-4),
    "pr2005 train": Bars(1e-3, 2e-3),
    "portable": Bars(1e-4, 1e-3, average=1e-4),
    "portable qat": Bars(1e-3, 2e-3, first_loss=1e-5, noisy_from=1, average=1e-4),
}


class Report:
    """The comparisons of one run."""

    def __init__(self, label: str, bars: Bars):
        self.label, self.bars, self.all = label, bars, []

    def make(self, what: str, tolerance: float, measure: Measure) -> Comparison:
        self.all.append(Comparison(f"{self.label}: {what}", tolerance, measure))
        return self.all[-1]

    def losses(self, ours: Any, want: np.ndarray, what: str = "losses") -> None:
        """Per step (first axis). Steps before the chaos of fake quantization keep their tight bar."""
        ours, want = np.asarray(ours, np.float64), np.asarray(want, np.float64)
        start = min(self.bars.noisy_from, len(want))
        if start:
            self.make(f"{what}, first steps", self.bars.first_loss, "abs").add(what, ours[:start], want[:start])
        if start < len(want):
            self.make(what, self.bars.loss, "abs").add(what, ours[start:], want[start:])

    def norms(self, ours: Any, want: np.ndarray, what: str = "gradient norms") -> None:
        self.make(what, self.bars.norm, "rel").add(what, ours, want)

    def scalars(self, what: str, ours: Any, want: np.ndarray) -> None:
        self.make(what, 1e-9, "rel").add(what, np.asarray(ours, np.float64), want)

    def tensors(self, what: str, ours: Tensors, want: Tensors, tolerance: float = 0.0, table: tuple[float, Measure] | None = None) -> None:
        """ours: complete, by name. want: tensors, first rows of tensors, slices of banks.

        table: bar of the embedding tables, whose near-zero gradients Adam amplifies, where the INDEX gives them their own.
        """
        c = Comparison(f"{self.label}: {what}", tolerance or self.bars.tensors, "rel L2")
        tables = Comparison(f"{self.label}: {what}, tables", *(table or (self.bars.tensors, "rel L2")))
        for name, reference in want.items():
            found = slice_of(ours, name)
            if found is None:
                c.fail(f"{name}: no such tensor here")
            else:
                found = found[: len(reference)] if reference.ndim else found
                (tables if table and "emb" in name else c).add(name, found, reference)
        self.all += [x for x in (c, tables) if x.compared]

    def results(self) -> list[CheckResult]:
        return [c.result() for c in self.all]


@dataclass
class Run:
    """A reference run and ours of it."""

    recipe: Recipe
    batches: Batches
    ours: History

    @property
    def final(self) -> Tensors:
        return self.ours.after[len(self.batches.x)]


def main_run(ctx: Context, name: str = "train") -> Run:
    """The run of NAME.npz, trained once: PR 372, 638, 1182."""

    def train() -> Run:
        b, params, keep = _SOURCES[ctx.recipe](ctx, name)
        recipe = training_batch_recipe(ctx, ctx.file(name).config(), b)
        if name == "train_noqat":
            recipe = without_fake_quant(recipe)
        return Run(recipe, b, simulate(ctx, recipe, params, b, keep=keep))

    return ctx.once(("run", name), train)


def _source_372(ctx: Context, name: str) -> tuple[Batches, Tensors, list[int]]:
    z = ctx.file(name if "x" in ctx.file(name) else "train")
    return Batches(z["x"], z["y"]), ctx.model().params, [1]


def _source_638(ctx: Context, name: str) -> tuple[Batches, Tensors, list[int]]:
    z = ctx.file(name)
    x = z["x"].astype(np.int32)
    b = Batches(x, np.concatenate([x[..., 1:], z["y_last"].astype(np.int32)[..., None]], axis=-1))
    start = z.under("init/")
    return b, (from_torch(ctx.recipe, z.config(), start)[1] if start else ctx.model().params), [1, 10]


def _source_1182(ctx: Context, name: str) -> tuple[Batches, Tensors, list[int]]:
    z = ctx.file(name)
    return Batches(z["tokens"], z["targets"]), ctx.model().params, [1, 3]


_SOURCES = {"pr372": _source_372, "pr638": _source_638, "pr1182": _source_1182}


def check_train(ctx: Context) -> list[CheckResult]:
    """train.npz, train_noqat.npz, train_prinit.npz."""
    results = []
    for name in ("train", "train_noqat", "train_prinit"):
        if ctx.has(name):
            results += _RUNS[ctx.recipe](ctx, name)
    return results


def training_batch_recipe(ctx: Context, settings: dict[str, Any], b: Batches) -> Recipe:
    """The PR's training with the settings stored beside the batches; as many steps as there are batches unless they say otherwise."""
    _, ranks, per_rank, seq_len = b.x.shape
    settings = settings | {"iterations": settings.get("iterations", settings.get("ITERATIONS", len(b.x)))}
    return training_recipe(ctx.recipe, settings, ranks=ranks, rows_per_rank=per_rank, seq_len=seq_len)


def _lrs(recipe: Recipe, history: History, group: str) -> np.ndarray:
    base = next(g.lr for g in recipe.optim.groups if g.name == group)
    return base * np.array(history.lr_factor)


def without_fake_quant(recipe: Recipe) -> Recipe:
    model = replace(recipe.model, fake_quant=replace(recipe.model.fake_quant, in_eval=False))
    return replace(recipe, model=model, schedule=replace(recipe.schedule, fake_quant_below=0.0))


def _run_372(ctx: Context, name: str) -> list[CheckResult]:
    z, run, bars = ctx.file(name), main_run(ctx, name), BARS[f"pr372 {name}"]
    recipe, ours, report = run.recipe, run.ours, Report(name, bars)
    report.losses(ours.loss, z["loss"])
    if "loss_micro" in z:
        report.losses(ours.micro_loss, z["loss_micro"], "micro-batch losses")
    for key, values in (("lr_mult", ours.lr_factor), ("muon_lr", _lrs(recipe, ours, "matrix")), ("muon_momentum", ours.momentum)):
        if key in z:
            report.scalars(key, values, z[key])
    table: Any = (1e-2, "rel L2") if name == "train" else None
    report.tensors("after step 1", ours.after[1], z.under("step1/"), bars.early, table)
    report.tensors("final", run.final, z.under("raw/"))
    report.tensors("ema", ours.ema, z.under("ema/"), bars.average)
    return report.results()


def _run_562(ctx: Context, name: str) -> list[CheckResult]:
    z, m = ctx.file(name), ctx.model()
    tokens = z["tokens"].astype(np.int32)
    targets = np.concatenate([tokens[..., 1:], z["targets_last"].astype(np.int32)[..., None]], axis=-1)
    b = Batches(tokens, targets)
    plain = training_batch_recipe(ctx, z.config(), b)
    qat = replace(plain, schedule=replace(plain.schedule, fake_quant_below=float(z.config().get("qat_threshold", 0.5))))
    results = []
    for prefix, recipe, label in (("", plain, name), ("qat_", qat, f"{name} with late QAT")):
        if f"{prefix}loss" not in z:
            continue
        steps = {int(k.split("/")[0].removeprefix(f"{prefix}step")) for k in z if k.startswith(f"{prefix}step")}
        ours = simulate(ctx, recipe, m.params, b, keep=steps)
        bars = BARS["pr562 train qat" if prefix else "pr562 train"]
        if prefix:  # the first two quantized steps still agree; where that is follows from the schedule
            begin = next(i for i, f in enumerate(ours.lr_factor) if f < recipe.schedule.fake_quant_below)
            bars = replace(bars, noisy_from=begin + 2)
        report = Report(label, bars)
        report.losses(ours.loss, z[f"{prefix}loss"])
        if f"{prefix}micro_loss" in z:
            report.losses(ours.micro_loss, z[f"{prefix}micro_loss"], "micro-batch losses")
        report.norms(ours.grad_norm, z[f"{prefix}grad_norm"])
        if not prefix:
            lrs = (("lr_mul", ours.lr_factor), ("muon_lr", _lrs(recipe, ours, "matrix")), ("scalar_lr", _lrs(recipe, ours, "vector")))
            for key, values in (*lrs, ("momentum", ours.momentum)):
                if key in z:
                    report.scalars(key, values, z[key])
        table: Any = None if prefix else (5e-4, "abs")
        for step in sorted(steps):
            report.tensors(f"after step {step}", ours.after[step], z.under(f"{prefix}step{step}/"), table=table)
        report.tensors("swa", ours.swa, z.under(f"{prefix}swa/"), table=table)
        results += report.results()
    return results


def _run_638(ctx: Context, name: str) -> list[CheckResult]:
    z, run = ctx.file(name), main_run(ctx, name)
    recipe, ours, report = run.recipe, run.ours, Report(name, BARS[f"pr638 {name}"])
    report.losses(ours.loss, z["loss"])
    if "grad_norm_before_clip" in z:
        report.norms(ours.grad_norm, z["grad_norm_before_clip"])
    lrs = [(f"lr_{short}", _lrs(recipe, ours, group)) for short, group in (("tok", "token"), ("muon", "matrix"), ("scalar", "vector"))]
    for key, values in (("lr_mult", ours.lr_factor), ("muon_momentum", ours.momentum), *lrs):
        if key in z:
            report.scalars(key, values, z[key])
    for step in (1, 10):
        if step in ours.after:
            report.tensors(f"after step {step}", ours.after[step], z.under(f"step{step}/"))
    report.tensors("final", run.final, z.under("final/"))
    report.tensors("ema", ours.ema, z.under("ema/"))
    return report.results()


def _run_1182(ctx: Context, name: str) -> list[CheckResult]:
    z, run, bars = ctx.file(name), main_run(ctx, name), BARS["pr1182 train"]
    recipe, b, ours, report = run.recipe, run.batches, run.ours, Report(name, bars)
    if "warm_loss_per_rank" in z:
        report.losses(ours.warm_up_loss, z["warm_loss_per_rank"], "warm-up losses per rank")
    report.losses(ours.micro_loss, z["loss_per_rank"], "losses per rank")
    report.norms(ours.rank_norm, z["preclip_norm_per_rank"], "gradient norms per rank")
    if "trigram_embed_grad_norm_before_clip_per_rank" in z:
        report.norms(ours.trigram_norm, z["trigram_embed_grad_norm_before_clip_per_rank"], "leaked trigram gradient per rank")
    for key, values in (("lr_scale", ours.lr_factor), ("muon_momentum", ours.momentum)):
        if key in z:
            report.scalars(key, values, z[key])
    for step in (1, 3):
        report.tensors(f"after step {step}", ours.after[step], z.under(f"after{step}/"))
    report.tensors("final", run.final, z.under("final/"))
    report.tensors("ema", ours.ema, z.under("ema/"), bars.average)
    report.tensors("swa", ours.swa, z.under("swa/"))
    if "swa_count" in z:
        report.make("swa count", 0.0, "equal").add("swa_count", ours.swa_count, z["swa_count"])
    return report.results() + _variants_1182(ctx, z, recipe, b)


def _variants_1182(ctx: Context, z: Reference, recipe: Recipe, b: Batches) -> list[CheckResult]:
    """The same run without the leak, with late QAT that acts, and on one rank that clips the accumulated gradient once."""
    results, params = [], ctx.model().params
    if "variant_clean/loss_per_rank" in z:
        ours, report = simulate(ctx, recipe, params, b, clear_stale=True), Report("train, stale gradients cleared", BARS["pr1182 train"])
        report.losses(ours.micro_loss, z["variant_clean/loss_per_rank"], "losses per rank")
        report.norms(ours.rank_norm, z["variant_clean/preclip_norm_per_rank"], "gradient norms per rank")
        results += report.results()
    if "variant_qatlive/loss_per_rank" in z:
        live = replace(recipe, schedule=replace(recipe.schedule, fake_quant_below=0.15))
        ours, report = simulate(ctx, live, params, b), Report("train with late QAT", BARS["pr1182 train"])
        report.losses(ours.micro_loss, z["variant_qatlive/loss_per_rank"], "losses per rank")
        results += report.results()
    if "variant_ws1/preclip_norm" in z:
        steps, ranks, per_rank, seq_len = b.x.shape
        whole = Batches(*(a.reshape(steps, 1, ranks * per_rank, seq_len) for a in (b.x, b.y)))
        alone = replace(recipe, data=replace(recipe.data, ranks=1, rows_per_rank=ranks * per_rank))
        ours, report = simulate(ctx, alone, params, whole), Report("train on one rank", BARS["pr1182 train"])
        report.losses(ours.loss, z["variant_ws1/loss_per_micro"].mean(1))
        report.norms(np.ravel(ours.rank_norm), z["variant_ws1/preclip_norm"])
        report.tensors("final", ours.after[steps], z.under("variant_ws1/final/"))
        results += report.results()
    return results


def _run_2005(ctx: Context, name: str) -> list[CheckResult]:
    z, m = ctx.file(name), ctx.model()
    b = Batches(z["tokens"][:, None], z["targets"][:, None])  # one process, one batch
    recipe = training_batch_recipe(ctx, z.config(), b)
    ours, report = simulate(ctx, recipe, m.params, b), Report(name, BARS["pr2005 train"])
    report.losses(ours.loss, z["loss"])
    if "grad_norm_before_clip" in z:
        report.norms(ours.grad_norm, z["grad_norm_before_clip"])
    lrs = np.stack([_lrs(recipe, ours, g) for g in ("token", "matrix", "vector")], 1)
    for key, values in (("lr_mult", ours.lr_factor), ("muon_momentum", ours.momentum), ("lr_tok_matrix_scalar", lrs)):
        if key in z:
            report.scalars(key, values, z[key])
    if "looping" in z:
        report.make("looping", 0.0, "equal").add("looping", ours.looping, z["looping"])
    final = ours.after[len(b.x)]
    for key, tensors in (("raw", final), ("ema", ours.ema)):
        report.tensors(key, tensors, z.under(f"final_{key}/"))
        rows_of = {n: tensors[n][z["tok_emb_rows"]] for n in z.under(f"final_{key}_rows/")}
        report.tensors(f"{key}, rows of the token table", rows_of, z.under(f"final_{key}_rows/"), 5e-3)
        if f"final_{key}_norm_all" in z:
            norms = [np.linalg.norm(tensors[str(n)].astype(np.float64)) for n in z["names_all"]]
            report.make(f"{key}, norms of all tensors", report.bars.tensors, "rel").add("norms", norms, z[f"final_{key}_norm_all"])
    return report.results()


_RUNS = {"pr372": _run_372, "pr562": _run_562, "pr638": _run_638, "pr1182": _run_1182, "pr2005": _run_2005}
