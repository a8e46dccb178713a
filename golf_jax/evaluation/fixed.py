"""Standard and sliding-window evaluation: the weights stay as they are."""

from jax.sharding import Mesh

from golf_jax.config import GolfError, SlidingConfig
from golf_jax.evaluation.score import Result, Stopwatch
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.scorer import WindowScorer, score_ahead, shapes_of
from golf_jax.evaluation.stream import Stream
from golf_jax.evaluation.windows import Windows, sliding_windows, standard_windows
from golf_jax.mesh import replicate
from golf_jax.model import Model
from golf_jax.progress import Log


def evaluate_fixed(model: Model, stream: Stream, mesh: Mesh, config: SlidingConfig | None = None, log: Log | None = None) -> Result:
    """Score with the weights as they are.

    Without a config the standard evaluation: rows of `seq_len` targets, side by side, each target with the context of its row; an
    incomplete row is left out. With one, a window of `seq_len` that moves by the stride: every target but the first has almost a full
    window of context.
    """
    windows, stride = windows_of(stream, config)
    name, watch = "standard" if config is None else "sliding", Stopwatch(log)
    if not len(windows):
        raise GolfError(f"{name}: no window for {len(stream.tokens)} tokens and seq_len {stream.seq_len}")
    with watch("compile"):
        params = replicate(mesh, model.params)
        book = ScoreBook(stream)
        scorer = WindowScorer(model, shapes_of(params), mesh, book, windows, stride, log=log, label=name)
    with watch("score"):
        scorer.run(params, windows)
    return Result(name, book.totals()[0], book.facts(), watch.seconds, stream.share, scores=book.scores)


def fixed_ahead(model: Model, stream: Stream, mesh: Mesh, config: SlidingConfig | None = None) -> None:
    """Begin to compile what `evaluate_fixed` runs. Of the parameters only shapes and dtypes count."""
    score_ahead(model, stream, mesh, *windows_of(stream, config))


def windows_of(stream: Stream, config: SlidingConfig | None) -> tuple[Windows, int]:
    """(windows, targets by which one follows the other) of the standard evaluation, or of the sliding one. Raises GolfError."""
    if config is None:
        return standard_windows(stream.targets, stream.seq_len), stream.seq_len
    if not config.on:
        raise GolfError("eval.sliding.stride is 0: this recipe has no sliding evaluation; give --stride")
    return sliding_windows(config.windows, stream.targets, stream.seq_len, config.stride), config.stride
