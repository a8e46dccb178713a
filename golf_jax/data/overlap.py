"""Is validation text trained on? Documents are compared from their start on, without the control tokens that they end with.

What stands inside longer documents of training is found by windows of 64 tokens of every validation document, looked for at every
position by a rolling hash. Whatever the hash finds is compared token by token.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from golf_jax.data import caseops
from golf_jax.data.shards import check_token_range
from golf_jax.data.tokenizer import Tokenizer

PREFIX = 64  # tokens after BOS; documents that agree in them begin alike
TRAINED_ON = 512  # so many tokens from the start on are more than a common header, whatever follows
WINDOW = 64  # tokens in a row that no chance makes agree
WINDOWS = 8  # of a document at most
SHARED = 8  # how often validation, and training, may have a window: more, and it is boilerplate
VARIED = 8  # different tokens of a window at least: fewer are a line of dashes, a table of zeros
BLOCK = 1 << 17  # tokens that are hashed at once: they fit the caches
TABLE_BITS = 22  # of the hash, in a table that excludes most positions
FACTOR = 0x9E3779B1  # any odd number


@dataclass(frozen=True)
class Overlap:
    """What validation and training have in common."""

    documents: int
    """Of validation."""
    read: int
    """Documents of training that were compared."""
    leaked: int
    """Validation documents of which at least half, or 512 tokens, begin one of these, or half of the windows stand anywhere in them."""
    alike: int
    """Further ones that share only their first 64 tokens with the start of one: a licence, a header."""

    def fact(self) -> str:
        """As a line, with WARNING before it unless nothing was found."""
        return (
            f"{'WARNING: ' * bool(self.leaked or self.alike)}overlap: {self.leaked:,} of {self.documents:,} validation documents are in "
            f"training, {self.alike:,} more begin as one there ({self.read:,} training documents read)"
        )


def without_ends(tokenizer: Tokenizer, document: np.ndarray) -> np.ndarray:
    """`document` without the control tokens it ends with (EOS of other writers), and without case operators whose word was cut off.

    GolfError for a token that the tokenizer has not.
    """
    check_token_range(document, tokenizer.vocab_size, "text")
    stop, ends = len(document), set(map(tokenizer.processor.piece_to_id, caseops.OPERATORS)) if tokenizer.caseops else set()
    while stop > 1 and (tokenizer.processor.is_control(last := int(document[stop - 1])) or last in ends):
        stop -= 1
    return document[:stop]


def find_overlap(
    train: Iterable[np.ndarray],
    val: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    seconds: float = math.inf,
    skip_below: int = 0,
    inside: bool = False,
) -> Overlap:
    """Compare documents [tokens], each with its BOS.

    seconds: of reading training, at most. skip_below: tokens; shorter documents of validation are not looked for. inside: those of 64
    tokens or more are looked for inside training documents, too.
    """
    begun: dict[bytes, list[tuple[int, np.ndarray]]] = {}
    count = 0
    for count, document in enumerate(val, 1):
        tokens = without_ends(tokenizer, document)[1:]
        if len(tokens) >= skip_below:
            begun.setdefault(tokens[:PREFIX].tobytes(), []).append((count, tokens))
    held_out = [entry for entries in begun.values() for entry in entries]
    windows = _Windows([tokens for _, tokens in held_out] if inside else [])
    leaked, alike, read, block, size = set(), set(), 0, [], 0
    end = time.monotonic() + seconds
    for document in train:
        read += 1
        tokens = without_ends(tokenizer, document)[1:]
        for number, other in begun.get(tokens[:PREFIX].tobytes(), []):
            common = min(len(tokens), len(other))
            differs = np.flatnonzero(tokens[:common] != other[:common])
            common = int(differs[0]) if len(differs) else common
            (leaked if common >= min(len(other) / 2, TRAINED_ON) else alike).add(number)
        block += [document] * inside
        size += inside * len(document)
        if size >= BLOCK:
            windows.look(np.concatenate(block))
            block, size = [], 0
        if time.monotonic() > end:
            break
    windows.look(np.concatenate([*block, np.empty(0, np.uint16)]))
    leaked |= {number for (number, _), found in zip(held_out, windows.found(), strict=False) if found}
    return Overlap(count, read, len(leaked), len(alike - leaked))


class _Windows:
    """Up to 8 windows of 64 tokens of every document, evenly spread, and how often they were met."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        """documents: tokens without BOS."""
        lengths = self.lengths = np.array([len(tokens) for tokens in documents], np.int64)
        self.counts = np.where(lengths < WINDOW, 0, np.minimum(2 * lengths // WINDOW, WINDOWS))
        owners = np.arange(len(documents)).repeat(self.counts)
        number = np.arange(len(owners)) - (self.counts.cumsum() - self.counts)[owners]
        places = (2 * number + 1) * (lengths - WINDOW)[owners] // (2 * self.counts[owners])
        text = np.concatenate([*documents, np.zeros(WINDOW, np.uint16)])
        windows = sliding_window_view(text, WINDOW)[(lengths.cumsum() - lengths)[owners] + places]
        hashes = _hashes(windows)[:, 0]
        _, which, times = np.unique(hashes, return_inverse=True, return_counts=True)
        varied = np.count_nonzero(np.diff(np.sort(windows, axis=1), axis=1), axis=1) >= VARIED - 1
        order = np.argsort(hashes)
        order = order[(varied & (times[which] <= SHARED))[order]]
        self.hashes, self.windows, self.owners = hashes[order], windows[order], owners[order]
        self.met = np.zeros(len(order), np.int64)
        self.table = np.zeros(1 << TABLE_BITS, np.bool_)
        self.table[self.hashes >> (32 - TABLE_BITS)] = True

    def look(self, text: np.ndarray) -> None:
        """Look for the windows at every position of `text` [tokens]."""
        for first in range(0, len(text) - WINDOW + 1, BLOCK):
            part = text[first : first + BLOCK + WINDOW - 1]
            hashes = _hashes(part)
            here = np.flatnonzero(self.table[hashes >> (32 - TABLE_BITS)])
            at = np.searchsorted(self.hashes, hashes[here])
            while len(at):  # windows of one hash lie side by side
                alike = (self.hashes.take(at, mode="clip") == hashes[here]) & (at < len(self.hashes))
                here, at = here[alike], at[alike]
                same = (sliding_window_view(part, WINDOW)[here] == self.windows[at]).all(axis=1)
                self.met += np.bincount(at[same], minlength=len(self.met))
                at = at + 1

    def found(self) -> np.ndarray:
        """Whether more than half of the windows of a document were met, but not often, or all of 512 tokens: bool [documents]."""
        seen, often = (np.bincount(self.owners[self.met > times], minlength=len(self.counts)) for times in (0, SHARED))
        return (2 * (seen - often) > self.counts) | (seen == WINDOWS) & (self.lengths >= TRAINED_ON)


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """uint32 of the 64 tokens from every position on: a polynomial, its length doubled six times. [..., n] -> [..., n - 63]."""
    hashes, factor, width = tokens.astype(np.uint32), FACTOR, 1
    while width < WINDOW:
        hashes = hashes[..., :-width] * np.uint32(factor) + hashes[..., width:]
        factor, width = factor * factor % (1 << 32), 2 * width
    return hashes
