"""Schedules on the clock and on steps, and the order of training data."""

import numpy as np

from golf_jax.config import BudgetConfig, load_recipe
from golf_jax.data.loader import ShuffledLoader, StreamLoader
from golf_jax.interop.checks.base import CheckResult, Comparison, Context
from golf_jax.interop.hparams import hyperparameters
from golf_jax.optim import schedules
from golf_jax.optim.schedules import Clock


def _factors(ctx: Context, step: np.ndarray, elapsed_ms: np.ndarray, *, steps: int = 0, seconds: float = 600.0) -> np.ndarray:
    schedule = load_recipe(ctx.recipe).schedule
    budget = BudgetConfig(steps=steps, seconds=seconds)
    pairs = zip(np.ravel(step), np.ravel(elapsed_ms), strict=True)
    return np.array([schedules.lr_factor(schedule, budget, Clock(int(s), float(ms) / 1000)) for s, ms in pairs])


def check_schedules(ctx: Context) -> list[CheckResult]:
    """sched.npz (PRs 372, 1182), or what train.npz holds of the real schedule (PR 638): the shipped recipe's schedule."""
    c = Comparison("schedule", 1e-12, "abs")
    matrices = next(g for g in load_recipe(ctx.recipe).optim.groups if g.kind == "muon")
    if ctx.has("sched"):
        z = ctx.file("sched")
        h = z.config()
        if ctx.recipe == "pr372":
            cap = h["max_wallclock_ms"] / 1000
            for part in ("wall", "irregular"):
                ours = _factors(ctx, z[f"{part}_step"], z[f"{part}_elapsed_ms"], seconds=cap)
                c.add(f"{part}_mult", ours, z[f"{part}_mult"])
            step = z["stepbased_step"]
            c.add("stepbased_mult", _factors(ctx, step, 0 * step, steps=h["iterations"]), z["stepbased_mult"])
            c.add("momentum", [schedules.muon_momentum(matrices, int(s)) for s in z["momentum_step"]], z["momentum"])
        else:
            for key, steps in (("wallclock600", 0), ("stepbased", h["iterations"])):
                table = z[f"{key}/step_elapsedms_scale"]
                ours = _factors(ctx, table[:, 0], table[:, 1], steps=steps, seconds=h["max_wallclock_s"])
                c.add(key, ours, table[:, 2])
            c.add("momentum", [schedules.muon_momentum(matrices, int(s)) for s in z["momentum/step"]], z["momentum/value"])
    if ctx.recipe == "pr638" and ctx.has("train"):
        z = ctx.file("train")
        for key in z:
            if key.startswith("sched_real/lr_mul_per_step_"):
                steps = int(key.split("_")[-2])
                s = np.arange(len(z[key]))
                c.add(key, _factors(ctx, s, 0 * s, steps=steps), z[key])
        if "sched_wallclock600s/step_elapsedms" in z:
            table = z["sched_wallclock600s/step_elapsedms"]
            c.add("wallclock", _factors(ctx, table[:, 0], table[:, 1]), z["sched_wallclock600s/lr_mul"])
    return [c.result()] if c.compared else []


def check_loader(ctx: Context) -> list[CheckResult]:
    """Batches drawn from the shards that loader.npz, train.npz or units.npz carry."""
    c = Comparison("data order", 0.0, "equal")
    name = "loader" if ctx.has("loader") else "train"
    if ctx.recipe == "pr2005":
        if ctx.has("units"):
            _shuffled(ctx, c)
    elif ctx.has(name):
        z = ctx.file(name)
        if "train_shards" in z:
            shards = np.split(z["train_shards"], np.cumsum(z.config()["train_shard_sizes"])[:-1])
        else:
            shards = [z[k] for k in sorted((k for k in z if k.startswith("shard")), key=lambda k: int(k.removeprefix("shard")))]
        if shards and "x" in z:
            steps, ranks, rows, seq_len = z["x"].shape
            loader = StreamLoader(shards, ranks, rows, seq_len)
            x, y = (np.stack(part).reshape(z["x"].shape) for part in zip(*(loader.next_batch()[:2] for _ in range(steps)), strict=True))
            c.add("x", x, z["x"])
            if "y" in z:
                c.add("y", y, z["y"])
            if "y_last" in z:
                c.add("y_last", y[..., -1], z["y_last"])
    return [c.result()] if c.compared else []


def _shuffled(ctx: Context, c: Comparison) -> None:
    """PR 2005: a token tells its shard and place, so that the batch tells what was drawn."""
    z = ctx.file("units")
    h = hyperparameters("pr2005", z.config())
    seq_len = int(z["loader/seq_len"]) if "loader/seq_len" in z else h["train_seq_len"]
    lengths = z["loader/shard_lengths"]
    stride = int(lengths.max())
    shards = [index * stride + np.arange(size) for index, size in enumerate(lengths)]
    for key in z:
        if key.startswith("loader/world") and key.endswith("/files"):
            run = key.split("/")[1]
            world, rank = (int(part.strip("worldank")) for part in run.split("_r"))
            want = z[f"loader/{run}/local_shard_and_start"]
            steps, rows = want.shape[:2]
            loader = ShuffledLoader(shards, world, rows=rows, seq_len=seq_len, row_slice=slice(rows * rank, rows * (rank + 1)))
            first = np.stack([loader.next_batch()[0][:, 0] for _ in range(steps)])
            shard, start = np.divmod(first, stride)
            c.add(f"{run} shards", shard, z[key][want[..., 0]])
            c.add(f"{run} starts", start, want[..., 1])
