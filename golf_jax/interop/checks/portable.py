"""The three training steps of a portable reference file, in all the variants it holds."""

from dataclasses import replace

import numpy as np

from golf_jax.config import Recipe
from golf_jax.interop.checks.base import CheckResult, Context, Reference
from golf_jax.interop.checks.simulate import Batches, simulate
from golf_jax.interop.checks.training import BARS, Report, training_batch_recipe, without_fake_quant


def check_steps(ctx: Context) -> list[CheckResult]:
    """step/*, step_noqat/*, step_qat/*, step_noleak/*, step_ws1/*: all start from the stored parameters."""
    z, m = ctx.file("portable"), ctx.model("portable")
    steps = sorted({int(k.split("/")[1]) for k in z if k.startswith("step/") and k.split("/")[1].isdigit()})
    x, y = (np.stack([z[f"step/{i}/{what}"] for i in steps]) for what in ("tokens", "targets"))
    # Eight rows: eight ranks or accumulated micro-batches of one row, but one batch of one process in PR 2005.
    shape = (len(steps), 1, *x.shape[1:]) if ctx.recipe == "pr2005" else (*x.shape[:2], 1, x.shape[2])
    b = Batches(x.reshape(shape), y.reshape(shape))
    settings = z.config()
    if settings.get("lr_multiplier") == 1:
        settings |= {"warmdown_iters": 0}
    recipe = training_batch_recipe(ctx, settings, b)
    if ctx.recipe == "pr562":  # the file says so in its INDEX only: every step is averaged
        recipe = replace(recipe, schedule=replace(recipe.schedule, swa_every=1, swa_below=2.0))
    results = _main_run(ctx, z, recipe, m.params, b, steps)
    for tag, (variant, batches, options) in _variants(ctx, recipe, b).items():
        if f"{tag}/0/loss" in z:
            ours = simulate(ctx, variant, m.params, batches, **options)
            report = Report(tag.replace("_", " "), BARS["portable qat" if tag == "step_qat" else "portable"])
            report.losses(ours.loss, np.array([z[f"{tag}/{i}/loss"] for i in steps]))
            if f"{tag}/0/grad_norm" in z:
                report.norms(np.ravel(ours.rank_norm), np.array([z[f"{tag}/{i}/grad_norm"] for i in steps]))
            if any(k.startswith(f"{tag}/final/") for k in z):
                report.tensors("final", ours.after[len(steps)], z.under(f"{tag}/final/"))
            results += report.results()
    return results


def _main_run(ctx: Context, z: Reference, recipe: Recipe, params: dict, b: Batches, steps: list[int]) -> list[CheckResult]:
    quantized = ctx.recipe == "pr372"
    ours, report = simulate(ctx, recipe, params, b), Report("step", BARS["portable qat" if quantized else "portable"])

    def stored(key: str) -> np.ndarray:
        return np.array([z[f"step/{i}/{key}"] for i in steps])

    report.losses(ours.loss, stored("loss"))
    if "step/0/loss_per_rank" in z:
        report.losses(ours.micro_loss, stored("loss_per_rank"), "losses per rank")
    for key, values in (
        ("grad_norm", ours.grad_norm),
        ("grad_norm_per_rank", ours.rank_norm),
        ("trigram_embed_grad_norm_per_rank", ours.trigram_norm),
    ):
        if f"step/0/{key}" in z:
            report.norms(values, stored(key), key.replace("_", " "))
    report.scalars("muon_momentum", ours.momentum, stored("muon_momentum"))
    base = {g.name: g.lr for g in recipe.optim.groups}
    for key, groups in (
        ("muon_lr", ["matrix"]),
        ("lr_muon_scalar", ["matrix", "vector"]),
        ("lr_tok_muon_scalar", ["token", "matrix", "vector"]),
    ):
        if f"step/0/{key}" in z:
            want = stored(key).reshape(len(steps), -1)
            report.scalars(key, np.outer(ours.lr_factor, [base[g] for g in groups]), want)
    if "step/0/looping" in z:
        report.make("looping", 0.0, "equal").add("looping", ours.looping, stored("looping"))
    report.tensors("final", ours.after[len(steps)], z.under("step/final/"))
    report.tensors("ema", ours.ema, z.under("step/ema/"), report.bars.average)
    report.tensors("swa", ours.swa, z.under("step/swa/"), report.bars.average)
    return report.results()


def _variants(ctx: Context, recipe: Recipe, b: Batches) -> dict[str, tuple[Recipe, Batches, dict]]:
    """Tag -> (recipe, batches, options of `simulate`)."""
    if ctx.recipe == "pr372":
        return {"step_noqat": (without_fake_quant(recipe), b, {})}
    if ctx.recipe == "pr562":
        return {"step_qat": (replace(recipe, schedule=replace(recipe.schedule, fake_quant_below=1.0)), b, {})}
    if ctx.recipe == "pr1182":
        steps, ranks, per_rank, seq_len = b.x.shape
        whole = Batches(*(a.reshape(steps, 1, ranks * per_rank, seq_len) for a in (b.x, b.y)))
        alone = replace(recipe, data=replace(recipe.data, ranks=1, rows_per_rank=ranks * per_rank))
        return {"step_noleak": (recipe, b, {"clear_stale": True}), "step_ws1": (alone, whole, {})}
    return {}
