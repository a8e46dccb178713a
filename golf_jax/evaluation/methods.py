"""The methods of evaluation by name. A new one is a file with its function, a row here, and its settings in `EvalConfig`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from jax.sharding import Mesh

from golf_jax.config import EvalConfig, GolfError
from golf_jax.data.text import Text
from golf_jax.evaluation.adapt_first import evaluate_adapt_first
from golf_jax.evaluation.documents import evaluate_documents
from golf_jax.evaluation.fixed import evaluate_fixed, fixed_ahead
from golf_jax.evaluation.legality import check_ahead, check_model
from golf_jax.evaluation.packed import evaluate_packed
from golf_jax.evaluation.score import Result
from golf_jax.evaluation.score_first import evaluate_score_first, score_first_ahead
from golf_jax.evaluation.stream import Stream
from golf_jax.model import Model
from golf_jax.progress import Log, patience
from golf_jax.starting import work_begins

METHODS: dict[str, Callable[..., Result]] = {
    "standard": evaluate_fixed,
    "sliding": evaluate_fixed,
    "score_first": evaluate_score_first,
    "adapt_first": evaluate_adapt_first,
    "packed": evaluate_packed,
    "documents": evaluate_documents,
}
"""name -> function of (model, stream, mesh, `eval.<name>`, log)."""


AHEAD: dict[str, Callable[..., None]] = {"standard": fixed_ahead, "sliding": fixed_ahead, "score_first": score_first_ahead}
"""What can begin to compile before there are weights, by the same name: function of (model, stream, mesh, `eval.<name>`)."""


def methods_of(eval: EvalConfig) -> list[str]:
    """Names of the methods that a recipe asks for; `standard`, which has no settings, always."""
    return [name for name in METHODS if (config := getattr(eval, name, None)) is None or config.on]


def score(
    model: Model,
    text: Text,
    mesh: Mesh,
    eval: EvalConfig,
    log: Log | None = None,
    *,
    seq_len: int,
    methods: Sequence[str] = (),
    max_targets: int = 0,
) -> Iterator[Result]:
    """Score `text` by each of `methods` (none given: all that `eval` asks for); yields every result as soon as it is there, C1-C4 in it.

    seq_len: targets per row and tokens of context. max_targets: a quick look at about this many, marked PARTIAL (0: all). Raises
    GolfError for settings that do not fit `seq_len`, a method that `eval` leaves out, text too short for a row, and scores that are
    not finite.
    """
    eval.check_length(seq_len)
    with patience(log, "C1 and C2: compiling"):
        causal, error = check_model(model, Stream.of(text.val_tokens, text.tables, seq_len).tokens, mesh, seq_len)
    work_begins()
    for name in methods or methods_of(eval):
        config = getattr(eval, name, None)
        stream = Stream.of(text.val_tokens, text.tables, getattr(config, "seq_len", seq_len), eval.batch_rows, max_targets)
        result = METHODS[name](model, stream, mesh, config, log)
        facts = result.facts  # what the method measured of itself counts with what its model is
        yield replace(
            result,
            facts=replace(
                facts,
                causal=causal and facts.causal is not False,
                normalization_error=float(np.maximum(error, facts.normalization_error or 0.0)),
            ),
        )


def score_ahead(model: Model, text: Text, mesh: Mesh, eval: EvalConfig, *, seq_len: int) -> None:
    """Begin to compile what `score` runs (`golf_jax.ahead`). Of the parameters only shapes and dtypes count."""
    for name in methods_of(eval):
        if name in AHEAD:
            config = getattr(eval, name, None)
            AHEAD[name](model, Stream.of(text.val_tokens, text.tables, getattr(config, "seq_len", seq_len), eval.batch_rows), mesh, config)
    check_ahead(model, mesh, seq_len)


def method_of(eval: EvalConfig, mode: str) -> str:
    """The method of evaluation that a mode stands for."""
    if mode == "auto":
        return "sliding" if eval.sliding.on else "standard"
    if mode != "ttt":
        return mode
    trained = [name for name in ("score_first", "adapt_first", "documents") if getattr(eval, name).on]
    if not trained:
        raise GolfError("--mode ttt: the recipe of this model has no test-time training; use --mode sliding")
    return trained[0]
