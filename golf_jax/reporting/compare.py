"""Runs grouped by their settings, and whether the groups differ by more than the noise between seeds."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtr

from golf_jax.config import differences
from golf_jax.proof.statistics import LEVEL, paired_test
from golf_jax.reporting.record import Record

MOST_SEEDS = 1000
MOST_FIELDS = 3  # in the label of a group
SAME_TEXT = 0.005  # difference in bytes per token that whole rows of another length make, and no other tokenizer


@dataclass(frozen=True)
class Group:
    """Runs whose settings are the same but for the seed. label: their values of what differs, or the first run where that is much."""

    label: str
    runs: tuple[Record, ...]

    def scores(self, method: str) -> dict[int, float]:
        """seed -> nats per token by `method`, of the runs that have it."""
        return {r.recipe.seed: r.evaluations[method]["val_loss"] for r in self.runs if method in r.evaluations}

    def rate(self, method: str) -> float:
        """Bytes of text per token that `method` scored, mean of the runs: where it is another, nats per token are not comparable."""
        return statistics.fmean(e["bytes"] / e["tokens"] for r in self.runs if (e := r.evaluations.get(method)))

    def texts(self) -> set[str]:
        """Tokenizers and validation texts, by digest: two where the data changed between the runs though no setting did."""
        found = [r.stages["text"] for r in self.runs if "text" in r.stages]
        return {" ".join([text["tokenizer"], *(shard["content"] for shard in text["val"])]) for text in found}

    def steps(self) -> set[int]:
        return {r.stages["train"]["steps"] for r in self.runs if "train" in r.stages}


@dataclass(frozen=True)
class Row:
    """A group's score by one method; nats per token, and bits per byte. Differences are against the first group, gains positive."""

    label: str
    seeds: tuple[int, ...]
    mean: float
    std: float | None
    """Between seeds; None with one."""
    bpb: float
    gain: float | None
    """Mean of the differences of runs with the same seed; None for the first group, or without such pairs."""
    p: float | None
    """Of a difference of this size in either direction if there were none (paired t-test); None where it cannot be tested."""
    needed: int | None
    """Seeds at which such a gain with such a spread would pass; None where it passes, or cannot be told."""
    verdict: str


def differing(records: Sequence[Record]) -> list[tuple[str, list[Any]]]:
    """(dotted field, its value in every run) of what is not the same in all runs."""
    names = {name: None for record in records[1:] for name, _, _ in differences(records[0].config, record.config)}
    return [(name, [_at(record.config, name) for record in records]) for name in names]


def groups(records: Sequence[Record]) -> list[Group]:
    """The runs by settings, in the order in which each first appears."""
    found: list[list[Record]] = []
    for record in records:
        same = next((g for g in found if not _settings(g[0], record)), None)
        if same is None:
            found.append([record])
        else:
            same.append(record)
    varied = {name for g in found for name, _, _ in _settings(found[0][0], g[0])}
    labels = [", ".join(f"{name}={_at(g[0].config, name)}" for name in sorted(varied)) or g[0].recipe.name for g in found]
    if len(varied) > MOST_FIELDS:
        labels = [f"as {g[0].name}" for g in found]
    return [Group(label, tuple(g)) for label, g in zip(labels, found, strict=True)]


def _settings(a: Record, b: Record) -> list[tuple[str, Any, Any]]:
    return [d for d in differences(a.config, b.config) if d[0] != "seed"]


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        if isinstance(config, list):
            config = config[int(name)] if int(name) < len(config) else None
        else:
            config = config.get(name) if isinstance(config, dict) else None
    return config


def common_method(records: Sequence[Record]) -> str:
    """The last method by which every finished run was scored; empty if there is none."""
    finished = [r for r in records if r.evaluations]
    shared = [m for m in (finished[0].evaluations if finished else ()) if all(m in r.evaluations for r in finished)]
    return shared[-1] if shared else ""


def compare(found: Sequence[Group], method: str) -> list[Row]:
    """A row per group with a score. p counts as beyond the noise below LEVEL over the number of comparisons (Bonferroni)."""
    scored = [g for g in found if g.scores(method)]
    level = LEVEL / max(len(scored) - 1, 1)
    return [_row(g, scored[0], method, level) for g in scored]


