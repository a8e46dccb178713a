"""Windows in, sums of nll out: compiled ahead, sharded over the devices, only the work that counts.

Two programs per evaluation: windows of which only the last `stride` targets count compute just those in the last block and the
head; the few others (the first window, the cut ones at the end) are scored in full.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from golf_jax.ahead import ahead, kept
from golf_jax.config import ModelConfig
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.stream import Stream
from golf_jax.evaluation.windows import Windows
from golf_jax.mesh import AXIS, REPLICATED, ROWS, own_rows, put, replicated
from golf_jax.model import Model, Weights, nll, weights_of
from golf_jax.progress import Log, Progress

Shapes = tuple[tuple[str, tuple[int, ...], str], ...]


def shapes_of(params: dict[str, Any]) -> Shapes:
    """What programs are compiled for: one value for one set of shapes and dtypes, in whatever order the parameters come."""
    return tuple(sorted((name, tuple(x.shape), str(x.dtype)) for name, x in params.items()))


def avals(mesh: Mesh, shapes: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of parameters replicated over the mesh, for compiling ahead."""
    return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=replicated(mesh)) for name, shape, dtype in shapes}


@kept(8)
def weights_program(config: ModelConfig, mesh: Mesh, shapes: Shapes) -> jax.stages.Compiled:
    """Compiled params -> `Weights`: what every batch would do to the parameters alone. Kept for the process."""
    sharded = jax.shard_map(
        partial(weights_of, config, packed=True), mesh=mesh, in_specs=(REPLICATED,), out_specs=REPLICATED, check_vma=False
    )
    return jax.jit(sharded).lower(avals(mesh, shapes)).compile()


@kept(32)
def scoring_program(
    config: ModelConfig, mesh: Mesh, shapes: Shapes, rows: int, seq_len: int, last: int | None, looping: bool
) -> jax.stages.Compiled:
    """Compiled (weights, tokens uint16 [devices * rows, T + 1]) -> nll float32 [devices * rows, last or T]. Kept for the process."""

    def local(weights: Weights, tokens_BT: jax.Array) -> jax.Array:
        tokens_BT = tokens_BT.astype(jnp.int32)
        targets_BT = tokens_BT[:, 1:] if last is None else tokens_BT[:, -last:]
        return nll(config, weights, tokens_BT[:, :-1], targets_BT, looping=looping, last=last)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(REPLICATED, ROWS), out_specs=ROWS, check_vma=False)
    total = rows * mesh.shape[AXIS]
    tokens = jax.ShapeDtypeStruct((total, seq_len + 1), jnp.uint16, sharding=NamedSharding(mesh, ROWS))
    weights = jax.eval_shape(partial(weights_of, config, packed=True), avals(mesh, shapes))
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), weights)
    return jax.jit(sharded).lower(weights, tokens).compile()


def gather(tokens: np.ndarray, start: np.ndarray, length: np.ndarray, seq_len: int, rows: int) -> np.ndarray:
    """Windows as uint16 [rows, seq_len + 1]: `length` inputs and the last target; the rest of a row, and spare rows, are zero."""
    out = np.zeros((rows, seq_len + 1), np.uint16)
    offsets = np.arange(seq_len + 1)
    index = start[:, None] + offsets
    inside = offsets <= length[:, None]
    out[: len(start)] = np.where(inside, tokens[np.minimum(index, len(tokens) - 1)], 0)
    return out


@dataclass(frozen=True)
class Kind:
    """Windows that one program scores: `rows` per device and call, their `last` targets (None: all)."""

    last: int | None
    rows: int
    chosen: np.ndarray
    """Boolean [windows]"""

    def program_of(self, model: Model, shapes: Shapes, mesh: Mesh, seq_len: int) -> tuple[Any, ...]:
        """Arguments of `scoring_program`."""
        return model.config, mesh, shapes, self.rows, seq_len, self.last, model.looping


