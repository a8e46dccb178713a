"""Byte sidecars: original UTF-8 bytes of every validation token, for text that was transformed before it was tokenized.

Shards of the tokens' format, one uint16 per token and 0 at BOS, beside the tokens: `val_000000.bin` has `val_bytes_000000.bin`
(docs/recipes/pr2135_model_training.md, section 2.3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golf_jax.config import GolfError
from golf_jax.data import caseops
from golf_jax.data.shards import find_shards, open_shard
from golf_jax.data.tokenizer import SPACE, Tokenizer, split_documents

TOLERATED = 0.01  # relative error of the total where the tokenizer itself changes text


@dataclass(frozen=True)
class Sidecar:
    """Bytes of the original text that each token of a stream stands for."""

    counts: np.ndarray
    """uint16 [tokens]"""

    def of_targets(self, tokens: np.ndarray, position: np.ndarray | slice) -> np.ndarray:
        """Bytes of the targets that follow `position`, int32, as `ByteTables.of_targets` has it; `tokens` begin where it does."""
        return self.counts[1 : len(tokens)][position].astype(np.int32)


def beside(shard: Path) -> Path:
    """Where the byte counts of a shard are: `val_000000.bin` -> `val_bytes_000000.bin`."""
    name, _, number = shard.name.rpartition("_")
    return shard.with_name(f"{name}_bytes_{number}")


def find_sidecars(pattern: str | Path) -> list[Path]:
    """The sidecars of the token shards of a glob; empty where there is none. GolfError when only some have one, or lengths differ."""
    shards = find_shards(pattern)
    found = [path for path in map(beside, shards) if path.is_file()]
    if found and len(found) < len(shards):
        lacking = next(shard for shard in shards if not beside(shard).is_file())
        raise GolfError(f"{lacking}: has no byte counts beside it ({beside(lacking).name}), other shards of {pattern} have; fetch them all")
    for shard, path in zip(shards, found, strict=False):
        if len(open_shard(path)) != (count := len(open_shard(shard))):
            raise GolfError(
                f"{path}: {len(open_shard(path))} byte counts for the {count} tokens of {shard.name}; fetch or build both again"
            )
    return found


def load_sidecar(pattern: str | Path) -> Sidecar | None:
    """The byte counts beside the token shards of a glob, in memory; None where there are none."""
    found = find_sidecars(pattern)
    return Sidecar(np.concatenate([open_shard(path)[:] for path in found])) if found else None


def encode_counted(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """CaseOps text of every document as (tokens with BOS, original bytes of each), uint16 [n] and int64 [n].

    A U+2581 counts as the space of one byte that SentencePiece takes it for, as in text without a transform.
    """
    for text in texts:
        ids, surfaces = tokenizer.encode_surfaces(caseops.encode(text.replace(SPACE, " ")))
        counts = np.fromiter(caseops.original_bytes(surfaces), np.int64, len(ids))
        yield np.array([tokenizer.bos_id, *ids], np.uint16), np.append(0, counts)


def prove_sidecar(tokenizer: Tokenizer, tokens: np.ndarray, sidecar: Sidecar, documents: int = 2000) -> tuple[int, str]:
    """(bytes of the first `documents` documents of `tokens` [n], what was found): the counts are those of their original text.

    Each document's tokens go back to text, through the transform and forth again. GolfError when BOS or an operator counts as text, when
    a count differs from that of the text, or, with a tokenizer that changes text itself, when the total is off by more than 1 %.
    """
    operators = [tokenizer.processor.piece_to_id(operator) for operator in caseops.OPERATORS]
    counting = np.isin(tokens, [tokenizer.bos_id, *operators]) & (sidecar.counts > 0)
    escaped = np.append(False, (tokens[:-1] == operators[3]) & (sidecar.counts[:-1] == 0)) & (tokens != tokenizer.bos_id)
    if wrong := np.count_nonzero(counting & ~escaped):
        raise GolfError(f"byte sidecar of tokenizer {tokenizer.name}: {wrong} document starts or case operators count as text")
    exact, total, expected, tried, at = not tokenizer.changes(), 0, 0, 0, 0
    for ids in split_documents(tokens, tokenizer.bos_id):
        given, at = sidecar.counts[at : at + len(ids)], at + len(ids)
        if at == len(tokens) and tried:  # the stream may stop inside the last
            break
        text = tokenizer.original(ids, strict=exact)  # a tokenizer that normalises may turn "a" and its accent into one letter
        again, counts = next(encode_counted(tokenizer, [text]))
        if exact and not np.array_equal(counts, given) and np.array_equal(again, ids):
            raise GolfError(
                f"byte sidecar of tokenizer {tokenizer.name}: counts {int(given.sum())} bytes for document {tried}, its text has "
                f"{len(text.encode())}: {text[:60]!r}"
            )
        total, expected, tried = total + int(given.sum()), expected + len(text.encode()), tried + 1
        if tried == documents:
            break
    if abs(total - expected) > TOLERATED * expected:
        raise GolfError(
            f"byte sidecar of tokenizer {tokenizer.name}: counts {total:,} bytes for {tried} documents, their text has {expected:,}: it is "
            "not that of these shards"
        )
    how = "equal to" if total == expected else f"{total - expected:+,} against"
    return total, f"val bytes: {total:,} by the sidecar, {how} the original text of {tried:,} documents"