def _row(group: Group, base: Group, method: str, level: float) -> Row:
    mine, theirs = group.scores(method), base.scores(method)
    values = list(mine.values())
    spread = statistics.stdev(values) if len(values) > 1 else None
    bpb = statistics.fmean(r.evaluations[method]["val_bpb"] for r in group.runs if method in r.evaluations)
    same_text = abs(group.rate(method) / base.rate(method) - 1) < SAME_TEXT and len(group.texts() | base.texts()) < 2
    gains = [theirs[seed] - mine[seed] for seed in mine if seed in theirs] if group is not base and same_text else []
    gain = statistics.fmean(gains) if gains else None
    test = paired_test(mine, theirs, margin=0.0) if gains else None
    p = 2 * min(test.p, 1 - test.p) if test else None
    needed = None
    if group is base:
        verdict = "reference"
    elif not same_text:
        verdict = "not comparable in nats: other tokens or text"
    elif gain is None:
        verdict = "no seed in common with the reference"
    elif len(group.steps() | base.steps()) > 1:
        verdict = "not comparable: other numbers of steps"
    elif p is None:
        verdict = "not testable: at least two seeds in common are needed, with differences that are not all the same"
    elif p < level:
        verdict = f"{'better' if gain > 0 else 'worse'} beyond the noise"
    else:
        needed = seeds_needed(gain, statistics.stdev(gains), level)
        verdict = f"within the noise; {f'about {needed} seeds' if needed else f'more than {MOST_SEEDS} seeds'} would be needed"
    return Row(group.label, tuple(mine), statistics.fmean(values), spread, bpb, gain, p, needed, verdict)


def seeds_needed(gain: float, spread: float, level: float) -> int | None:
    """Smallest number of pairs at which a mean difference `gain` with standard deviation `spread` has p < level (paired, two-sided).

    That is where a difference of just this size would pass every other time. None beyond MOST_SEEDS.
    """
    for n in range(2, MOST_SEEDS + 1):
        if gain and (not spread or 2 * stdtr(n - 1, -abs(gain) / (spread / math.sqrt(n))) < level):
            return n
    return None


def conclusion(rows: Sequence[Row]) -> str:
    """One sentence: the settings that are better than the reference beyond the noise, or that there are none."""
    better = sorted((r for r in rows if r.verdict.startswith("better")), key=lambda r: r.mean)
    if len(rows) < 2:
        return "One setting: nothing to compare."
    if not better:
        return f"No setting is better than {rows[0].label} beyond the noise."
    return f"Better than {rows[0].label} beyond the noise: " + "; ".join(f"{r.label} by {r.gain:.5f} nats per token" for r in better) + "."


HEADINGS = ("settings", "seeds", "nats/token", "std", "bits/byte", "gain in nats", "p", "verdict")


def cells(row: Row) -> list[str]:
    """The row as text, under HEADINGS."""
    std, gain = f"{row.std:.5f}" if row.std is not None else "", f"{row.gain:+.5f}" if row.gain is not None else ""
    p = f"{row.p:.2g}" if row.p is not None else ""
    return [row.label, ", ".join(map(str, row.seeds)), f"{row.mean:.5f}", std, f"{row.bpb:.5f}", gain, p, row.verdict]


COLUMNS = ("run", "settings", "seed", "steps", "train_seconds", "method", "val_loss", "val_bpb", "legal", "total_bytes")


def runs_csv(groups: Sequence[Group]) -> str:
    """A row per run and method of evaluation."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for group in groups:
        for r in group.runs:
            if "train" not in r.stages or "pack" not in r.stages:  # so it has no evaluation either
                continue
            trained, packed = r.stages["train"], r.stages["pack"]
            for method, e in r.evaluations.items():
                first = (r.name, group.label, r.recipe.seed, trained["steps"], trained["seconds"])
                writer.writerow([*first, method, e["val_loss"], e["val_bpb"], e["legal"], packed["total_bytes"]])
    return file.getvalue()


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def table(rows: Sequence[Row]) -> str:
    """The rows as columns of text."""
    lines = [list(HEADINGS), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
