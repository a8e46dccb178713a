"""Standard evaluation on packed streams (PR 2135's "diagnostic" one; docs/recipes/pr2135_quant_eval.md, section 4)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from golf_jax.ahead import kept
from golf_jax.config import GolfError, ModelConfig, PackedConfig
from golf_jax.evaluation.queue import segments
from golf_jax.evaluation.score import Result, Stopwatch, Trace
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.scorer import Shapes, avals, shapes_of
from golf_jax.evaluation.stream import Stream
from golf_jax.evaluation.windows import Windows
from golf_jax.mesh import AXIS, REPLICATED, ROWS, own_rows, platform, put, replicate
from golf_jax.model import Model, nll, resolve
from golf_jax.progress import Log, Progress


def inside_documents(config: ModelConfig, mesh: Mesh, log: Log | None = None) -> ModelConfig:
    """`config` with an attention backend that stays inside documents; the log says so where the model's own cannot."""
    try:
        return resolve(config, platform(mesh), documents=True)
    except GolfError:
        other = resolve(replace(config, attention="auto", mlp="auto"), platform(mesh), documents=True)
        if log:
            log(f"attention: {config.attention} cannot stay inside documents on this machine; scored with {other.attention}")
        return other


@kept(8)
def packed_program(config: ModelConfig, mesh: Mesh, shapes: Shapes, length: int, longest: int, looping: bool) -> jax.stages.Compiled:
    """Compiled (params, tokens uint16 [devices, L + 1], segments int32 [devices, L]) -> nll float32 [devices, L]."""

    def local(params: dict[str, jax.Array], tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        x_BT = tokens_BT.astype(jnp.int32)
        return nll(config, params, x_BT[:, :-1], x_BT[:, 1:], segments_BT=segments_BT, longest=longest, looping=looping)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(REPLICATED, ROWS, ROWS), out_specs=ROWS, check_vma=False)
    on_mesh, devices = NamedSharding(mesh, ROWS), mesh.shape[AXIS]
    tokens = jax.ShapeDtypeStruct((devices, length + 1), jnp.uint16, sharding=on_mesh)
    segment = jax.ShapeDtypeStruct((devices, length), jnp.int32, sharding=on_mesh)
    return jax.jit(sharded).lower(avals(mesh, shapes), tokens, segment).compile()


def streams(rows: int, config: PackedConfig) -> np.ndarray:
    """First row of every flat stream: each rank's share of the rows, without those that do not fill a stream."""
    shares = [(rows * r // config.ranks, rows * (r + 1) // config.ranks) for r in range(config.ranks)]
    return np.concatenate([np.arange(a, b - config.rows + 1, config.rows) for a, b in shares])


def evaluate_packed(model: Model, stream: Stream, mesh: Mesh, config: PackedConfig, log: Log | None = None) -> Result:
    """Score flat streams of `rows` rows of `seq_len` targets; attention stays inside documents, positions run over the whole stream.

    One entry of the trace per stream. Raises GolfError for a text that fills none.
    """
    if not config.on:
        raise GolfError("eval.packed.rows is 0: this recipe has no evaluation on packed streams")
    length, devices = config.rows * config.seq_len, mesh.shape[AXIS]
    first = streams(stream.targets // config.seq_len, config) * config.seq_len
    if not len(first):
        raise GolfError(f"packed: {stream.targets} targets fill no stream of {length} (eval.packed.rows x seq_len on each of its ranks)")
    watch, book, progress = Stopwatch(log), ScoreBook(stream, len(first)), Progress(log, "packed: streams", len(first))
    offsets = np.arange(length)
    with watch("compile"):
        params = replicate(mesh, model.params)
        program = packed_program(
            inside_documents(model.config, mesh, log), mesh, shapes_of(params), length, min(config.seq_len, length), model.looping
        )
    with watch("score"):
        for a in range(0, len(first), devices):
            batch = first[a : a + devices]
            tokens, segment = np.zeros((devices, length + 1), np.uint16), np.zeros((devices, length), np.int32)
            for row, start in enumerate(batch):
                tokens[row] = stream.tokens[start : start + length + 1]
                segment[row] = segments(tokens[row, :-1], config.seq_len)
            windows = Windows(batch, np.full_like(batch, length), np.zeros_like(batch))
            book.issue(windows, offsets)
            index, scores = own_rows(program(params, put(mesh, tokens), put(mesh, segment)))
            for row, values in zip(index, scores, strict=True):
                if row < len(batch):
                    book.collect(a + row, windows[np.array([row])], offsets, values[None])
            progress.at(a + len(batch))
    score, chunks = book.totals()
    trace = Trace(chunks, order=tuple(book.order))
    return Result("packed", score, book.facts(), watch.seconds, stream.share, trace, book.scores)
