"""Proofs about tokenized text: the tokens are the tokenizer's own, the byte count is the text's, validation is not trained on."""

import math
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from golf_jax.config import GolfError
from golf_jax.data import caseops
from golf_jax.data.manifest import text_bytes
from golf_jax.data.overlap import Overlap, find_overlap, without_ends
from golf_jax.data.shards import Shard, check_holes, check_token_range
from golf_jax.data.sidecar import Sidecar, prove_sidecar
from golf_jax.data.tokenizer import SPACE, Tokenizer, byte_tables, check_tables, split_documents
from golf_jax.progress import Log, Progress

# Private use in three planes, no characters, controls but white space, BS and ESC (of terminals).
NO_TEXT = re.compile("[\x00-\x07\x0e-\x1a\x1c-\x1f\x7f\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff]")
SMALL_LETTERS = 2000  # among which ordinary text has a capital
ENCODE_BATCH = 64
PROVED_TOKENS = 1 << 22  # whose byte count is compared with the decoded text where time is limited
SAMPLED_TOKENS = 1 << 16  # per block of the training shards
OVERHANG = 1 << 14  # so that a document that goes on in the next block is whole
SIDECAR_DOCUMENTS = 500  # whose byte counts are compared with the original text where time is limited
SHORT = 8  # tokens; documents under that may well occur twice
TOLERATED = 0.01  # of documents: a right model may fail on odd Unicode, another of the same size fails on 96 to 100 %


@dataclass(frozen=True)
class Proof:
    """What was found about sound text."""

    facts: list[str]
    val_bytes: int
    """Bytes of validation text, proved document by document against the decoded text."""
    overlap: Overlap | None = None
    """Validation text met in training, where that was looked for."""


def prove_text(
    tokenizer: Tokenizer,
    train: Sequence[np.ndarray | Shard],
    val_tokens: np.ndarray,
    seconds: float = 5.0,
    bos_id: int | None = None,
    overlap: bool = True,
    sidecar: Sidecar | None = None,
    log: Log | None = None,
) -> Proof:
    """Proves that shards [tokens] and `val_tokens` [tokens] are text of `tokenizer`, and that its bytes are counted exactly.

    Reads validation from its start and training at spread places, each for `seconds` at most. `bos_id`: the token that separates
    documents (default: the tokenizer's BOS). `overlap`: look for validation text in training, too. `sidecar`: the byte counts beside
    `val_tokens`, which transformed text needs. GolfError when documents have no start, when tokens are another tokenizer's or no text,
    when markers of a text transform count as text, when unknown characters are lost, when validation text is trained on.
    """
    bos = tokenizer.bos_id if bos_id is None else bos_id
    refuse_markers(tokenizer, sidecar is not None)
    starts = np.flatnonzero(val_tokens == bos)
    if not len(starts) or starts[0]:
        where = "holds none" if not len(starts) else f"starts with token {val_tokens[0]}"
        raise GolfError(
            f"validation text: every document must start with BOS ({bos}), the file {where}; without document starts the "
            "byte count cannot be proved (write the shards again, as `python -m golf_jax.data build` does)"
        )
    check_holes(val_tokens, "validation text")
    pieces = tokenizer.processor
    if unknown := int(np.count_nonzero(val_tokens == pieces.unk_id())):
        falls_back = any(map(pieces.is_byte, range(tokenizer.vocab_size)))
        why = "whose byte pieces write every text without one: not its text" if falls_back else "which has no byte fallback"
        raise GolfError(
            f"tokenizer {tokenizer.name}, {why}: {unknown} unknown tokens in the validation text: their characters are lost, "
            "and the byte count with them"
        )
    facts = []
    if changes := tokenizer.changes():
        facts.append(f"tokenizer changes text: {'; '.join(changes)}")
    samples = {"train": sampled_documents(train, tokenizer.vocab_size, bos, seconds), "val": split_documents(val_tokens, bos)}
    progress = Progress(log, "documents encoded again:")
    for split, documents in samples.items():
        if split == "train" and not train:
            continue
        progress.label = f"{split}: documents encoded again:"
        tried, failed = prove_round_trip(tokenizer, documents, seconds, split, progress)
        if not tried:  # validation has been looked at above
            facts.append(f"WARNING: {_without_documents(train, bos)}")
            continue
        facts.append(f"{split}: {tried - failed:,} of {tried:,} documents tried are encode(decode(document))")
    counted = val_tokens[: PROVED_TOKENS if seconds < math.inf else None]
    if sidecar:
        num_bytes, found = prove_sidecar(tokenizer, val_tokens, sidecar, SIDECAR_DOCUMENTS if seconds < math.inf else len(val_tokens))
        facts.append(found)
    else:
        num_bytes = check_tables(tokenizer, counted, bos_id=bos)
        part = "every document" if len(counted) == len(val_tokens) else f"the first {len(counted):,} tokens"
        facts.append(f"val bytes: {num_bytes:,}, equal to the decoded text of {part}")
    said = (refuse_private_text(tokenizer, counted, bos), "" if sidecar else marker_use(tokenizer, val_tokens))
    facts += filter(None, (*said, repeats(tokenizer, val_tokens, bos)))
    if not num_bytes:
        raise GolfError("validation text: has no bytes, only document starts; give shards with text")
    control = [t for t in range(tokenizer.vocab_size) if tokenizer.processor.is_control(t) and t != bos]
    if others := int(np.count_nonzero(np.isin(val_tokens, control))):
        facts.append(
            f"WARNING: {others:,} control tokens besides BOS in validation (EOS of another writer?): each is scored and counts 0 bytes"
        )
    facts.append(vocabulary_use(tokenizer, val_tokens))
    found = refuse_overlap(train, val_tokens, tokenizer, bos, seconds) if train and overlap else None
    return Proof(facts + ([found.fact()] if found else []), num_bytes, found)


