"""Training trajectories, step by step against the PR's script (train.npz)."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from golf_jax.config import Recipe
from golf_jax.interop.checks.base import CheckResult, Comparison, Context, Measure, Reference
from golf_jax.interop.checks.gradients import slice_of
from golf_jax.interop.checks.simulate import Batches, History, Tensors, simulate
from golf_jax.interop.hparams import training_recipe
from golf_jax.interop.torch_names import from_torch


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

    def losses(self, ours: Any, want: np.ndarray, what: str = "losses", bars: Bars | None = None) -> None:
        """Per step (first axis). Steps before the chaos of fake quantization keep their tight bar. bars: other than the report's."""
        ours, want, bars = np.asarray(ours, np.float64), np.asarray(want, np.float64), bars or self.bars
        start = min(bars.noisy_from, len(want))
        if start:
            self.make(f"{what}, first steps", bars.first_loss, "abs").add(what, ours[:start], want[:start])
        if start < len(want):
            self.make(what, bars.loss, "abs").add(what, ours[start:], want[start:])

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
        micro_bars = bars
        if prefix:  # the first two quantized steps still agree; where that is follows from the schedule
            begin = next(i for i, f in enumerate(ours.lr_factor) if f < recipe.schedule.fake_quant_below)
            # In their mean, that is: a start perturbed by 1e-7 moves single micro-batches of the second one by 2e-5, the mean by 1e-6.
            bars, micro_bars = replace(bars, noisy_from=begin + 2), replace(bars, noisy_from=begin)
        report = Report(label, bars)
        report.losses(ours.loss, z[f"{prefix}loss"])
        if f"{prefix}micro_loss" in z:
            report.losses(ours.micro_loss, z[f"{prefix}micro_loss"], "micro-batch losses", micro_bars)
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
