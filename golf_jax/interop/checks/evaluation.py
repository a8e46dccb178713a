"""Evaluation: window lists, standard and sliding sums, scores of single windows, test-time training."""

from dataclasses import replace
from typing import Any

import numpy as np

from golf_jax.config import EvalConfig, GolfError
from golf_jax.data.tokenizer import ByteTables, count_bytes
from golf_jax.evaluation import Result, evaluate_sliding, evaluate_standard, evaluate_ttt
from golf_jax.evaluation.ledger import Ledger
from golf_jax.evaluation.scorer import WindowScorer, shapes_of
from golf_jax.evaluation.ttt import Trainer, cosine
from golf_jax.evaluation.windows import Windows, chunk_windows, sliding_windows, standard_windows, truncate
from golf_jax.interop.checks.base import quick_compilation
from golf_jax.interop.checks.reference import Case, NotComputed
from golf_jax.mesh import make_mesh, replicate
from golf_jax.model import to_tensors

ROWS = 8  # windows per device and forward pass: small, so that few batch shapes occur


@quick_compilation()
def check_eval(case: Case) -> None:
    s, recipe = case.settings, case.recipe
    mode = s.get("mode")
    if mode is None:
        return  # only data for other cases
    seq_len, eval = recipe.data.seq_len, replace(recipe.eval, batch_rows=ROWS)
    if mode == "windows":
        return case.compare({"windows": _table(sliding_windows(eval.windows, s["targets"], seq_len, eval.stride))})
    if mode not in ("standard", "sliding"):
        raise GolfError(f"{case.refs.path}: {case.where}: mode {mode!r} is not one of standard, sliding, windows")
    tokens, tables = _stream(case)
    common: dict[str, Any] = dict(seq_len=seq_len, mesh=make_mesh(case.refs.devices), looping=case.looping, keep_scores=True, eval=eval)
    if mode == "standard":
        used = truncate(tokens, seq_len)
        windows = standard_windows(len(used) - 1, seq_len)
        result = evaluate_standard(case.model, case.params, tokens, tables, **common)
    else:
        used = tokens if "tokens" in s else truncate(tokens, seq_len)
        windows = sliding_windows(eval.windows, len(used) - 1, seq_len, eval.stride)
        result = evaluate_sliding(case.model, case.params, tokens, tables, truncated="tokens" not in s, **common)
    ours = _sums(result) | {"windows": _table(windows), "nll": result.scores}
    if any(item.partition("@")[0] in ("scored_nll", "window_nll", "window_bytes") for item in case.own):
        ours |= _by_window(case, used, tables, windows, eval, seq_len if mode == "standard" else eval.stride)
    case.compare(ours)


def _stream(case: Case) -> tuple[np.ndarray, ByteTables]:
    """The first tokens of the stream, as many as the case says, and the byte tables."""
    if "target_bytes" in case.seen or "base_bytes" not in case.seen:
        raise NotComputed("bytes per target (target_bytes) instead of byte tables are not implemented")
    tables = (case.seen[k] for k in ("base_bytes", "leading_space", "boundary"))
    base, space, boundary = tables
    tokens = case.seen["tokens"][: case.settings.get("tokens")].astype(np.uint16)
    return tokens, ByteTables(base.astype(np.int16), space.astype(bool), boundary.astype(bool))


def _table(w: Windows) -> np.ndarray:
    return np.stack([w.start, w.length, w.score_from], 1)


def _sums(result: Result) -> dict[str, Any]:
    s = result.score
    return {"nats": s.nll_nats, "count": s.tokens, "bytes": s.bytes, "bpb": s.bpb}


