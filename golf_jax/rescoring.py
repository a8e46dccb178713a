"""A log's scores, value by value, against those of its artifact scored here."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from golf_jax.config import GolfError
from golf_jax.data.text import Text
from golf_jax.evaluation import METHODS, Result, score
from golf_jax.evaluation.methods import method_of
from golf_jax.mesh import make_mesh
from golf_jax.opening import Model
from golf_jax.progress import Log
from golf_jax.proof.logs import Number, Run, Score, parse_log, read_text

ARITHMETIC = 3e-4  # relative difference of nats that another order of sums and bfloat16 instead of float32 make
PACKED = (".ptz", ".golf")  # what the bytes of a log are about
NAMES = ("score_first", "adapt_first", "ttt", "sliding", "standard")  # in this order: `ttt_sliding` is test-time training
_ADAPTS = re.compile(r"^\s*\w*ttt\w*\s*[:_ ]\s*(?:start|epoch|chunk|adapt|done)", re.I)
_SLIDES = re.compile(r"^\s*(?:sliding_eval\b|final_eval_mode\s*:\s*sliding)", re.I)


@dataclass(frozen=True)
class Row:
    """One value of the log, and the same here. bar: the largest difference that is no miss; line: `file:line`."""

    name: str
    line: str
    log: float
    here: float
    bar: float

    @property
    def ok(self) -> bool:
        return abs(self.log - self.here) <= self.bar

    def text(self) -> str:
        figures = f"{self.log:>16.10g} {self.here:>16.10g} {abs(self.log - self.here):9.1e} {self.bar:9.1e}"
        return f"{self.name:58} {figures}  {'ok' if self.ok else 'MISS'}  [{self.line}]"


@dataclass
class Rescored:
    """What came out: rows that were compared, and what was not, by name with the reason."""

    rows: list[Row]
    not_checked: dict[str, str]


def read_run(path: Path) -> Run:
    """The one run of a log. Raises GolfError for none, for several, and for one without a score of the packed model."""
    if not path.is_file():
        raise GolfError(f"--log {path}: no such file")
    runs = parse_log(read_text(path), path.name)
    if len(runs) != 1:
        raise GolfError(f"--log {path}: holds {len(runs)} runs; give a log of the one run whose artifact is to be scored")
    if not runs[0].finals:
        raise GolfError(f"--log {path}: no score of the packed model in it: the log is cut, or the run did not end")
    return runs[0]


def ways(run: Run) -> list[tuple[Score, str]]:
    """How every score of the packed model was taken: standard, sliding, ttt (or a method's name), or "" for a line that repeats another.

    Told by the line's own name, else by what the program printed since the score before: progress of a sliding window, of training on
    the text. The records print their headline once more under an older name (docs/recipes/pr1182.md): the same figures are a repetition.
    """
    found: list[tuple[Score, str]] = []
    for s in run.finals:
        before = max((other.line for other in run.scores if other.line < s.line and other.name != s.name.removesuffix("_exact")), default=0)
        printed = [text for number, text in run.text if before < number < s.line]
        named = next((name for name in NAMES if name in s.name.lower()), "")
        same = [o for o, _ in found if (o.loss.value, o.bpb.value) == (s.loss.value, s.bpb.value)]
        if named:
            found.append((s, named))
        elif same:
            found.append((s, ""))
        elif any(_ADAPTS.match(text) for text in printed):
            found.append((s, "ttt"))
        else:
            found.append((s, "sliding" if any(_SLIDES.match(text) for text in printed) else "standard"))
    return found


def rescore(run: Run, model: Model, text: Text, log: Log = print, *, max_targets: int = 0, devices: int = 0) -> Rescored:
    """Score the artifact in every way that the log has scores for, and compare value by value; each row is printed when it is there.

    max_targets: only about so many, and nothing is compared. Raises GolfError where the log is of another text: before scoring.
    """
    done = Rescored([], {})
    if not max_targets:
        _same_text(run, len(text.val_tokens), model.seq_len)
        done.rows += _bytes(run, Path(model.name), done)
    for row in done.rows:
        log(row.text())
    results: dict[str, Result] = {}
    for s, way in ways(run):
        if not way:
            done.not_checked[f"{s.name} [{run.at(s.line)}]"] = "the same figures as a line before"
            continue
        try:
            method = method_of(model.eval, way)
        except GolfError:
            method = way
        config = getattr(model.eval, method, None)
        if method not in METHODS or (config is not None and not config.on):
            done.not_checked[f"{s.name} [{run.at(s.line)}]"] = f"the recipe has no {way} evaluation"
            continue
        if method not in results:
            asked = {"seq_len": model.seq_len, "methods": [method], "max_targets": max_targets}
            results[method] = next(score(model, text, make_mesh(devices), model.eval, log, **asked))
            log(results[method].line())
        if results[method].partial:
            done.not_checked[f"{s.name} [{run.at(s.line)}]"] = f"{100 * results[method].share:.3g} % of the text: compared with nothing"
            continue
        for row in _values(run, s, method, results[method]):
            done.rows.append(row)
            log(row.text())
    return done


def _values(run: Run, s: Score, method: str, ours: Result) -> Iterator[Row]:
    """Nats per token, bits per byte, and what both say of bytes per token, where only rounding may differ."""
    where, name = run.at(s.line), f"{s.name} ({method})"
    for what, logged, here in (("val_loss", s.loss, ours.score.loss), ("val_bpb", s.bpb, ours.score.bpb)):
        yield Row(f"{name}: {what}", where, logged.value, here, ARITHMETIC * here + logged.half)
    if s.bpb.value and s.loss.value:
        rate = s.loss.value / s.bpb.value / math.log(2)
        rounding = s.loss.half / s.loss.value + s.bpb.half / s.bpb.value
        yield Row(f"{name}: bytes per token", where, rate, ours.score.bytes / ours.score.tokens, rate * (rounding + 1e-9))


def _same_text(run: Run, tokens: int, row: int) -> None:
    """Whole rows only, with or without the first token: counts of one text differ by less than a row."""
    for n in run.tokens:
        if abs(n.value - tokens) > row:
            where = f"{run.at(n)}: scores of {n.value:,.0f} tokens, --val holds {tokens:,}"
            raise GolfError(f"{where}; give the text of the log, or --max-docs N for scores that are compared with nothing")


def _bytes(run: Run, path: Path, done: Rescored) -> list[Row]:
    models: list[Number] = run.models[-1:]
    file = path / "artifact.golf" if path.is_dir() else path
    if file.suffix not in PACKED:
        done.not_checked["bytes of the model"] = f"{file.name} is not the packed file"
        return []
    return [Row("bytes of the model", run.at(n), n.value, float(file.stat().st_size), 0.0) for n in models]
