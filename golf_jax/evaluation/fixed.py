"""Standard and sliding-window evaluation: the weights stay as they are."""

import time
from typing import Any

import numpy as np
from jax.sharding import Mesh

from golf_jax.config import EvalConfig, GolfError, ModelConfig
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation.ledger import Ledger
from golf_jax.evaluation.score import Result
from golf_jax.evaluation.scorer import Log, WindowScorer, shapes_of
from golf_jax.evaluation.windows import Windows, sliding_windows, standard_windows, truncate
from golf_jax.mesh import replicate


def evaluate_standard(
    config: ModelConfig,
    params: dict[str, Any],
    tokens: np.ndarray,
    tables: ByteTables,
    *,
    seq_len: int,
    mesh: Mesh,
    eval: EvalConfig = EvalConfig(),  # noqa: B008 - frozen
    looping: bool = True,
    max_targets: int = 0,
    keep_scores: bool = False,
    log: Log | None = None,
) -> Result:
    """Score rows of `seq_len` targets, side by side, each target with the context of its row.

    tokens: the validation stream, uint16 [n]; what does not fill a row is left out. params: any float dtype, host or device.
    looping: depth recurrence as in that phase of training. max_targets: a quick look at the first targets, marked partial.
    """
    used = truncate(tokens, seq_len, max_targets)
    windows = standard_windows(len(used) - 1, seq_len)
    return _evaluate("standard", config, params, tokens, used, tables, windows, seq_len, seq_len, mesh, eval, looping, keep_scores, log)


def evaluate_sliding(
    config: ModelConfig,
    params: dict[str, Any],
    tokens: np.ndarray,
    tables: ByteTables,
    *,
    seq_len: int,
    mesh: Mesh,
    eval: EvalConfig = EvalConfig(),  # noqa: B008 - frozen
    looping: bool = True,
    max_targets: int = 0,
    truncated: bool = True,
    keep_scores: bool = False,
    log: Log | None = None,
) -> Result:
    """Score with a window of `seq_len` that moves by `eval.stride`: every target but the first has almost a full window of context.

    Arguments as in `evaluate_standard`. truncated: cut the stream to whole rows first, as all recipes do; False scores it as it is.
    """
    if not eval.stride:
        raise GolfError("eval.stride is 0: this recipe has no sliding evaluation; give --stride")
    used = truncate(tokens, seq_len, max_targets) if truncated else tokens
    windows = sliding_windows(eval.windows, len(used) - 1, seq_len, eval.stride)
    return _evaluate("sliding", config, params, tokens, used, tables, windows, seq_len, eval.stride, mesh, eval, looping, keep_scores, log)


def _evaluate(
    mode: str,
    config: ModelConfig,
    params: dict[str, Any],
    tokens: np.ndarray,
    used: np.ndarray,
    tables: ByteTables,
    windows: Windows,
    seq_len: int,
    stride: int,
    mesh: Mesh,
    eval: EvalConfig,
    looping: bool,
    keep_scores: bool,
    log: Log | None,
) -> Result:
    if not len(windows):
        raise GolfError(f"eval.windows {eval.windows!r} has no window for {len(used)} tokens and seq_len {seq_len}")
    begin = time.perf_counter()
    on_mesh = replicate(mesh, params)
    ledger = Ledger(used, tables, keep_scores=keep_scores)
    scorer = WindowScorer(
        config,
        shapes_of(on_mesh),
        mesh,
        ledger,
        windows,
        seq_len=seq_len,
        stride=stride,
        rows=eval.batch_rows,
        looping=looping,
        log=log and (lambda line: log(f"{mode}: {line}")),
    )
    compiled = time.perf_counter()
    scorer.run(on_mesh, windows)
    score, _ = ledger.totals()
    seconds = {"compile": compiled - begin, "score": time.perf_counter() - compiled, "train": 0.0}
    return Result(mode, score, ledger.facts(), seconds, share_of(tokens, used, seq_len), scores=ledger.scores)


def share_of(tokens: np.ndarray, used: np.ndarray, seq_len: int) -> float:
    """Share of a stream's whole rows that is scored."""
    return min(1.0, (len(used) - 1) / max((len(tokens) - 1) // seq_len * seq_len, 1))
