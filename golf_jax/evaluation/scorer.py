"""Windows in, sums of nll out: compiled ahead, sharded over the devices, only the work that counts.

Two programs per evaluation: windows of which only the last `stride` targets count compute just those in the last block and the
head; the few others (the first window, the cut ones at the end) are scored in full.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from golf_jax.config import ModelConfig
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.windows import Windows
from golf_jax.mesh import AXIS, REPLICATED, ROWS, own_rows, put, replicated
from golf_jax.model import Model, nll
from golf_jax.progress import Log, Progress

Shapes = tuple[tuple[str, tuple[int, ...], str], ...]


def shapes_of(params: dict[str, jax.Array]) -> Shapes:
    return tuple((name, tuple(x.shape), str(x.dtype)) for name, x in params.items())


def avals(mesh: Mesh, shapes: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of parameters replicated over the mesh, for compiling ahead."""
    return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=replicated(mesh)) for name, shape, dtype in shapes}


@functools.lru_cache(maxsize=32)
def scoring_program(
    config: ModelConfig, mesh: Mesh, shapes: Shapes, rows: int, seq_len: int, last: int | None, looping: bool
) -> jax.stages.Compiled:
    """Compiled (params, tokens uint16 [devices * rows, T + 1]) -> nll float32 [devices * rows, last or T]. Kept for the process."""

    def local(params: dict[str, jax.Array], tokens_BT: jax.Array) -> jax.Array:
        tokens_BT = tokens_BT.astype(jnp.int32)
        targets_BT = tokens_BT[:, 1:] if last is None else tokens_BT[:, -last:]
        return nll(config, params, tokens_BT[:, :-1], targets_BT, looping=looping, last=last)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(REPLICATED, ROWS), out_specs=ROWS, check_vma=False)
    total = rows * mesh.shape[AXIS]
    tokens = jax.ShapeDtypeStruct((total, seq_len + 1), jnp.uint16, sharding=NamedSharding(mesh, ROWS))
    return jax.jit(sharded).lower(avals(mesh, shapes), tokens).compile()


def gather(tokens: np.ndarray, start: np.ndarray, length: np.ndarray, seq_len: int, rows: int) -> np.ndarray:
    """Windows as uint16 [rows, seq_len + 1]: `length` inputs and the last target; the rest of a row, and spare rows, are zero."""
    out = np.zeros((rows, seq_len + 1), np.uint16)
    offsets = np.arange(seq_len + 1)
    index = start[:, None] + offsets
    inside = offsets <= length[:, None]
    out[: len(start)] = np.where(inside, tokens[np.minimum(index, len(tokens) - 1)], 0)
    return out


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
        devices, rows = mesh.shape[AXIS], book.stream.batch_rows(mesh)
        chunk_of = np.zeros(len(windows), np.int64) if chunk_of is None else chunk_of
        short = self._only_last(windows)
        self.kinds: list[tuple[bool, int, np.ndarray, jax.stages.Compiled]] = []
        for kind, last in ((True, stride), (False, None)):
            most = int(np.bincount(chunk_of[short == kind]).max(initial=0))
            if most:
                local = min(rows, -(-most // devices))
                offsets = np.arange(0 if last is None else self.seq_len - last, self.seq_len)
                program = scoring_program(model.config, mesh, shapes, local, self.seq_len, last, model.looping)
                self.kinds.append((kind, local * devices, offsets, program))
        self.done, self.progress = 0, Progress(log, f"{label}: windows", len(windows))

    def _only_last(self, windows: Windows) -> np.ndarray:
        """Full windows that score their last `stride` targets."""
        return (windows.length == self.seq_len) & (windows.score_from == self.seq_len - self.stride) & (self.stride < self.seq_len)

    def run(self, params: dict[str, jax.Array], windows: Windows, chunk: int = 0) -> None:
        """Score `windows` and enter them in the book. Each batch is read while the next one computes."""
        waiting = None
        for batch, offsets, size, program in self._batches(windows):
            tokens = gather(self.book.stream.tokens, batch.start, batch.length, self.seq_len, size)
            self.book.issue(batch, offsets)
            out = program(params, put(self.mesh, tokens))
            if waiting is not None:
                self._collect(chunk, *waiting)
            waiting = (batch, offsets, out)
        if waiting is not None:
            self._collect(chunk, *waiting)

    def _batches(self, windows: Windows) -> Iterator[tuple[Windows, np.ndarray, int, jax.stages.Compiled]]:
        short = self._only_last(windows)
        for kind, size, offsets, program in self.kinds:
            chosen = np.flatnonzero(short == kind)
            for first in range(0, len(chosen), size):
                yield windows[chosen[first : first + size]], offsets, size, program

    def _collect(self, chunk: int, batch: Windows, offsets: np.ndarray, out: jax.Array) -> None:
        index, nll_BN = own_rows(out)
        real = index < len(batch)
        self.book.collect(chunk, batch[index[real]], offsets, nll_BN[real])
        self.done += len(batch)
        self.progress.at(self.done)
