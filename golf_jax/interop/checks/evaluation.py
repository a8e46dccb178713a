"""Evaluation: window lists, standard and sliding sums, scores of single windows, test-time training."""

from dataclasses import replace
from typing import Any

import numpy as np

from golf_jax.config import GolfError, ScoreFirstConfig, TTTConfig
from golf_jax.evaluation import METHODS, Result, Stream
from golf_jax.evaluation.adapt_first import adam_rule
from golf_jax.evaluation.adapter import Adapter, cosine
from golf_jax.evaluation.fixed import windows_of
from golf_jax.evaluation.score import Score
from golf_jax.evaluation.score_first import momentum_rule
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.scorer import WindowScorer, shapes_of
from golf_jax.evaluation.windows import Windows, chunk_windows, sliding_windows
from golf_jax.interop.checks import documents
from golf_jax.interop.reference import Case, NotComputed
from golf_jax.mesh import replicate
from golf_jax.model import to_tensors

ROWS, TTT_ROWS = 8, 32  # windows per device and forward pass: small, so that few batch shapes occur


def check_eval(case: Case) -> None:
    s, recipe = case.settings, case.recipe
    mode = s.get("mode")
    if mode is None:
        return  # only data for other cases
    seq_len, sliding = recipe.data.seq_len, recipe.eval.sliding
    if mode == "windows":
        return case.compare({"windows": _table(sliding_windows(sliding.windows, s["targets"], seq_len, sliding.stride))})
    if mode == "standard" and recipe.eval.packed.on:
        return case.compare(_sums(packed_result(case).score))
    if mode not in ("standard", "sliding"):
        raise GolfError(f"{case.refs.path}: {case.where}: mode {mode!r} is not one of standard, sliding, windows")
    exact = mode == "sliding" and "tokens" in s
    stream = replace((Stream if exact else Stream.of)(*case.text, seq_len, ROWS), keep_scores=True)
    windows, stride = windows_of(stream, sliding if mode == "sliding" else None)
    params, book = replicate(case.mesh, case.opened.params), _Scores(stream)
    WindowScorer(case.opened, shapes_of(params), case.mesh, book, windows, stride).run(params, windows)
    scored, counts = [book.of[int(start)] for start in windows.start], stream.tables.of_targets(stream.tokens, slice(None))
    spans = zip(windows.start, windows.length, windows.score_from, strict=True)
    ours: dict[str, Any] = _sums(book.totals()[0]) | {"nll": book.scores, "windows": _table(windows)}
    ours |= {"scored_nll": np.concatenate(scored), "window_nll": [x.sum(dtype=np.float64) for x in scored]}
    case.compare(ours | {"window_bytes": [counts[start + first : start + length].sum() for start, length, first in spans]})


def _sums(score: Score) -> dict[str, Any]:
    return {"nats": score.nll_nats, "count": score.tokens, "bytes": score.bytes, "bpb": score.bpb}


def packed_result(case: Case) -> Result:
    """Of a standard evaluation on packed streams."""
    config = case.recipe.eval.packed
    evaluate = lambda: METHODS["packed"](case.opened, Stream.of(*case.text, config.seq_len), case.mesh, config)  # noqa: E731
    return case.refs.once(("packed evaluation", case.where), evaluate)


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


def check_ttt(case: Case) -> None:
    eval = case.recipe.eval
    methods: dict[str, Any] = {"documents": eval.documents, "score_first": eval.score_first, "adapt_first": eval.adapt_first}
    name = next((name for name, method in methods.items() if method.on), None)
    if name is None:
        raise NotComputed("the recipe has no test-time training")
    if name == "documents":
        result, ours = documents.result(case), documents.spans(case)
    else:
        stream = replace(Stream.of(*case.text, case.recipe.data.seq_len, TTT_ROWS), keep_scores=True)
        result = METHODS[name](case.opened, stream, case.mesh, methods[name])
        ours = _on_the_way(case, stream, methods[name], result)
    assert (trace := result.trace) is not None
    ours |= _sums(result.score) | {"nll": result.scores, "loss": trace.loss, "loss_per_rank": trace.loss_per_rank}
    ours |= {"grad_norm": trace.grad_norm, "lr": _rates(case, trace.lr)}
    start, after = to_tensors(case.model, case.params), to_tensors(case.model, trace.params)
    for tensor, x in after.items():
        change = x.astype(np.float64) - start[tensor]
        ours |= {f"final/{tensor}": x, f"final_change/{tensor}": change, f"change_norm/{tensor}": np.linalg.norm(change)}
    case.compare(ours, start=start)


def _on_the_way(case: Case, stream: Stream, ttt: TTTConfig, result: Result) -> dict[str, Any]:
    """Sums by chunk, windows, and weights after the updates that the set looks at."""
    assert (trace := result.trace) is not None and result.scores is not None
    ours: dict[str, Any] = {"chunk_nats": trace.chunks[:, 0], "chunk_counts": trace.chunks[:, 1:3]}
    if isinstance(ttt, ScoreFirstConfig):
        w, chunk = chunk_windows(ttt.windows, stream.targets, stream.seq_len, ttt.stride, ttt.chunk_tokens)
        ours |= {"windows": _table(w), "window_chunk": chunk}
        if result.facts.duplicates == 0:
            ours["window_nll"] = np.add.reduceat(result.scores.astype(np.float64), w.start + w.score_from)
    for k in sorted({int(item.split("/")[1]) for item in case.own if item.startswith("after/")}):
        ours |= {f"after/{k}/{n}": x for n, x in _after(case, stream, ttt, k).items()}
    return ours


def _rates(case: Case, lr: np.ndarray) -> np.ndarray:
    """[updates], or [updates, groups] where the set has them: output projections, first matrix of the MLP, the rest."""
    ttt, want = case.recipe.eval.adapt_first, case.own.get("lr")
    return np.outer(lr, [ttt.proj_lr_scale, ttt.fc_lr_scale, 1.0]) if want is not None and want.ndim == 2 else lr


def _after(case: Case, stream: Stream, ttt: TTTConfig, k: int) -> dict[str, np.ndarray]:
    """Weights after the first k updates: the first call of the adapter with a learning rate of zero from then on."""
    model, targets = case.opened, stream.targets
    if isinstance(ttt, ScoreFirstConfig):
        rule, epochs, span, last = momentum_rule(ttt), ttt.epochs, min(ttt.chunk_tokens, targets), -(-targets // ttt.chunk_tokens) - 1
        rates = lambda steps: np.full(steps, ttt.lr * cosine(0, last))  # noqa: E731
    else:
        rule, epochs, span = adam_rule(case.recipe.eval.adapt_first, model.config), 1, targets
        rates = lambda steps: ttt.lr * cosine(np.arange(steps), ttt.epochs * steps)  # noqa: E731
    adapter = Adapter(model, stream, case.mesh, ttt, rule, span // stream.seq_len, epochs)
    if k > adapter.steps:
        raise NotComputed(f"weights after {k} updates: only those of the first {adapter.steps} can be looked at")
    lr = np.where(np.arange(adapter.steps) < k, rates(adapter.steps), 0.0)
    adapter.train(adapter.prepare(0), lr.reshape(epochs, -1))
    return to_tensors(case.model, adapter.params)
