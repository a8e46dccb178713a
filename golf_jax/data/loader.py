"""Training orders of the records: a stream (PR 372, 562, 638, 1182), shuffled sequences (PR 2005), packed documents (PR 2135).

A batch is the work of `ranks` processes of the original script, rank-major: rows [r * rows, (r + 1) * rows) are what rank r
trained on. `ranks` belongs to the recipe, not to this machine, so the order is the same on any number of devices.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from golf_jax.config import GolfError
from golf_jax.data.shards import Shard, check_token_range, find_shards, open_shard

Shards = str | Path | Sequence[np.ndarray]


class Batch(NamedTuple):
    """What one step trains on, on the host or on the mesh."""

    inputs: Any
    """int32 [sequences, seq_len]."""
    targets: Any
    """int32 [sequences, seq_len]: the inputs one token later."""
    segments: Any = None
    """int32 [sequences, seq_len]: attention stays inside each run of equal ones. None: a sequence is one segment."""


class Loader(Protocol):
    """A deterministic order of batches whose position is a few integers."""

    global_shape: tuple[int, int]
    row_slice: slice

    def next_batch(self) -> Batch:
        """The rows `row_slice` of the global batch, [local_rows, seq_len]."""
        ...

    def state(self) -> dict[str, int]:
        """The position as JSON-able integers; the same on every process."""
        ...

    def restore(self, state: dict[str, int]) -> None:
        """Continues after the batch that `state` was taken behind. GolfError when the data or the shape differ."""
        ...


class _Rows:
    """What the orders share: opened shards, shape of a batch, the part of it that this process reads."""

    def __init__(self, shards: Shards, ranks: int, rows: int, seq_len: int, row_slice: slice | None, vocab_size: int | None) -> None:
        self.source: object = "training data"
        if isinstance(shards, str | Path):
            self.source = shards
            self.shards: list[np.ndarray] | list[Shard] = [open_shard(path) for path in find_shards(shards)]
        else:
            self.shards = list(shards)
        if min(ranks, rows, seq_len) < 1:
            raise GolfError(f"data loader: ranks={ranks}, rows={rows}, seq_len={seq_len} must all be at least 1")
        self.ranks, self.rows, self.seq_len, self.vocab_size = ranks, rows, seq_len, vocab_size
        self.global_shape = (ranks * rows, seq_len)
        start, stop, step = (row_slice or slice(None)).indices(ranks * rows)
        if step != 1 or start >= stop:
            raise GolfError(f"data loader: row_slice {row_slice} selects no contiguous rows of {ranks * rows}")
        self.row_slice = slice(start, stop)
        self.batches = 0

    def state(self) -> dict[str, int]:
        tokens = sum(len(shard) for shard in self.shards)
        return {"batches": self.batches, "ranks": self.ranks, "rows": self.rows, "seq_len": self.seq_len, "tokens": tokens}

    def restore(self, state: dict[str, int]) -> None:
        here = self.state()
        for field, value in here.items():
            if field not in ("batches", "shard", "cursor") and state.get(field) != value:
                raise GolfError(f"data position: {field} was {state.get(field)} when it was saved and is {value} now")
        self.batches = int(state["batches"])

    def _batch(self, sequences: list[np.ndarray]) -> Batch:
        sequences_NT = np.stack(sequences).astype(np.int32)
        if self.vocab_size is not None:
            check_token_range(sequences_NT, self.vocab_size, self.source)
        return Batch(sequences_NT[:, :-1], sequences_NT[:, 1:])


class StreamLoader(_Rows):
    """One endless stream: shards in name order, wrapping around; batches may span shards (PR 372, 562, 638, 1182).

    With n = rows * seq_len, a step takes ranks * (n + 1) tokens. Rank r has the span [r (n + 1), (r + 1)(n + 1)): inputs are its
    first n tokens, targets its last n, cut into rows. The last token of a span is a target only.
    """

    def __init__(
        self,
        shards: Shards,
        ranks: int,
        rows: int,
        seq_len: int,
        row_slice: slice | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(shards, ranks, rows, seq_len, row_slice, vocab_size)
        self.starts = np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards])])

    def _read(self, position: int, count: int) -> np.ndarray:
        parts = []
        while count:
            position %= int(self.starts[-1])
            index = int(np.searchsorted(self.starts, position, side="right")) - 1
            offset = position - int(self.starts[index])
            part = self.shards[index][offset : offset + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)

    def next_batch(self) -> Batch:
        """See `Loader.next_batch`."""
        span = self.rows * self.seq_len + 1
        base = self.batches * self.ranks * span
        sequences = []
        for row in range(self.row_slice.start, self.row_slice.stop):
            rank, row_of_rank = divmod(row, self.rows)
            sequences.append(self._read(base + rank * span + row_of_rank * self.seq_len, self.seq_len + 1))
        self.batches += 1
        return self._batch(sequences)


class _RankShuffle:
    """The sequence order of one rank of PR 2005: which of its shards, and where in it.

    Every pass cuts each shard into sequences from a random phase on, permutes them, then draws a shard with probability
    proportional to what it has left. A draw takes exactly one double of the generator, as `Generator.choice(n, p=...)` does.
    """

    def __init__(self, rank: int, lengths: Sequence[int], seq_len: int) -> None:
        self.rank, self.lengths, self.seq_len = rank, lengths, seq_len
        self.restart()

    def restart(self) -> None:
        self.rng = np.random.Generator(np.random.PCG64(self.rank))
        self._new_pass()

    def _new_pass(self) -> None:
        self.orders = []
        for length in self.lengths:
            max_phase = min(self.seq_len - 1, max(0, length - self.seq_len - 1))
            phase = int(self.rng.integers(max_phase + 1)) if max_phase > 0 else 0
            count = max(0, (length - 1 - phase) // self.seq_len)
            self.orders.append(phase + self.rng.permutation(count) * self.seq_len)
        self.remaining = np.array([len(order) for order in self.orders], dtype=np.float64)
        self.left = sum(len(order) for order in self.orders)
        if not self.left:
            raise GolfError(
                f"training data: the {len(self.lengths)} shard(s) of rank {self.rank} hold no sequence of "
                f"{self.seq_len} + 1 tokens; use a shorter seq_len or more text"
            )

    def _take(self, uniform: float) -> tuple[int, int]:
        cumulative = (self.remaining / self.remaining.sum()).cumsum()
        cumulative /= cumulative[-1]
        shard = int(cumulative.searchsorted(uniform, side="right"))
        self.remaining[shard] -= 1
        self.left -= 1
        return shard, int(self.orders[shard][int(self.remaining[shard])])  # the order is consumed from its end

    def draw(self) -> tuple[int, int]:
        """Index among the rank's shards, and offset in it, of the next sequence."""
        if not self.left:
            self._new_pass()
        return self._take(self.rng.random())

    def skip(self, sequences: int) -> None:
        """From the very start, moves behind `sequences` draws; whole passes cost no replay."""
        self.restart()
        while sequences > self.left:
            sequences -= self.left
            buffered = {key: self.rng.bit_generator.state[key] for key in ("has_uint32", "uinteger")}
            self.rng.bit_generator.advance(self.left)  # pyright: ignore[reportAttributeAccessIssue]
            # `advance` drops the half-used 64-bit word that single draws of doubles leave alone.
            self.rng.bit_generator.state = {**self.rng.bit_generator.state, **buffered}
            self._new_pass()
        for uniform in self.rng.random(sequences):
            self._take(uniform)


