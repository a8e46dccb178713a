"""Test-time training per document (PR 2135; docs/recipes/pr2135_quant_eval.md, sections 5 to 8).

Documents wait in a queue, the longest first. A batch of them is scored chunk by chunk, each with adapters of its own that learn from every
chunk once it is scored. When a prefix is scored, it trains all weights once. Scores may be tilted by token n-grams.

The predictor's order is the queue's: batch after batch, slot after slot, left to right. Whatever a score depends on lies before it in that
order, except for a tilt that counts in corpus order, as the record's does: then C1 fails, and the result says so. The documents of a batch
are split over the devices, so the queue, and with it every score, does not depend on their number or on timing.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from golf_jax.config import DocumentsConfig, GolfError, ModelConfig, TiltConfig
from golf_jax.evaluation.adapter import Rule, TTTState, cosine, initial_state, update
from golf_jax.evaluation.adapters import Adapters, Chunk, fresh, reset, score_then_step
from golf_jax.evaluation.legality import tilt_breaks_order, tilt_normalization
from golf_jax.evaluation.packed import inside_documents
from golf_jax.evaluation.queue import Documents, Queue, chunk_window, segments
from golf_jax.evaluation.score import Facts, Result, Stopwatch, Trace
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.scorer import Shapes, avals, shapes_of
from golf_jax.evaluation.stream import Stream
from golf_jax.evaluation.tilt import hints
from golf_jax.evaluation.windows import Windows
from golf_jax.mesh import AXIS, REPLICATED, ROWS, own_rows, put, replicate, replicated
from golf_jax.model import Model, nll
from golf_jax.progress import Log, Progress

Observer = Callable[[str, Any, Any], None]
Start = Callable[[int], dict[str, np.ndarray]]


def widths(chunk: int, window: int) -> tuple[int, ...]:
    """The window widths that are compiled: doubling from one chunk on. Positions behind a window's end are never seen, so the next larger
    one serves it."""
    found = [chunk]
    while found[-1] < window:
        found.append(min(2 * found[-1], window))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def chunk_program(
    config: ModelConfig, looping: bool, ttt: DocumentsConfig, mesh: Mesh, shapes: Shapes, rows: int, width: int
) -> jax.stages.Compiled:
    """Compiled (params, adapters, chunk, lr) -> (adapters, scores [rows, C]); rows of documents in all, adapters donated."""
    run = jax.shard_map(
        lambda p, a, c, lr: score_then_step(config, looping, ttt, p, a, c, lr),
        mesh=mesh,
        in_specs=(REPLICATED, Adapters(ROWS, ROWS, REPLICATED), ROWS, REPLICATED),
        out_specs=(Adapters(ROWS, ROWS, REPLICATED), ROWS),
        check_vma=False,
    )
    on_mesh = NamedSharding(mesh, ROWS)

    def aval(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on_mesh)

    chunk = Chunk(
        aval(jnp.uint16, rows, width), aval(jnp.uint16, rows, ttt.chunk), aval(jnp.int32, rows), aval(jnp.int32, rows, ttt.chunk),
        aval(jnp.float32, rows),
    )  # fmt: skip
    made = jax.eval_shape(lambda: fresh(config, looping, rows, ttt.rank, jax.random.key(0)))
    leaves, second = ({n: aval(x.dtype, *x.shape) for n, x in part.items()} for part in made[:2])
    scalar = functools.partial(jax.ShapeDtypeStruct, (), sharding=replicated(mesh))
    adapters = Adapters(leaves, second, scalar(jnp.int32))
    return jax.jit(run, donate_argnums=1).lower(avals(mesh, shapes), adapters, chunk, scalar(jnp.float32)).compile()


@functools.lru_cache(maxsize=8)
def global_program(config: ModelConfig, looping: bool, rule: Rule, mesh: Mesh, shapes: Shapes, rows: int, length: int, longest: int):
    """Compiled (state, tokens uint16 [rows, L + 1], segments int32 [rows, L], weight [rows, L], lr) -> (state, loss [rows], norm).

    One step of stochastic gradient descent on all weights; a row is a rank's flat stream, and the sum of the losses is minimised. The
    softcap is that of training.
    """

    def loss_fn(params: dict[str, jax.Array], tokens_BT: jax.Array, segments_BT: jax.Array, weight_BT: jax.Array):
        x_BT = tokens_BT.astype(jnp.int32)
        losses = nll(
            config, params, x_BT[:, :-1], x_BT[:, 1:], segments_BT=segments_BT, longest=longest, looping=looping, training=True
        )  # fmt: skip
        loss_B = jnp.sum(losses * weight_BT, 1)
        return jnp.sum(loss_B), loss_B

    def local(state: TTTState, tokens: jax.Array, segment: jax.Array, weight: jax.Array, lr: jax.Array):
        (_, loss_B), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, tokens, segment, weight)
        state, norm = update(rule, state, jax.lax.psum(grads, AXIS), lr)
        return state, jax.lax.all_gather(loss_B, AXIS, tiled=True), norm

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(REPLICATED, ROWS, ROWS, ROWS, REPLICATED), out_specs=REPLICATED, check_vma=False)
    split, whole = NamedSharding(mesh, ROWS), replicated(mesh)
    state = jax.eval_shape(functools.partial(initial_state, rule), avals(mesh, shapes))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state)
    arrays = [
        jax.ShapeDtypeStruct((rows, n), d, sharding=split)
        for n, d in ((length + 1, jnp.uint16), (length, jnp.int32), (length, jnp.float32))
    ]
    lr = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return jax.jit(sharded, donate_argnums=0).lower(state, *arrays, lr).compile()


@functools.cache
def sgd_rule(momentum: float, clip_norm: float) -> Rule:
    """Momentum starts as the first gradient, undamped, in the dtype of the parameters."""
    return Rule(optax.trace(decay=momentum), clip_norm, False)


class GlobalPhase:
    """Stochastic gradient descent of all weights on a stream of scored tokens, once through."""

    def __init__(self, model: Model, mesh: Mesh, ttt: DocumentsConfig, shapes: Shapes, log: Log | None = None) -> None:
        self.mesh, self.ttt = mesh, ttt
        per = ttt.global_chunk // ttt.seq_len
        bounds = [per * r // ttt.ranks for r in range(ttt.ranks + 1)]
        self.shares = [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
        self.length = max(b - a for a, b in self.shares) * ttt.seq_len
        self.rows = -(-len(self.shares) // mesh.size) * mesh.size
        self.rule, config = sgd_rule(ttt.global_momentum, ttt.clip_norm), inside_documents(model.config, mesh, log)
        self.program = global_program(config, model.looping, self.rule, mesh, shapes, self.rows, self.length, min(ttt.seq_len, self.length))
        self.loss: list[jax.Array] = []
        self.norm: list[jax.Array] = []
        self.lr: list[float] = []

    def batch(self, tokens: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens [rows, L + 1], segments, weights [rows, L]) of a chunk of the stream; every rank's mean counts the same."""
        size = self.ttt.seq_len
        x = np.zeros((self.rows, self.length + 1), np.uint16)
        segment, weight = np.zeros((self.rows, self.length), np.int32), np.zeros((self.rows, self.length), np.float32)
        for row, (a, b) in enumerate(self.shares):
            n, start = (b - a) * size, chunk * self.ttt.global_chunk + a * size
            x[row, : n + 1] = tokens[start : start + n + 1]
            segment[row] = -1  # the rest of the row is nobody's
            segment[row, :n] = segments(x[row, :n], size)
            weight[row, :n] = 1 / (n * len(self.shares))
        return x, segment, weight

    def train(self, params: dict[str, jax.Array], tokens: np.ndarray) -> dict[str, jax.Array]:
        """The weights after one pass over `tokens`; the last chunk of it is left out, as in the record."""
        chunks = -(-(len(tokens) - 1) // self.ttt.global_chunk)
        state = jax.jit(functools.partial(initial_state, self.rule), out_shardings=replicated(self.mesh))(params)
        for c in range(chunks - 1):
            lr = self.ttt.global_lr * cosine(c, chunks - 1)
            inputs = [put(self.mesh, x) for x in self.batch(tokens, c)]
            state, loss, norm = self.program(state, *inputs, put(self.mesh, np.array(lr, np.float32), REPLICATED))
            self.loss.append(loss)
            self.norm.append(norm)
            self.lr.append(lr)
        return state.params

    def loss_per_rank(self) -> np.ndarray:
        """Of every update, the mean of each rank's stream, [updates, ranks with a share]."""
        return np.array(self.loss, np.float32).reshape(-1, self.rows)[:, : len(self.shares)] * len(self.shares)


class DocumentScorer:
    """Scores batches of documents with adapters: owns them, and what they are compiled to."""

    def __init__(
        self, model: Model, mesh: Mesh, ttt: DocumentsConfig, book: ScoreBook, hint: np.ndarray, shapes: Shapes, start: Start | None
    ):
        self.model, self.mesh, self.ttt, self.book, self.hint, self.shapes, self.start = model, mesh, ttt, book, hint, shapes, start
        self.documents = Documents.of(book.stream.tokens)
        self.sets = 0
        self.kept: Adapters | None = None
        # Also the last batch has as many rows, some of them empty: it is that of the shortest documents, and programs take long to compile.
        self.rows = -(-min(ttt.batch, len(self.documents.start)) // mesh.size) * mesh.size
        self.work, self.done = Work(model, ttt, self.rows), 0.0

    def compile(self) -> None:
        for width in widths(self.ttt.chunk, self.ttt.seq_len):
            self.program(width)

    def program(self, width: int) -> jax.stages.Compiled:
        same = replace(self.ttt, tilt=TiltConfig(boost=self.ttt.tilt.boost))  # where hints come from is not compiled
        return chunk_program(self.model.config, self.model.looping, same, self.mesh, self.shapes, self.rows, width)

    def sharding(self) -> Adapters:
        """Documents over the devices."""
        split = NamedSharding(self.mesh, ROWS)
        return Adapters(split, split, replicated(self.mesh))

    def new(self) -> Adapters:
        """Another set, deterministic in its number."""
        number, self.sets = self.sets, self.sets + 1
        make = jax.jit(fresh, static_argnums=(0, 1, 2, 3), out_shardings=self.sharding())
        made = make(self.model.config, self.model.looping, self.rows, self.ttt.rank, jax.random.key(number))
        if self.start is None:
            return made
        given = {n: np.pad(x, [(0, self.rows - len(x))] + [(0, 0)] * (x.ndim - 1)) for n, x in self.start(number).items()}
        return made._replace(leaves=made.leaves | {n: put(self.mesh, x.astype(np.float32)) for n, x in given.items()})

    def reset(self, adapters: Adapters) -> Adapters:
        """The set for the next documents; it is donated."""
        return jax.jit(reset, donate_argnums=0, out_shardings=self.sharding())(adapters)

    def run(self, params: dict[str, jax.Array], batch: np.ndarray, number: int, observe: Observer | None, progress: Progress) -> None:
        """Score a batch of documents. A full one uses the kept adapters, any other a set of its own."""
        full = len(batch) == self.ttt.batch
        adapters = self.reset(self.kept or self.new()) if full else self.new()
        if observe:
            observe("before", number, jax.tree.map(lambda x: x[: len(batch)], adapters.leaves))
        start, targets = self.documents.start[batch], self.documents.targets[batch]
        chunks, costs, waiting = -(-targets // self.ttt.chunk), self.work.chunks(targets), None
        for c in range(int(chunks.max())):
            windows, chunk = self.chunk(start, targets, c)
            self.book.issue(windows, np.arange(self.ttt.chunk))
            goes_on = c < chunks.max() - 1
            lr = put(self.mesh, np.array(self.ttt.lr if goes_on else 0.0, np.float32), REPLICATED)
            inputs = Chunk(*(put(self.mesh, x) for x in chunk))
            if observe:
                observe("chunk", (number, c), (params, adapters, inputs))
            adapters, scores = self.program(chunk.tokens.shape[1])(params, adapters, inputs, lr)
            if goes_on:
                trained = np.flatnonzero(c < chunks - 1)
                self.book.update_on((start[trained, None] + c * self.ttt.chunk + np.arange(self.ttt.chunk)).ravel(), 1)
            if waiting is not None:  # read while the next chunk computes
                self._collect(number, *waiting)
                progress.at(round(self.done))
            waiting, self.done = (windows, scores), self.done + costs[c]
        assert waiting is not None
        self._collect(number, *waiting)
        if observe:
            observe("after", number, jax.tree.map(lambda x: x[: len(batch)], adapters.leaves))
        if full:
            self.kept = adapters

    def chunk(self, start: np.ndarray, targets: np.ndarray, c: int) -> tuple[Windows, Chunk]:
        """Chunk c of documents that begin at `start`: what it scores, as windows of the stream, and the arrays for the devices."""
        ttt, rows, tokens = self.ttt, self.rows, self.book.stream.tokens
        begin, length, offset, count = chunk_window(targets, ttt.chunk, ttt.seq_len, c)
        width = next(w for w in widths(ttt.chunk, ttt.seq_len) if w >= length.max())
        x, y = np.zeros((rows, width), np.uint16), np.zeros((rows, ttt.chunk), np.uint16)
        first, hint, goes_on = np.zeros(rows, np.int32), np.full((rows, ttt.chunk), -1, np.int32), np.zeros(rows, np.float32)
        for row in np.flatnonzero(count):
            a, target = start[row] + begin[row], start[row] + c * ttt.chunk
            x[row, : length[row]] = tokens[a : a + length[row]]
            y[row, : count[row]] = tokens[target + 1 : target + 1 + count[row]]
            hint[row, : count[row]] = self.hint[target : target + count[row]]
        first[: len(start)] = offset
        goes_on[: len(start)] = (c + 1) * ttt.chunk < targets
        windows = Windows(np.where(count > 0, start + c * ttt.chunk, 0), count, np.zeros_like(count))
        return windows, Chunk(x, y, first, hint, goes_on)

    def _collect(self, number: int, windows: Windows, scores: jax.Array) -> None:
        index, values = own_rows(scores)
        real = index < len(windows)
        self.book.collect(number, windows[index[real]], np.arange(self.ttt.chunk), values[real])


class Work:
    """How much there is to compute, known before it starts: the longest documents come first, so their number says little of the time.

    The unit is a token's pass through the layers; a target's pass through the head counts as many as its matrix is as large.
    """

    def __init__(self, model: Model, ttt: DocumentsConfig, rows: int) -> None:
        c, self.rows = model.config, rows
        layer = 2 * c.width * (c.width + c.num_kv_heads * c.head_dim + c.mlp_dim)
        self.ttt, self.head = ttt, c.vocab_size * c.width / (layer * sum(map(len, c.layer_order(model.looping))))

    def chunks(self, targets: np.ndarray) -> np.ndarray:
        """Of every chunk of a batch of documents of so many targets, float64 [chunks]."""
        ttt, longest = self.ttt, targets.max()
        length = chunk_window(longest, ttt.chunk, ttt.seq_len, np.arange(-(-longest // ttt.chunk)))[1]
        known = np.array(widths(ttt.chunk, ttt.seq_len))
        return self.rows * (known[np.searchsorted(known, length)] + self.head * ttt.chunk)

    def phase(self, documents: Documents, queue: Queue, pause: int) -> float:
        """Of the global phase, after so many batches."""
        return float(documents.length[queue.kept(pause, self.ttt.prefix)].sum() * (1 + self.head))


def target_order(documents: Documents, queue: Queue) -> np.ndarray:
    """The targets of the stream in the order of the predictor, int64."""
    order = queue.order
    begin, size = documents.start[order], documents.targets[order]
    ends = np.cumsum(size)
    return np.arange(ends[-1]) - np.repeat(ends - size, size) + np.repeat(begin, size)


def hints_of(tokens: np.ndarray, order: np.ndarray, tilt: TiltConfig) -> np.ndarray:
    """The hint of every target, int32, -1 for none, with a state that counts in `tilt.state`'s order. order: the predictor's."""
    targets = tokens[1:]
    if not tilt.order:
        return np.full(len(targets), -1, np.int32)
    if tilt.state == "corpus":
        return hints(targets, tilt.order).gated(tilt.threshold)
    found = np.empty(len(targets), np.int32)
    found[order] = hints(targets[order], tilt.order).gated(tilt.threshold)
    return found


def evaluate_documents(
    model: Model, stream: Stream, mesh: Mesh, config: DocumentsConfig, log: Log | None = None, *, start: Start | None = None,
    observe: Observer | None = None,
) -> Result:  # fmt: skip
    """Score every document with adapters of its own; `model` is not changed.

    start: the A factors of set number i by leaf, in place of random ones; observe: sees the leaves of a batch's adapters ("before",
    "after", number) and what each chunk is computed from ("chunk", (batch, chunk)). Raises GolfError for text without documents.
    """
    if not config.on:
        raise GolfError("eval.documents.rank is 0: this recipe has no test-time training per document")
    watch, tokens = Stopwatch(log), stream.tokens
    with watch("hints"):
        documents = Documents.of(tokens)
        queue = Queue.of(documents, config.batch)
        order = target_order(documents, queue)
        hint = hints_of(tokens, order, config.tilt)
    book, pause = ScoreBook(stream, len(queue.batches)), queue.pause(config.prefix) if config.prefix else 0
    with watch("compile"):
        params = replicate(mesh, model.params)
        scorer = DocumentScorer(model, mesh, config, book, hint, shapes_of(params), start)
        scorer.compile()
        phase = GlobalPhase(model, mesh, config, shapes_of(params), log) if 0 < pause <= len(queue.batches) else None
        scorer.kept = scorer.reset(scorer.new())  # which compiles, and changes nothing
    phase_work = scorer.work.phase(documents, queue, pause) if phase else 0.0
    total = phase_work + sum(scorer.work.chunks(documents.targets[batch]).sum() for batch in queue.batches)
    progress = Progress(log, "documents: window tokens", round(total), watch.seconds["hints"])
    for number, batch in enumerate(queue.batches):
        with watch("score"):
            scorer.run(params, batch, number, observe, progress)
        if phase and number + 1 == pause:
            kept = queue.kept(pause, config.prefix)
            with watch("train"):
                spans = [slice(int(a), int(a + n)) for a, n in zip(documents.start[kept], documents.length[kept], strict=True)]
                params = phase.train(params, np.concatenate([tokens[s] for s in spans]))
            steps = len(phase.lr)
            if steps:
                book.update_on(np.concatenate([np.arange(s.start, s.stop - 1) for s in spans]), steps)
            scorer.kept, scorer.done = scorer.new(), scorer.done + phase_work
    score, chunks = book.totals()
    trace = Trace(chunks, params=params, order=tuple(book.order))
    if phase:
        loss, norm = phase.loss_per_rank(), np.array([float(x) for x in phase.norm])
        trace = Trace(chunks, loss.mean(1), norm, np.array(phase.lr), params, tuple(book.order), loss)
    facts = _measured(book.facts(), tokens, order, config.tilt)
    return Result("documents", score, facts, watch.seconds, stream.share, trace, book.scores, progress.early)


def _measured(facts: Facts, tokens: np.ndarray, order: np.ndarray, tilt: TiltConfig) -> Facts:
    """`facts` with what can be measured of the tilt: C1 by flipped tokens, C2 over all of a vocabulary."""
    if not tilt.order:
        return facts
    # Flips find only what this text has repeated. A state that counts in another order than the predictor's depends on what comes later
    # whether or not these documents happen to share a context, so that is a violation by itself.
    ordered = tilt.state == "queue" or bool(np.all(order[1:] > order[:-1]))
    broken = tilt_breaks_order(functools.partial(hints_of, tilt=tilt), tokens, order)
    return replace(facts, causal=ordered and not broken, normalization_error=tilt_normalization(tilt.boost))
