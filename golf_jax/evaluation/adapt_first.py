"""Adapt-first test-time training (PR 562): trains on the whole validation set and scores afterwards.

Illegal (C3). Reproduced as a reference, and marked so wherever its number appears.
"""

import functools

import numpy as np
from jax.sharding import Mesh

from golf_jax.config import AdaptFirstConfig, GolfError, ModelConfig
from golf_jax.evaluation.adapter import Adapter, Rule, cosine
from golf_jax.evaluation.score import Result, Stopwatch
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.scorer import WindowScorer, shapes_of
from golf_jax.evaluation.stream import Stream
from golf_jax.evaluation.windows import sliding_windows
from golf_jax.model import Model, leaves
from golf_jax.optim.adam import scale_by_adam
from golf_jax.progress import Log, Progress

ADAM = (0.9, 0.999, 1e-8)  # docs/recipes/pr562.md, section 6.4


@functools.cache
def adam_rule(config: AdaptFirstConfig, model: ModelConfig) -> Rule:
    """Adam with learning rates by the tensor's name, as PR 562 has them: `.proj.` and `.fc.`"""
    factor = {".proj.": config.proj_lr_scale, ".fc.": config.fc_lr_scale}
    scales = ((name, next((f for key, f in factor.items() if key in leaf.tensor), 1.0)) for name, leaf in leaves(model).items())
    return Rule(scale_by_adam(*ADAM), config.clip_norm, config.fake_quant, tuple(scales))  # pyright: ignore[reportArgumentType]


def evaluate_adapt_first(model: Model, stream: Stream, mesh: Mesh, config: AdaptFirstConfig, log: Log | None = None) -> Result:
    """Epochs over everything, then one sliding evaluation. `model` is not changed."""
    if not config.on:
        raise GolfError("eval.adapt_first.epochs is 0: this recipe has no adapt-first test-time training; use --mode sliding")
    watch, seq_len = Stopwatch(log), stream.seq_len
    with watch("compile"):
        windows = sliding_windows(config.windows, stream.targets, seq_len, config.stride)
        book = ScoreBook(stream)
        adapter = Adapter(model, stream, mesh, config, adam_rule(config, model.config), stream.targets // seq_len, epochs=1)
        scorer = WindowScorer(model, shapes_of(adapter.params), mesh, book, windows, config.stride, log=log, label="adapt_first")
    rows, steps = adapter.prepare(0), adapter.steps
    progress = Progress(log, "adapt_first: epochs", config.epochs)
    for epoch in range(config.epochs):
        book.update(0, stream.targets, steps)
        with watch("train"):
            lr = config.lr * cosine(np.arange(epoch * steps, (epoch + 1) * steps), config.epochs * steps)
            adapter.train(rows, lr[None])
        progress.at(epoch + 1)
    with watch("score"):
        scorer.run(adapter.params, windows)
    return adapter.result("adapt_first", book, watch.seconds)
