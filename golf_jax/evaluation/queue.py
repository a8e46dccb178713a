"""Documents of a stream, the queue in which they are scored, and their chunks (docs/recipes/pr2135_quant_eval.md, sections 4 to 6).

A stream of n + 1 tokens has targets 0..n-1; target p is token p + 1. Document i goes from its BOS up to and including the next document's,
so every token but the first is the target of exactly one document.
"""

from dataclasses import dataclass

import numpy as np

from golf_jax.config import GolfError

BOS = 1  # starts every document, in all tokenizers of the challenge


@dataclass(frozen=True)
class Documents:
    """First token and length of every document, the next one's BOS included; int64 [documents], in order of the stream."""

    start: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray) -> "Documents":
        """Raises GolfError where the stream does not begin with a document or ends right after a BOS."""
        start = np.flatnonzero(tokens == BOS)
        if not len(start) or start[0] != 0:
            raise GolfError(f"documents: the text does not begin with token {BOS} (BOS), so it has no documents to adapt to")
        if start[-1] == len(tokens) - 1:
            raise GolfError("documents: the text ends right after a BOS: its last document has no target; give one token less or more")
        return cls(start, np.append(start[1:] + 1, len(tokens)) - start)

    @property
    def targets(self) -> np.ndarray:
        return self.length - 1


@dataclass(frozen=True)
class Queue:
    """Batches of documents of similar length, the longest first."""

    batches: tuple[np.ndarray, ...]
    """Documents of each batch, by slot: ascending in length."""
    from_shortest: np.ndarray
    """Number of each batch counted from the shortest documents."""

    @classmethod
    def of(cls, documents: Documents, size: int) -> "Queue":
        order = np.argsort(documents.length, kind="stable")
        batches = [order[a : a + size] for a in range(0, len(order), size)]
        by_longest = sorted(range(len(batches)), key=lambda b: -int(documents.length[batches[b]].max()))
        return cls(tuple(batches[b] for b in by_longest), np.array(by_longest))

    @property
    def order(self) -> np.ndarray:
        """Documents in the order of the predictor: batch after batch, slot after slot."""
        return np.concatenate(self.batches)

    def pause(self, prefix: int) -> int:
        """Batches after which at least `prefix` documents are scored; one more than there are, if that is never so."""
        return int(np.searchsorted(np.cumsum([len(b) for b in self.batches]), prefix)) + 1

    def kept(self, batches: int, prefix: int) -> np.ndarray:
        """The documents of the first `batches` that train all weights: ascending in length, the longest beyond `prefix` left out."""
        chosen = np.argsort(self.from_shortest[:batches], kind="stable")
        return np.concatenate([self.batches[b] for b in chosen])[:prefix]


def chunk_window(targets: np.ndarray, chunk: int, window: int, index: int | np.ndarray) -> tuple[np.ndarray, ...]:
    """(start, length, offset, count) of a chunk within documents of `targets` targets: window tokens start..start+length-1 are read and the
    targets of its positions offset..offset+count-1 scored. Documents that ended before have length and count 0."""
    index = np.asarray(index)
    end = np.minimum((index + 1) * chunk, targets)
    start = np.maximum(0, end - window)
    there = index * chunk < targets
    return tuple(np.where(there, x, 0) for x in (start, end - start, index * chunk - start, end - index * chunk))


def segments(tokens: np.ndarray, cap: int) -> np.ndarray:
    """Segment of every input of a flat stream, int32 [T]: begins at 0, at every BOS, and every `cap` tokens counted from its own start."""
    begins = tokens == BOS
    begins[0] = True
    position = np.arange(len(tokens))
    first = np.maximum.accumulate(np.where(begins, position, 0))
    return np.cumsum((position - first) % cap == 0, dtype=np.int32) - 1
