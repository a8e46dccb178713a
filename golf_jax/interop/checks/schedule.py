"""Schedules of step and time, and the order in which batches are drawn."""

from typing import Any

import numpy as np

from golf_jax.config import GolfError
from golf_jax.data.loader import DocumentLoader, ShuffledLoader, StreamLoader
from golf_jax.interop.reference import BOS, Case, NotComputed
from golf_jax.optim import schedules
from golf_jax.optim.schedules import Clock
from golf_jax.training.phases import phase_at

LARGEST = 1 << 24  # tokens of shards that are made, places of cu_seqlens: a line of a set must not cost the memory of the machine


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
    if "drawn" in case.own:
        case.compare({"drawn": _drawn(case)})
    if "tokens" in case.seen:
        want = case.seen["tokens"]
        shards = [case.seen[f"shard/{i}"] for i in range(sum(k.startswith("shard/") for k in case.seen))]
        rows, length = want.shape[2], want.shape[3] - 1
        loader: Any = StreamLoader(shards, data.ranks, rows, length)
        if data.packed:
            loader = DocumentLoader(shards, data.ranks, length, case.settings.get("segment_limit", data.seq_len), bos_id=BOS)
        batches = [loader.next_batch() for _ in range(len(want))]
        read = np.stack([np.concatenate([b.inputs, b.targets[:, -1:]], 1) for b in batches])
        case.add("tokens", read.reshape(want.shape), want)
        if data.packed:
            segments = np.stack([b.segments for b in batches])
            starts = [[row_starts(row) for row in step] for step in segments]
            case.compare(
                {
                    "segments": segments[:, :, None],
                    "cu_seqlens": padded_starts(starts, length, case.settings.get("cu_bucket", 64)),
                    "longest_segment": [[max(np.diff([*row, length])) for row in step] for step in starts],
                }
            )


def row_starts(segments_T: np.ndarray) -> list[int]:
    """Where the runs of equal numbers begin."""
    return [0, *(np.flatnonzero(np.diff(segments_T)) + 1).tolist()]


def padded_starts(starts: list[list[list[int]]], length: int, bucket: int) -> np.ndarray:
    """The PR's cu_seqlens [S, R, *]: starts and the length, filled up with it to a multiple of `bucket`; -1 beyond an array's end."""
    if not 0 < bucket <= LARGEST // max(1, sum(map(len, starts))):
        raise GolfError(f"cu_bucket {bucket} is no multiple that cu_seqlens are filled up to")
    rows = [[[*row, *[length] * (-(-(len(row) + 1) // bucket) * bucket - len(row))] for row in step] for step in starts]
    width = max(len(row) for step in rows for row in step)
    return np.array([[row + [-1] * (width - len(row)) for row in step] for step in rows])


def _drawn(case: Case) -> np.ndarray:
    """Shard and first token of every row: a token tells its shard and place, so that the batch tells what was drawn."""
    data, lengths = case.recipe.data, case.seen["shard_lengths"]
    stride, (steps, *held) = int(lengths.max()), case.own["drawn"].shape
    if held != (asked := [data.ranks, data.rows_per_rank, 2]):
        raise GolfError(f"drawn holds {held} a step, its configuration draws {asked} [ranks, rows, 2]")
    if sum(map(int, lengths)) > LARGEST:
        raise NotComputed(f"shards of {sum(map(int, lengths)):,} tokens; at most {LARGEST:,} are made")
    shards = [index * stride + np.arange(size) for index, size in enumerate(lengths)]
    loader = ShuffledLoader(shards, data.ranks, rows=data.rows_per_rank, seq_len=data.seq_len)
    first = np.stack([loader.next_batch().inputs[:, 0] for _ in range(steps)])
    return np.stack(np.divmod(first, stride), -1).reshape(steps, data.ranks, data.rows_per_rank, 2)
