"""Evaluation: window lists, standard and sliding sums, scores of single windows, test-time training."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from golf_jax.config import GolfError, ScoreFirstConfig, TTTConfig
from golf_jax.evaluation import METHODS, Result, Stream
from golf_jax.evaluation.adapt_first import adam_rule
from golf_jax.evaluation.adapter import Adapter, cosine
from golf_jax.evaluation.fixed import evaluate_fixed, windows_of
from golf_jax.evaluation.score_first import momentum_rule
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.scorer import WindowScorer, shapes_of
from golf_jax.evaluation.windows import Windows, chunk_windows, sliding_windows
from golf_jax.interop.checks.base import quick_compilation
from golf_jax.interop.checks.documents import check_documents, stream_of, sums
from golf_jax.interop.checks.reference import Case, NotComputed
from golf_jax.mesh import make_mesh, replicate
from golf_jax.model import Model, to_tensors

ROWS, TTT_ROWS = 8, 32  # windows per device and forward pass: small, so that few batch shapes occur


@quick_compilation()
def check_eval(case: Case) -> None:
    s, recipe = case.settings, case.recipe
    mode = s.get("mode")
    if mode is None:
        return  # only data for other cases
    seq_len, sliding = recipe.data.seq_len, recipe.eval.sliding
    if mode == "windows":
        return case.compare({"windows": _table(sliding_windows(sliding.windows, s["targets"], seq_len, sliding.stride))})
    if mode == "standard" and recipe.eval.packed.on:
        return case.compare(sums(packed_result(case)))
    if mode not in ("standard", "sliding"):
        raise GolfError(f"{case.refs.path}: {case.where}: mode {mode!r} is not one of standard, sliding, windows")
    tokens, tables = stream_of(case)
    exact = mode == "sliding" and "tokens" in s
    stream = Stream(tokens, tables, seq_len, ROWS) if exact else Stream.of(tokens, tables, seq_len, ROWS)
    config = sliding if mode == "sliding" else None
    result = evaluate_fixed(_model(case), replace(stream, keep_scores=True), make_mesh(case.refs.devices), config)
    windows, stride = windows_of(stream, config)
    ours = sums(result) | {"windows": _table(windows), "nll": result.scores}
    if any(item.partition("@")[0] in ("scored_nll", "window_nll", "window_bytes") for item in case.own):
        ours |= _by_window(case, stream, windows, stride)
    case.compare(ours)


def _model(case: Case) -> Model:
    return replace(Model.open(case.model, case.params, jax.default_backend()), looping=case.looping)


def packed_result(case: Case) -> Result:
    """Of a standard evaluation on packed streams."""

    def make() -> Result:
        config = case.recipe.eval.packed
        stream = Stream.of(*stream_of(case), config.seq_len)
        return METHODS["packed"](_model(case), stream, make_mesh(case.refs.devices), config)

    return case.refs.once(("packed evaluation", case.where), make)


def _table(w: Windows) -> np.ndarray:
    return np.stack([w.start, w.length, w.score_from], 1)


class _Scores(ScoreBook):
    """Keeps what every window scored, also where windows score a target again."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream)
        self.of: dict[int, np.ndarray] = {}

    def collect(self, chunk: int, windows: Windows, offsets: np.ndarray, nll: np.ndarray) -> None:
        super().collect(chunk, windows, offsets, nll)
        for start, length, first, row in zip(windows.start, windows.length, windows.score_from, nll, strict=True):
            self.of[int(start)] = row[(offsets >= first) & (offsets < length)]


def _by_window(case: Case, stream: Stream, windows: Windows, stride: int) -> dict[str, Any]:
    mesh = make_mesh(case.refs.devices)
    params, book = replicate(mesh, case.params), _Scores(stream)
    WindowScorer(_model(case), shapes_of(params), mesh, book, windows, stride).run(params, windows)
    scored = [book.of[int(start)] for start in windows.start]
    counts = stream.tables.of_targets(stream.tokens, slice(None))
    spans = zip(windows.start, windows.length, windows.score_from, strict=True)
    return {
        "scored_nll": np.concatenate(scored),
        "window_nll": [x.sum(dtype=np.float64) for x in scored],
        "window_bytes": [counts[start + first : start + length].sum() for start, length, first in spans],
    }


