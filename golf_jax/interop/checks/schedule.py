"""Schedules of step and time, and the order in which batches are drawn."""

from typing import Any

import numpy as np

from golf_jax.data.loader import ShuffledLoader, StreamLoader
from golf_jax.interop.checks.reference import Case, NotComputed
from golf_jax.optim import schedules
from golf_jax.optim.schedules import Clock
from golf_jax.training.phases import phase_at


def check_schedule(case: Case) -> None:
    recipe, steps = case.recipe, case.seen["step"]
    clocks = [Clock(int(s), float(t)) for s, t in zip(steps, case.seen.get("seconds", 0.0 * steps), strict=True)]
    case.compare(
        {
            "lr_factor": [schedules.lr_factor(recipe.schedule, recipe.budget, c) for c in clocks],
            "momentum": [schedules.muon_momentum(case.matrices, c.step) for c in clocks],
            "looping": [phase_at(recipe, c).looping for c in clocks],
        }
    )


def check_loader(case: Case) -> None:
    data = case.recipe.data
    if data.order == "documents":
        raise NotComputed("batches of packed documents (data.order 'documents') are not implemented")
    if "drawn" in case.own:
        case.compare({"drawn": _drawn(case)})
    if "tokens" in case.seen:
        want = case.seen["tokens"]
        shards = [case.seen[f"shard/{i}"] for i in range(sum(k.startswith("shard/") for k in case.seen))]
        loader: Any = StreamLoader(shards, data.ranks, data.rows_per_rank, data.seq_len)
        rows = np.stack([np.concatenate([b.inputs, b.targets[:, -1:]], 1) for b in (loader.next_batch() for _ in want)])
        case.add("tokens", rows.reshape(len(want), data.ranks, data.rows_per_rank, -1), want)


def _drawn(case: Case) -> np.ndarray:
    """Shard and first token of every row: a token tells its shard and place, so that the batch tells what was drawn."""
    data, lengths = case.recipe.data, case.seen["shard_lengths"]
    stride, steps = int(lengths.max()), len(case.own["drawn"])
    shards = [index * stride + np.arange(size) for index, size in enumerate(lengths)]
    loader = ShuffledLoader(shards, data.ranks, rows=data.rows_per_rank, seq_len=data.seq_len)
    first = np.stack([loader.next_batch().inputs[:, 0] for _ in range(steps)])
    return np.stack(np.divmod(first, stride), -1).reshape(steps, data.ranks, data.rows_per_rank, 2)
