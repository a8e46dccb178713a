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


def evaluate_standard(model: Model, stream: Stream, mesh: Mesh, config: None = None, log: Log | None = None) -> Result:
    """Score rows of `seq_len` targets, side by side, each target with the context of its row; an incomplete row is left out."""
    windows = standard_windows(stream.targets, stream.seq_len)
    return _evaluate("standard", model, stream, mesh, windows, stream.seq_len, log)


def evaluate_sliding(model: Model, stream: Stream, mesh: Mesh, config: SlidingConfig, log: Log | None = None) -> Result:
    """Score with a window of `seq_len` that moves by `stride`: every target but the first has almost a full window of context."""
    if not config.on:
        raise GolfError("eval.sliding.stride is 0: this recipe has no sliding evaluation; give --stride")
    windows = sliding_windows(config.windows, stream.targets, stream.seq_len, config.stride)
    return _evaluate("sliding", model, stream, mesh, windows, config.stride, log)


def standard_ahead(model: Model, stream: Stream, mesh: Mesh, config: None = None) -> None:
    """Begin to compile what `evaluate_standard` runs. Of the parameters only shapes and dtypes count."""
    score_ahead(model, stream, mesh, standard_windows(stream.targets, stream.seq_len), stream.seq_len)


def sliding_ahead(model: Model, stream: Stream, mesh: Mesh, config: SlidingConfig) -> None:
    """The same of `evaluate_sliding`."""
    score_ahead(model, stream, mesh, sliding_windows(config.windows, stream.targets, stream.seq_len, config.stride), config.stride)


def _evaluate(name: str, model: Model, stream: Stream, mesh: Mesh, windows: Windows, stride: int, log: Log | None) -> Result:
    if not len(windows):
        raise GolfError(f"{name}: no window for {len(stream.tokens)} tokens and seq_len {stream.seq_len}")
    watch = Stopwatch(log)
    with watch("compile"):
        params = replicate(mesh, model.params)
        book = ScoreBook(stream)
        scorer = WindowScorer(model, shapes_of(params), mesh, book, windows, stride, log=log, label=name)
    with watch("score"):
        scorer.run(params, windows)
    return Result(name, book.totals()[0], book.facts(), watch.seconds, stream.share, scores=book.scores)