@quick_compilation()
def check_ttt(case: Case) -> None:
    recipe = case.recipe
    if recipe.eval.documents.on:
        return check_documents(case)
    methods: dict[str, TTTConfig] = {"score_first": recipe.eval.score_first, "adapt_first": recipe.eval.adapt_first}
    name = next((name for name, method in methods.items() if method.on), None)
    if name is None:
        raise NotComputed("the recipe has no test-time training")
    ttt, seq_len, model = methods[name], recipe.data.seq_len, _model(case)
    stream = replace(Stream.of(*stream_of(case), seq_len, TTT_ROWS), keep_scores=True)
    result = METHODS[name](model, stream, make_mesh(case.refs.devices), ttt)
    trace = result.trace
    assert trace is not None
    start, after = to_tensors(case.model, case.params), to_tensors(case.model, trace.params)
    ours = sums(result) | {"nll": result.scores, "loss": trace.loss, "grad_norm": trace.grad_norm}
    ours |= {
        "loss_per_rank": trace.loss_per_rank,
        "chunk_nats": trace.chunks[:, 0],
        "chunk_counts": trace.chunks[:, 1:3],
        "lr": _rates(case, trace.lr),
    }
    if isinstance(ttt, ScoreFirstConfig):
        w, chunk = chunk_windows(ttt.windows, stream.targets, seq_len, ttt.stride, ttt.chunk_tokens)
        ours |= {"windows": _table(w), "window_chunk": chunk}
        if result.facts.duplicates == 0 and result.scores is not None:
            ours["window_nll"] = np.add.reduceat(result.scores.astype(np.float64), w.start + w.score_from)
    for tensor, x in after.items():
        ours |= {f"final/{tensor}": x, f"final_change/{tensor}": x - start[tensor]}
    for k in sorted({int(item.split("/")[1]) for item in case.own if item.startswith("after/")}):
        ours |= {f"after/{k}/{n}": x for n, x in _after(case, model, stream, ttt, k).items()}
    case.compare(ours, start=start)


def _rates(case: Case, lr: np.ndarray) -> np.ndarray:
    """[updates], or [updates, groups] where the set has them: output projections, first matrix of the MLP, the rest."""
    ttt, want = case.recipe.eval.adapt_first, case.own.get("lr")
    return np.outer(lr, [ttt.proj_lr_scale, ttt.fc_lr_scale, 1.0]) if want is not None and want.ndim == 2 else lr


def _after(case: Case, model: Model, stream: Stream, ttt: TTTConfig, k: int) -> dict[str, np.ndarray]:
    """Weights after the first k updates: the first call of the adapter with a learning rate of zero from then on."""
    mesh, targets = make_mesh(case.refs.devices), stream.targets
    if isinstance(ttt, ScoreFirstConfig):
        span, epochs, last = min(ttt.chunk_tokens, targets), ttt.epochs, -(-targets // ttt.chunk_tokens) - 1
        adapter = Adapter(model, stream, mesh, ttt, momentum_rule(ttt), span // stream.seq_len, epochs)
        lr = np.full(adapter.steps, ttt.lr * cosine(0, last))
    else:
        rule = adam_rule(case.recipe.eval.adapt_first, model.config)
        adapter = Adapter(model, stream, mesh, ttt, rule, targets // stream.seq_len, epochs=1)
        lr = ttt.lr * cosine(np.arange(adapter.steps), ttt.epochs * adapter.steps)
    if k > adapter.steps:
        raise NotComputed(f"weights after {k} updates: only those of the first {adapter.steps} can be looked at")
    lr[k:] = 0.0
    adapter.train(adapter.prepare(0), lr.reshape(adapter.epochs, -1))
    return to_tensors(case.model, adapter.params)
