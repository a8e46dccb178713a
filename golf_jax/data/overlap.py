"""Is validation text trained on? Documents are compared from their start on, without the control tokens that they end with."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from golf_jax.data import caseops
from golf_jax.data.shards import check_token_range
from golf_jax.data.tokenizer import Tokenizer

PREFIX = 64  # tokens after BOS; documents that agree in them begin alike
TRAINED_ON = 512  # so many tokens from the start on are more than a common header, whatever follows


@dataclass(frozen=True)
class Overlap:
    """What validation and training have in common."""

    documents: int
    """Of validation."""
    read: int
    """Documents of training that were compared."""
    leaked: int
    """Validation documents of which at least half, or 512 tokens, begin one of these."""
    alike: int
    """Further ones that share only their first 64 tokens with one: a licence, a header."""

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
    train: Iterable[np.ndarray], val: Iterable[np.ndarray], tokenizer: Tokenizer, seconds: float = math.inf, skip_below: int = 0
) -> Overlap:
    """Compare documents [tokens], each with its BOS.

    seconds: of reading training, at most. skip_below: tokens; shorter documents of validation are not looked for.
    """
    end = time.monotonic() + seconds
    begun: dict[bytes, list[tuple[int, np.ndarray]]] = {}
    count = 0
    for count, document in enumerate(val, 1):
        tokens = without_ends(tokenizer, document)[1:]
        if len(tokens) >= skip_below:
            begun.setdefault(tokens[:PREFIX].tobytes(), []).append((count, tokens))
    leaked, alike, read = set(), set(), 0
    for document in train:
        read += 1
        tokens = without_ends(tokenizer, document)[1:]
        for number, held_out in begun.get(tokens[:PREFIX].tobytes(), []):
            common = min(len(tokens), len(held_out))
            differs = np.flatnonzero(tokens[:common] != held_out[:common])
            common = int(differs[0]) if len(differs) else common
            (leaked if common >= min(len(held_out) / 2, TRAINED_ON) else alike).add(number)
        if time.monotonic() > end:
            break
    return Overlap(count, read, len(leaked), len(alike - leaked))