def refuse_markers(tokenizer: Tokenizer, sidecar: bool = False) -> None:
    """GolfError when user-defined pieces are private-use characters: markers of a text transform would be counted as text.

    With a `sidecar` of byte counts the four of CaseOps are what must be there, and without them it belongs to other shards.
    """
    if sidecar and not tokenizer.caseops:
        raise GolfError(
            f"tokenizer {tokenizer.name}: has not the four case operators as pieces, but byte counts of transformed text lie beside the "
            "validation shards (_bytes_): give the tokenizer of these shards"
        )
    if sidecar:
        return
    markers = [
        piece.piece
        for piece in tokenizer.spec.pieces
        if piece.type == piece.USER_DEFINED and any(unicodedata.category(character) == "Co" for character in piece.piece)
    ]
    if markers:
        names = ", ".join(ascii(marker) for marker in markers[:4])
        raise GolfError(
            f"tokenizer {tokenizer.name}: {len(markers)} user-defined private-use pieces ({names}): markers of a text transform "
            "would count as text; such shards need byte counts of the original text beside them (val_bytes_*.bin beside val_*.bin, as "
            "`python -m golf_jax.data build --transform caseops` writes them)"
        )


def refuse_private_text(tokenizer: Tokenizer, tokens: np.ndarray, bos_id: int) -> str:
    """What is to be said of private-use and control characters, which no text has: markers of a transform, whatever kind of piece they are.

    GolfError when they are more than 1 % of the bytes. CaseOps text goes back to what it was first; its sidecar counts what stood there.
    """
    texts = tokenizer.originals(list(split_documents(tokens[:SAMPLED_TOKENS], bos_id)), strict=False)
    found, size = "".join(mark for text in texts for mark in NO_TEXT.findall(text)), sum(len(text.encode()) for text in texts)
    if (part := len(found.encode()) / max(size, 1)) > TOLERATED and not tokenizer.caseops:
        raise GolfError(
            f"validation text: {len(found):,} private-use or control characters, {100 * part:.1f} % of its bytes: markers of a "
            "transform would count as text; build from the original text (`--transform caseops` marks capitals, and counts the original)"
        )
    small = sum(map(str.islower, whole := "".join(texts)))
    if not found and small > SMALL_LETTERS and sum(map(str.isupper, whole)) < small / 1000:
        return f"WARNING: {small:,} small letters of validation and hardly a capital: text whose case was folded, or marked in some way"
    return f"WARNING: {len(found):,} private-use or control characters in {size:,} bytes of validation count as text" if found else ""