def kinds_of(windows: Windows, stride: int, stream: Stream, mesh: Mesh, chunk_of: np.ndarray | None = None) -> list[Kind]:
    """The kinds of windows that there are. Those scored in full take as many rows as the standard evaluation: its program then serves."""
    devices, rows = mesh.shape[AXIS], stream.batch_rows(mesh)
    chunk_of = np.zeros(len(windows), np.int64) if chunk_of is None else chunk_of
    short = (windows.length == stream.seq_len) & (windows.score_from == stream.seq_len - stride) & (stride < stream.seq_len)
    most = int(np.bincount(chunk_of[short]).max(initial=0))
    found = [(stride, short, most), (None, ~short, stream.targets // stream.seq_len)]
    return [Kind(last, max(1, min(rows, -(-n // devices))), chosen) for last, chosen, n in found if chosen.any()]


def score_ahead(model: Model, stream: Stream, mesh: Mesh, windows: Windows, stride: int, chunk_of: np.ndarray | None = None) -> None:
    """Begin to compile what a `WindowScorer` of these windows runs. Of the parameters only shapes and dtypes count."""
    shapes = shapes_of(model.params)
    for kind in kinds_of(windows, stride, stream, mesh, chunk_of):
        ahead(scoring_program, *kind.program_of(model, shapes, mesh, stream.seq_len))
    ahead(weights_program, model.config, mesh, shapes)


class WindowScorer:
    """Scores windows of one stream with whatever parameters it is given.

    `windows` is the whole list that `run` will be given parts of: it fixes the batch shapes. Each chunk of it (`chunk_of`, one
    number per window) is one call of `run`. Everything is compiled on construction.
    """

    def __init__(
        self,
        model: Model,
        shapes: Shapes,
        mesh: Mesh,
        book: ScoreBook,
        windows: Windows,
        stride: int,
        chunk_of: np.ndarray | None = None,
        *,
        log: Log | None = None,
        label: str = "",
    ) -> None:
        self.mesh, self.book, self.seq_len, self.stride = mesh, book, book.stream.seq_len, stride
        self.programs = {
            kind.last: (kind.rows * mesh.shape[AXIS], scoring_program(*kind.program_of(model, shapes, mesh, self.seq_len)))
            for kind in kinds_of(windows, stride, book.stream, mesh, chunk_of)
        }
        self.prepare = weights_program(model.config, mesh, shapes)
        self.done, self.progress = 0, Progress(log, f"{label}: windows", len(windows))

    def run(self, params: dict[str, jax.Array], windows: Windows, chunk: int = 0) -> None:
        """Score `windows` and enter them in the book. Each batch is read while the next one computes."""
        waiting, weights = None, self.prepare(params)
        for batch, offsets, size, program in self._batches(windows):
            tokens = gather(self.book.stream.tokens, batch.start, batch.length, self.seq_len, size)
            self.book.issue(batch, offsets)
            out = program(weights, put(self.mesh, tokens))
            if waiting is not None:
                self._collect(chunk, *waiting)
            waiting = (batch, offsets, out)
        if waiting is not None:
            self._collect(chunk, *waiting)

    def _batches(self, windows: Windows) -> Iterator[tuple[Windows, np.ndarray, int, jax.stages.Compiled]]:
        for kind in kinds_of(windows, self.stride, self.book.stream, self.mesh):
            size, program = self.programs[kind.last]
            offsets, chosen = np.arange(self.seq_len - (kind.last or self.seq_len), self.seq_len), np.flatnonzero(kind.chosen)
            for first in range(0, len(chosen), size):
                yield windows[chosen[first : first + size]], offsets, size, program

    def _collect(self, chunk: int, batch: Windows, offsets: np.ndarray, out: jax.Array) -> None:
        index, nll_BN = own_rows(out)
        real = index < len(batch)
        self.book.collect(chunk, batch[index[real]], offsets, nll_BN[real])
        self.done += len(batch)
        self.progress.at(self.done)