class _Scores(Ledger):
    """Keeps what every window scored, also where windows score a target again."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.of: dict[int, np.ndarray] = {}

    def collect(self, chunk: int, windows: Windows, offsets: np.ndarray, nll_BN: np.ndarray) -> None:
        super().collect(chunk, windows, offsets, nll_BN)
        for start, length, first, row in zip(windows.start, windows.length, windows.score_from, nll_BN, strict=True):
            self.of[int(start)] = row[(offsets >= first) & (offsets < length)]


def _by_window(case: Case, used: np.ndarray, tables: ByteTables, windows: Windows, eval: EvalConfig, stride: int) -> dict[str, Any]:
    mesh = make_mesh(case.refs.devices)
    params, ledger = replicate(mesh, case.params), _Scores(used, tables)
    shape: dict[str, Any] = dict(seq_len=case.recipe.data.seq_len, stride=stride, rows=eval.batch_rows, looping=case.looping)
    WindowScorer(case.model, shapes_of(params), mesh, ledger, windows, **shape).run(params, windows)
    scored = [ledger.of[int(start)] for start in windows.start]
    counts = count_bytes(tables, used[:-1], used[1:])
    spans = zip(windows.start, windows.length, windows.score_from, strict=True)
    return {
        "scored_nll": np.concatenate(scored),
        "window_nll": [x.sum(dtype=np.float64) for x in scored],
        "window_bytes": [counts[start + first : start + length].sum() for start, length, first in spans],
    }


@quick_compilation()
def check_ttt(case: Case) -> None:
    recipe = case.recipe
    if recipe.eval.ttt.kind == "off":
        raise NotComputed("the recipe has no test-time training")
    eval, seq_len, config = replace(recipe.eval, batch_rows=32), recipe.data.seq_len, case.model
    tokens, tables = _stream(case)
    mesh, before = make_mesh(case.refs.devices), case.params
    result, params = evaluate_ttt(config, before, tokens, tables, seq_len=seq_len, mesh=mesh, eval=eval, keep_scores=True)
    trace, start, after = result.trace, to_tensors(config, before), to_tensors(config, params)
    assert trace is not None
    ours: dict[str, Any] = _sums(result) | {"nll": result.scores, "loss": trace.loss, "grad_norm": trace.grad_norm}
    ours |= {"chunk_nats": trace.chunks[:, 0], "chunk_counts": trace.chunks[:, 1:3], "lr": _rates(case, trace.lr)}
    if eval.ttt.kind == "score_first":
        w, chunk = chunk_windows(eval.windows, result.facts.targets, seq_len, eval.stride, eval.ttt.chunk_tokens)
        ours |= {"windows": _table(w), "window_chunk": chunk}
        if result.facts.duplicates == 0 and result.scores is not None:
            ours["window_nll"] = np.add.reduceat(result.scores.astype(np.float64), w.start + w.score_from)
    for name, x in after.items():
        ours |= {f"final/{name}": x, f"final_change/{name}": x - start[name]}
    used = truncate(tokens, seq_len)
    for k in sorted({int(item.split("/")[1]) for item in case.own if item.startswith("after/")}):
        ours |= {f"after/{k}/{n}": x for n, x in _after(case, used, eval, k).items()}
    case.compare(ours, start=start)


def _rates(case: Case, lr: np.ndarray) -> np.ndarray:
    """[updates], or [updates, groups] where the set has them: output projections, first matrix of the MLP, the rest."""
    ttt, want = case.recipe.eval.ttt, case.own.get("lr")
    return np.outer(lr, [ttt.proj_lr_scale, ttt.fc_lr_scale, 1.0]) if want is not None and want.ndim == 2 else lr


def _after(case: Case, used: np.ndarray, eval: EvalConfig, k: int) -> dict[str, np.ndarray]:
    """Weights after the first k updates: the first call of the trainer with a learning rate of zero from then on."""
    ttt, seq_len, mesh = eval.ttt, case.recipe.data.seq_len, make_mesh(case.refs.devices)
    chunked, targets = ttt.kind == "score_first", len(used) - 1
    span = min(ttt.chunk_tokens, targets) if chunked else targets
    trainer = Trainer(case.model, case.params, ttt, mesh, span // seq_len, seq_len, ttt.epochs if chunked else 1, eval.batch_rows)
    steps, last = trainer.steps, -(-targets // ttt.chunk_tokens) - 1
    if k > steps:
        raise NotComputed(f"weights after {k} updates: only those of the first {steps} can be looked at")
    lr = np.full(steps, ttt.lr * cosine(0, last)) if chunked else ttt.lr * cosine(np.arange(steps), ttt.epochs * steps)
    lr[k:] = 0.0
    trainer.train(trainer.prepare(used, 0), lr.reshape(trainer.epochs, -1))
    return to_tensors(case.model, trainer.state.params)