class ShuffledLoader(_Rows):
    """Sequences in random order, drawn per rank (PR 2005). Rank r owns shards r, r + ranks, ...; its generator is seeded with r.

    The run's seed plays no part: the order is the same for every seed, as in the record. With fewer shards than ranks the script
    would leave ranks without data; here (our rule, never active otherwise) rank r then draws from shard r mod num_shards.
    """

    def __init__(
        self,
        shards: Shards,
        ranks: int,
        rows: int,
        seq_len: int,
        row_slice: slice | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(shards, ranks, rows, seq_len, row_slice, vocab_size)
        first, last = self.row_slice.start // rows, (self.row_slice.stop - 1) // rows
        self.owned = {rank: self._shards_of(rank) for rank in range(first, last + 1)}
        self.shuffles = {
            rank: _RankShuffle(rank, [len(self.shards[index]) for index in owned], seq_len) for rank, owned in self.owned.items()
        }

    def _shards_of(self, rank: int) -> list[int]:
        if len(self.shards) < self.ranks:
            return [rank % len(self.shards)]
        return list(range(rank, len(self.shards), self.ranks))

    def next_batch(self) -> Batch:
        """See `Loader.next_batch`."""
        sequences = []
        for rank, shuffle in self.shuffles.items():
            for row in range(rank * self.rows, (rank + 1) * self.rows):
                index, start = shuffle.draw()  # rows of other processes are drawn too: the generator must move on
                if self.row_slice.start <= row < self.row_slice.stop:
                    sequences.append(self.shards[self.owned[rank][index]][start : start + self.seq_len + 1])
        self.batches += 1
        return self._batch(sequences)

    def restore(self, state: dict[str, int]) -> None:
        """See `Loader.restore`. Replays the current pass: seconds for hundreds of thousands of sequences."""
        super().restore(state)
        for shuffle in self.shuffles.values():
            shuffle.skip(self.batches * self.rows)


def document_segments(tokens_BT: np.ndarray, bos_id: int, limit: int) -> np.ndarray:
    """Segment of every token, int32 [B, T], counted in each row from 0: one begins at the row's start and at every BOS, and is cut
    every `limit` tokens counted from there (docs/recipes/pr2135_model_training.md, section 2.4)."""
    place_T = np.arange(tokens_BT.shape[1])
    start_BT = np.maximum.accumulate(np.where((tokens_BT == bos_id) | (place_T == 0), place_T, 0), axis=1)
    return np.cumsum((place_T - start_BT) % limit == 0, axis=1, dtype=np.int32) - 1


class DocumentLoader(_Rows):
    """Packed documents (PR 2135): a step takes ranks * (N + 1) tokens of one shard, rank r the span of N + 1 from r (N + 1) on.

    Every rank trains on its span as one row of N = `row_tokens`, whose segments are the documents in it, cut at `limit` tokens. A shard
    is read from its first BOS; what is left of it, too short for a step, is dropped. After the last shard comes the first again.
    """

    def __init__(
        self,
        shards: Shards,
        ranks: int,
        row_tokens: int,
        limit: int,
        row_slice: slice | None = None,
        vocab_size: int | None = None,
        bos_id: int = 1,
    ) -> None:
        super().__init__(shards, ranks, 1, row_tokens, row_slice, vocab_size)
        if limit < 1:
            raise GolfError(f"data loader: limit={limit} must be at least 1")
        self.limit, self.bos_id, self.span = limit, bos_id, ranks * (row_tokens + 1)
        self.shard, self.cursor = 0, self._first_document(0)

    def _first_document(self, shard: int) -> int:
        """Position of the first BOS; the shard's length where it has none."""
        for start in range(0, len(self.shards[shard]), 1 << 16):
            if len(found := np.flatnonzero(self.shards[shard][start : start + (1 << 16)] == self.bos_id)):
                return start + int(found[0])
        return len(self.shards[shard])

    def next_batch(self) -> Batch:
        """See `Loader.next_batch`. GolfError when no shard holds a step."""
        for _ in range(len(self.shards) + 1):
            if self.cursor + self.span <= len(self.shards[self.shard]):
                break
            self.shard = (self.shard + 1) % len(self.shards)
            self.cursor = self._first_document(self.shard)
        else:
            raise GolfError(
                f"{self.source}: a step takes {self.span:,} tokens of one shard behind its first BOS ({self.bos_id}), and none holds as "
                "many: lower --data.rows-per-rank, or give more text"
            )
        row = self.seq_len + 1
        starts = range(self.cursor + self.row_slice.start * row, self.cursor + self.row_slice.stop * row, row)
        batch = self._batch([self.shards[self.shard][start : start + row] for start in starts])
        self.cursor, self.batches = self.cursor + self.span, self.batches + 1
        return batch._replace(segments=document_segments(batch.inputs, self.bos_id, self.limit))

    def state(self) -> dict[str, int]:
        """See `Loader.state`."""
        return super().state() | {"limit": self.limit, "bos_id": self.bos_id, "shard": self.shard, "cursor": self.cursor}

    def restore(self, state: dict[str, int]) -> None:
        """See `Loader.restore`."""
        super().restore(state)
        self.shard, self.cursor = int(state["shard"]), int(state["cursor"])


ORDERS = {"stream": StreamLoader, "shuffled": ShuffledLoader, "documents": DocumentLoader}


def make_loader(
    order: str,
    shards: Shards,
    ranks: int,
    rows: int,
    seq_len: int,
    row_slice: slice | None = None,
    vocab_size: int | None = None,
    bos_id: int = 1,
) -> StreamLoader | ShuffledLoader | DocumentLoader:
    """The training order named `order` over the glob (or the open arrays) `shards`.

    `ranks` processes of the recipe train on `rows` sequences of `seq_len` tokens each per step; `documents`: on one of rows * seq_len
    tokens, in which no segment is longer than seq_len. `row_slice`: the rows of the global batch (`DataConfig.batch_shape`) that this
    process needs (all by default). `vocab_size`: refuse tokens outside of it. `bos_id`: what starts a document.
    """
    if order not in ORDERS:
        raise GolfError(f"data.order={order!r}: must be one of {', '.join(ORDERS)}")
    if order == "documents":
        return DocumentLoader(shards, ranks, rows * seq_len, seq_len, row_slice, vocab_size, bos_id)
    return ORDERS[order](shards, ranks, rows, seq_len, row_slice, vocab_size)
