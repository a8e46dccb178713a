"""Score-first test-time training (PRs 1182, 2005): chunk by chunk, score the targets of a chunk, then train on them.

Legal: every score is fixed before an update sees its target; the score book checks it target by target.
"""

import functools

import numpy as np
import optax
from jax.sharding import Mesh

from golf_jax.ahead import ahead
from golf_jax.config import GolfError, ScoreFirstConfig
from golf_jax.evaluation.adapter import Adapter, Plan, Rule, cosine, program_of, training_program
from golf_jax.evaluation.score import Result, Stopwatch
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.scorer import WindowScorer, score_ahead, shapes_of
from golf_jax.evaluation.stream import Stream
from golf_jax.evaluation.windows import chunk_windows
from golf_jax.mesh import AXIS
from golf_jax.model import Model
from golf_jax.progress import Log


@functools.cache
def momentum_rule(config: ScoreFirstConfig) -> Rule:
    """SGD with momentum, which starts as the first gradient, undamped; its state has the dtype of the parameters."""
    return Rule(optax.trace(decay=config.momentum), config.clip_norm, config.fake_quant)


def score_first_ahead(model: Model, stream: Stream, mesh: Mesh, config: ScoreFirstConfig) -> None:
    """Begin to compile what `evaluate_score_first` runs. Of the parameters only shapes and dtypes count."""
    windows, chunk_of = chunk_windows(config.windows, stream.targets, stream.seq_len, config.stride, config.chunk_tokens)
    score_ahead(model, stream, mesh, windows, config.stride, chunk_of)
    sequences = min(config.chunk_tokens, stream.targets) // stream.seq_len
    plan = Plan.of(sequences, config, mesh.shape[AXIS], stream.batch_rows(mesh))
    ahead(training_program, *program_of(model, stream, mesh, momentum_rule(config), plan, config.epochs))


def evaluate_score_first(model: Model, stream: Stream, mesh: Mesh, config: ScoreFirstConfig, log: Log | None = None) -> Result:
    """Chunk c is scored with what chunks 0..c-1 taught; the last chunk is never trained on. `model` is not changed."""
    if not config.on:
        raise GolfError("eval.score_first.epochs is 0: this recipe has no score-first test-time training; use --mode sliding")
    watch, seq_len, chunk = Stopwatch(log), stream.seq_len, config.chunk_tokens
    with watch("compile"):
        windows, chunk_of = chunk_windows(config.windows, stream.targets, seq_len, config.stride, chunk)
        last = -(-stream.targets // chunk) - 1
        book = ScoreBook(stream, last + 1)
        adapter = Adapter(model, stream, mesh, config, momentum_rule(config), min(chunk, stream.targets) // seq_len, config.epochs)
        shapes = shapes_of(adapter.params)
        scorer = WindowScorer(model, shapes, mesh, book, windows, config.stride, chunk_of, log=log, label="score_first")
    for c in range(last + 1):
        with watch("score"):
            scorer.run(adapter.params, windows[chunk_of == c], c)
        if c < last:
            first = c * chunk
            book.update(first, first + chunk // seq_len * seq_len, adapter.steps)
            with watch("train"):
                lr = np.full((config.epochs, len(adapter.plan.sequence)), config.lr * cosine(c, last))
                adapter.train(adapter.prepare(first), lr)
    return adapter.result("score_first", book, watch.seconds)