def marker_use(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """What is to be said of user-defined pieces (white space aside) in `tokens`: how often they occur, and the bytes they count as.

    Text has few such marks: WARNING where they are more than 1 % of its bytes. GolfError where small letters have no capitals besides,
    which a transform of case has made into marks; other marks cannot be told from text (`<table>`, digits).
    """
    counts = np.bincount(tokens, minlength=tokenizer.vocab_size)
    kind = [(t, p.piece) for t, p in enumerate(tokenizer.spec.pieces) if p.type == p.USER_DEFINED and p.piece.strip(f"{SPACE} \t\r\n")]
    own = sorted(((t, piece) for t, piece in kind if counts[t]), key=lambda one: -counts[one[0]])
    if not own:
        return ""
    marks = int(sum(counts[t] * len(piece.replace(SPACE, " ").encode()) for t, piece in own))
    part = marks / max(text_bytes(byte_tables(tokenizer.processor), tokens), 1)
    names = ", ".join(f"{piece!a} {counts[t]:,} times" for t, piece in own[:4]) + ", ..." * (len(own) > 4)
    what = f"user-defined pieces ({names}) count as {marks:,} bytes of text, {100 * part:.1f} % of validation"
    if part <= TOLERATED:
        return what
    sample = np.array(tokens[:SAMPLED_TOKENS])
    rest = tokenizer.decode(sample[~np.isin(sample, [t for t, _ in own])])
    small = sum(map(str.islower, rest))
    if small > len(rest) / 4 and sum(map(str.isupper, rest)) < TOLERATED / 10 * small and not all(piece.isdigit() for _, piece in own):
        raise GolfError(
            f"tokenizer {tokenizer.name}: {what}, which has no capitals besides: marks of a transform would count as text; build from the "
            "original text (`python -m golf_jax.data build --transform caseops` marks capitals, and counts the original)"
        )
    return f"WARNING: {what}: if they are markers of a text transform, every score is too low"


def repeats(tokenizer: Tokenizer, tokens: np.ndarray, bos_id: int) -> str:
    """How many documents of validation are empty or stand there before, whole; WARNING above 1 %, nothing where none does."""
    documents = [without_ends(tokenizer, document) for document in split_documents(tokens, bos_id)]
    held = [hash(document.tobytes()) for document in documents if len(document) > 1]
    again, empty, of = len(held) - len(set(held)), len(documents) - len(held), len(documents)
    if not again + empty:
        return ""
    doubt = "WARNING: " * (again + empty > TOLERATED * of)
    said = [f"{again:,} of {of:,} documents repeat another one"] * bool(again) + [f"{empty:,} of {of:,} documents are empty"] * bool(empty)
    return f"{doubt}val: {' and '.join(said)}; they are scored all the same"


def prove_round_trip(
    tokenizer: Tokenizer, documents: Iterator[np.ndarray], seconds: float, where: str, progress: Progress
) -> tuple[int, int]:
    """(documents tried, documents whose tokens encode(decode(document)) does not give back); GolfError above 1 %."""
    end = time.monotonic() + seconds
    tried, failures, batch = 0, [], []

    def compare() -> int:
        texts = tokenizer.decode_documents(batch)
        if tokenizer.space_behind:  # encoding puts it there again
            texts = [text.removesuffix(" ") for text in texts]
        if tokenizer.caseops:
            texts = [_transformed_again(text) for text in texts]
        for document, text, tokens in zip(batch, texts, tokenizer.encode_documents(texts), strict=True):
            if not np.array_equal(tokens[1:], document[1:]):
                failures.append((text, tokens[1:], document[1:]))
        return len(batch)

    previous = None
    for document in documents:  # one behind: the stream may stop inside the last
        if previous is not None and not np.any(previous == tokenizer.processor.unk_id()):  # these are refused by themselves
            batch.append(without_ends(tokenizer, previous))
        previous = document
        if len(batch) == ENCODE_BATCH:
            tried, batch = tried + compare(), []
            progress.at(tried)
            if time.monotonic() > end:
                previous = None
                break
    if previous is not None and not tried and not batch:
        batch.append(without_ends(tokenizer, previous))
    tried += compare()
    if len(failures) > TOLERATED * tried:
        text, tokens, document = failures[0]
        at = next((n for n, (a, b) in enumerate(zip(tokens, document, strict=False)) if a != b), min(len(tokens), len(document)))
        broken = sum("\ufffd" in text for text, _, _ in failures)
        reason = (
            f"the tokens are not text ({broken} decode to broken characters): random, damaged, or another tokenizer's"
            if 2 * broken > len(failures)
            else "the shards were made with another tokenizer"
        )
        raise GolfError(
            f"tokenizer {tokenizer.name}: encode(decode(document)) differs for {len(failures)} of {tried} {where} documents: {reason}. "
            f"One decodes to {text[:40]!a}; from its token {at} on it is {document[at : at + 6].tolist()}, and again "
            f"{tokens[at : at + 6].tolist()}"
        )
    return tried, len(failures)


def _transformed_again(text: str) -> str:
    """What CaseOps text is made to after decoding it; empty where it is none, which no document is."""
    try:
        return caseops.encode(caseops.decode(text))
    except GolfError:
        return ""


def _without_documents(train: Sequence[np.ndarray | Shard], bos_id: int) -> str:
    """What is to be said of training text in which no whole document was met. GolfError where none begins, either."""
    if not any(np.any(shard[:SAMPLED_TOKENS] == bos_id) for shard in train):
        raise GolfError(
            f"training text: no document start (BOS {bos_id}) in what was read of it, so its tokens cannot be proved to be text "
            "(write the shards again, as `python -m golf_jax.data build` does)"
        )
    return (
        f"train: no whole document in what was read: none ends within {OVERHANG:,} tokens of a block of {SAMPLED_TOKENS:,}; "
        "nothing is proved about this text"
    )


def sampled_documents(
    shards: Sequence[np.ndarray | Shard], vocab_size: int, bos_id: int, seconds: float = math.inf
) -> Iterator[np.ndarray]:
    """Whole documents, each at most once: blocks of 65,536 tokens of all shards in an order that spreads over them at once.

    seconds: of reading, at most, also where no document ends. GolfError, with the shard, for holes and for what is no token.
    """
    end = time.monotonic() + seconds
    blocks = [(shard, start) for shard in shards for start in range(0, len(shard), SAMPLED_TOKENS)]
    step = next(n for n in range(max(int(len(blocks) * 0.618), 1), len(blocks) + 2) if math.gcd(n, len(blocks)) == 1)
    for number in range(len(blocks)):
        if number and time.monotonic() > end:
            return
        shard, start = blocks[number * step % len(blocks)]
        tokens = shard[start : start + SAMPLED_TOKENS + OVERHANG]
        where = getattr(shard, "path", "training text")
        check_holes(tokens[:SAMPLED_TOKENS], where, start)
        check_token_range(tokens, vocab_size, where)
        bounds = [*np.flatnonzero(tokens == bos_id).tolist(), *([len(tokens)] if start + len(tokens) == len(shard) else [])]
        for first, stop in zip(bounds, bounds[1:], strict=False):
            if first < SAMPLED_TOKENS:
                yield tokens[first:stop]


def vocabulary_use(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """How much of the vocabulary occurs in `tokens`; WARNING when most of its pieces (bytes aside) never do in a text long enough."""
    counts, one = np.bincount(tokens, minlength=tokenizer.vocab_size), tokenizer.processor
    pieces = [t for t in range(tokenizer.vocab_size) if not (one.is_byte(t) or one.is_control(t) or one.is_unknown(t) or one.is_unused(t))]
    doubt = bool(np.count_nonzero(counts[pieces]) < len(pieces) / 2) and len(tokens) > 32 * tokenizer.vocab_size
    note = ": most pieces never occur, is this the tokenizer of these shards?" if doubt else ""
    used = f"{np.count_nonzero(counts):,} of {tokenizer.vocab_size:,} pieces occur in validation"
    return f"{'WARNING: ' * doubt}vocabulary: {used}{note}"


def refuse_overlap(
    train: Sequence[np.ndarray | Shard], val_tokens: np.ndarray, tokenizer: Tokenizer, bos_id: int, seconds: float = 2.0
) -> Overlap:
    """The quick form, over what of training is read in time; GolfError when more than 1 % of validation is in it."""
    train_documents, held_out = sampled_documents(train, tokenizer.vocab_size, bos_id, seconds), split_documents(val_tokens, bos_id)
    found = find_overlap(train_documents, held_out, tokenizer, seconds, SHORT)
    if found.leaked > TOLERATED * found.documents:
        raise GolfError(
            f"{found.leaked} of {found.documents} validation documents are training documents, whole or in part (of {found.read:,} read): "
            "the score would be of text that was trained on; see `python -m golf_jax.data verify`"
        )
    return found
