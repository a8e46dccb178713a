"""SentencePiece tokenizers and the challenge's byte tables: how many UTF-8 bytes of text a token stands for.

Every bits-per-byte score divides by these counts, and most withdrawn records had them wrong: byte-fallback pieces counted as the
three bytes of `<0x..>` (PR 1143, 1184), the leading space counted twice (issue 1719), a vocabulary without a lone U+2581 piece
(issue 897), control tokens counted as text. `check_tables` makes each of these an error.
"""

import contextlib
import hashlib
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from golf_jax.config import GolfError
from golf_jax.data import caseops
from golf_jax.files import read_bytes

SPACE = "\u2581"  # SentencePiece writes a space as LOWER ONE EIGHTH BLOCK
LETTERS = [c for c in map(chr, (*range(0x21, 0x250), *range(0x370, 0x600))) if c.isprintable()]  # tried for what becomes of them
MAX_BYTES = 1 << 26
TRAINER_CHARACTERS = 2**14  # per sentence: the trainer drops sentences of more than 2**16 bytes


class Tokenizer:
    """A SentencePiece model, from its path or its bytes."""

    def __init__(self, model: str | Path | bytes, name: str = "<bytes>") -> None:
        self.name = name if isinstance(model, bytes) else str(model)
        try:
            self.model = model if isinstance(model, bytes) else read_bytes(model, MAX_BYTES)
        except GolfError as error:
            raise GolfError(f"tokenizer {error}") from None
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(self.model)
            self.pieces = [self.processor.id_to_piece(token) for token in range(self.processor.vocab_size())]
            self.spec = sentencepiece_model_pb2.ModelProto.FromString(self.model)  # pyright: ignore[reportAttributeAccessIssue]
        except (RuntimeError, TypeError, ValueError, IndexError, DecodeError) as error:
            raise GolfError(f"tokenizer {self.name}: not a SentencePiece model") from error
        if not self.model or self.processor.vocab_size() > 2**16:
            raise GolfError(f"tokenizer {self.name}: empty, or more than 65,536 pieces (shards hold uint16 tokens)")

    @property
    def vocab_size(self) -> int:
        return self.processor.vocab_size()

    @property
    def bos_id(self) -> int:
        """Token before every document. GolfError when the model has none."""
        if (token := self.processor.bos_id()) < 0:
            raise GolfError(f"tokenizer {self.name}: has no BOS piece; shards need one before each document")
        return token

    @property
    def sha256(self) -> str:
        """Hex digest of the model's bytes: the identity that manifests and runs record."""
        return hashlib.sha256(self.model).hexdigest()

    @cached_property
    def caseops(self) -> bool:
        """Whether its text is CaseOps text: the four operators are pieces that no other text gives."""
        return {p.piece for p in self.spec.pieces if p.type == p.USER_DEFINED}.issuperset(caseops.OPERATORS)

    @property
    def space_behind(self) -> bool:
        """Whether encoding puts a space behind every text, which decoding leaves there."""
        return self.spec.trainer_spec.treat_whitespace_as_suffix and self.spec.normalizer_spec.add_dummy_prefix

    def encode(self, text: str) -> list[int]:
        """Tokens of a text as it is read and written by people: with `caseops` it is transformed first. GolfError for what is none."""
        if found := re.search("[\ud800-\udfff]", text):
            raise GolfError(f"text: its character {found.start()} is half a surrogate pair; is it UTF-8?")
        return self.processor.encode(caseops.encode(text) if self.caseops else text)

    def original(self, ids: Sequence[int] | np.ndarray, strict: bool = True) -> str:
        """The text of `ids` before any transform. GolfError where it is none, unless not `strict` (what a model writes may be anything)."""
        return self.originals([ids], strict)[0]

    def originals(self, documents: Sequence[Sequence[int] | np.ndarray], strict: bool = True) -> list[str]:
        """`original` of each."""
        texts = self.decode_documents(documents)
        return [caseops.decode(text, strict) for text in texts] if self.caseops else texts

    def encode_surfaces(self, text: str) -> tuple[list[int], list[str]]:
        """Tokens of a (transformed) text, and the part of it that each stands for, as it was before SentencePiece normalised it."""
        call = getattr(self.processor, "encode_as_immutable_proto", None) or self.processor.encode_as_proto
        with self._sound("encode"):
            pieces = call(text).pieces
        return [piece.id for piece in pieces], [piece.surface for piece in pieces]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint16 array per (transformed) text: BOS, then its tokens."""
        encoded = self.processor.encode(list(texts))
        return [np.array([self.bos_id, *ids], dtype=np.uint16) for ids in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """(Transformed) text of `ids`. GolfError where the model's own pieces make no text."""
        return self.decode_documents([ids])[0]

    def decode_documents(self, documents: Sequence[Sequence[int] | np.ndarray]) -> list[str]:
        """`decode` of each, in one call: between calls a thread that traces a program takes the interpreter for milliseconds."""
        with self._sound("decode its own tokens"):
            return self.processor.decode([np.asarray(ids).tolist() for ids in documents]) if len(documents) else []

    def changes(self) -> list[str]:
        """What encoding does not keep of a text, found by trying: line ends, runs of spaces, case, compatibility forms, other letters."""
        probes = {
            "line ends become spaces": ("a\nb", "a b"),
            "runs of spaces become one, those at the ends none": ("a  b", "a b"),
            "case is folded": ("aBC", "abc"),
            "compatibility forms are replaced (NFKC)": ("\ufb01", "fi"),
        }
        found = [name for name, (text, lost) in probes.items() if self._normal(text) == lost]
        if others := [c for c in LETTERS if self._normal(c) not in _known_forms(c, folded="case is folded" in found)]:
            found.append(f"{len(others)} other characters are replaced ({others[0]!a} by {self._normal(others[0])!a})")
        if self.space_behind:
            found.append("a space is put behind every document and counts 1 byte")
        return found

    def _normal(self, text: str) -> str:
        with self._sound("normalize"):
            return self.processor.normalize(text).replace(SPACE, " ").strip(" ")

    @contextlib.contextmanager
    def _sound(self, what: str) -> Iterator[None]:
        """GolfError where SentencePiece fails on what it has opened: damaged pieces, a normalizer whose replacements are no UTF-8."""
        try:
            yield
        except (RuntimeError, ValueError, IndexError) as error:
            raise GolfError(f"tokenizer {self.name}: cannot {what} ({str(error)[:80]}): a damaged model") from error


def _known_forms(character: str, folded: bool) -> set[str]:
    """What `character` may become by compatibility forms and, where that is told, by folding case."""
    plain = unicodedata.normalize("NFKC", character)
    cases = {character.casefold(), unicodedata.normalize("NFKC", plain.casefold())} if folded else set()
    return {form.strip(" ") for form in {character, plain} | cases}


@dataclass(frozen=True)
class ByteTables:
    """Per token id: bytes of its text without a leading space, whether it has one, whether it bounds text. V entries each."""

    base_bytes: np.ndarray  # int16 [V]
    has_leading_space: np.ndarray  # bool [V]
    is_boundary: np.ndarray  # bool [V]

    def of_targets(self, tokens: np.ndarray, position: np.ndarray | slice) -> np.ndarray:
        """Bytes of text of the targets that follow `position` in `tokens` [n], int32."""
        return count_bytes(self, tokens[:-1][position], tokens[1:][position])


def byte_tables(processor: sentencepiece.SentencePieceProcessor) -> ByteTables:
    """The challenge's tables for a SentencePiece model.

    Control, unknown and unused pieces: 0 bytes and a boundary. Byte pieces: 1 byte. Others: one leading U+2581 is the leading space,
    every further one stands for a space of 1 byte, the rest counts its UTF-8 bytes. Where decoding keeps the space that a document
    starts with (neither a dummy prefix nor extra white space is taken off), no leading space depends on the token before.
    """
    proto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
    spec = proto.FromString(processor.serialized_model_proto()).normalizer_spec
    strips = spec.add_dummy_prefix or spec.remove_extra_whitespaces
    size = processor.vocab_size()
    tables = ByteTables(np.zeros(size, np.int16), np.zeros(size, bool), np.zeros(size, bool))
    for token in range(size):
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            tables.is_boundary[token] = True
        elif processor.is_byte(token):
            tables.base_bytes[token] = 1
        else:
            piece = processor.id_to_piece(token)
            tables.has_leading_space[token] = strips and piece.startswith(SPACE)
            tables.base_bytes[token] = len(piece.replace(SPACE, " ").encode()) - tables.has_leading_space[token]
    return tables


def count_bytes(tables: ByteTables, previous: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Bytes of text of each target, given the token before it: int32, shaped like `targets`.

    A leading space counts unless the token before is a boundary: at the start of a document decoding drops it.
    """
    space = tables.has_leading_space[targets] & ~tables.is_boundary[previous]
    return tables.base_bytes[targets].astype(np.int32) + space


def split_documents(tokens: np.ndarray, bos_id: int) -> Iterator[np.ndarray]:
    """Views of the documents in `tokens` [n], each with its BOS; what precedes the first BOS comes first, without one."""
    starts = np.flatnonzero(tokens == bos_id)
    bounds = [*([] if starts.size and starts[0] == 0 else [0]), *starts.tolist(), len(tokens)]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        yield tokens[start:stop]


def check_tables(tokenizer: Tokenizer, tokens: np.ndarray, tables: ByteTables | None = None, bos_id: int | None = None) -> int:
    """Proves the byte count of `tokens` [n] document by document against the decoded text; returns the bytes in total.

    GolfError names the first document where the tables (those of `byte_tables` by default) disagree with
    `len(decode(ids).encode())`. Tokens before the first BOS and a character cut off at the very end are left out.
    """
    processor = tokenizer.processor
    tables = tables or byte_tables(processor)
    if processor.piece_to_id(SPACE) == processor.unk_id():
        raise GolfError(
            f"tokenizer {tokenizer.name}: no piece for a lone space (U+2581); it would become three byte pieces and "
            "count as 3 bytes instead of 1"
        )
    total = 0
    bos = tokenizer.bos_id if bos_id is None else bos_id
    documents = list(split_documents(tokens, bos))
    if len(tokens) and tokens[0] != bos:
        documents.pop(0)
    if documents:
        documents[-1] = _without_cut_character(processor, documents[-1])
    for number, (ids, text) in enumerate(zip(documents, tokenizer.decode_documents(documents), strict=True)):
        counted = int(count_bytes(tables, ids[:-1], ids[1:]).sum())
        if counted != (actual := len(text.encode())):
            if "\ufffd" in text:
                raise GolfError(
                    f"tokenizer {tokenizer.name}: the tokens of document {number} are not text, they decode to broken characters "
                    f"({text[-60:]!a}): random, damaged, or another tokenizer's"
                )
            raise GolfError(
                f"tokenizer {tokenizer.name}: byte tables count {counted} bytes for document {number}, its text has {actual}: {text[:60]!r}"
            )
        total += counted
    return total


def _without_cut_character(processor: sentencepiece.SentencePieceProcessor, ids: np.ndarray) -> np.ndarray:
    """Drops the byte pieces at the end if they stop inside a character (the stream was cut there)."""
    tail = len(ids)
    while tail and processor.is_byte(int(ids[tail - 1])):
        tail -= 1
    raw = bytes(int(processor.id_to_piece(int(token))[3:5], 16) for token in ids[tail:])
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return ids[: tail + error.start] if error.reason == "unexpected end of data" else ids
    return ids


def train_bpe(texts: Iterable[str], vocab_size: int, markers: str = "") -> bytes:
    """Trains a BPE model that keeps text byte for byte and returns its bytes; deterministic.

    markers: characters that become pieces of their own, never merged with neighbours, ids 4, 5, ...

    As the challenge's own models: byte fallback, split digits, no dummy prefix, 0 pad, 1 bos, 2 eos, 3 unk. Unlike them: no
    normalization, all white space kept, line ends and indentation may be pieces (a U+2581 in the text alone becomes a space).
    GolfError when the text is too little for `vocab_size` pieces.
    """
    met: list[GolfError] = []

    def parts() -> Iterator[str]:
        try:
            for text in texts:
                yield from (text[start : start + TRAINER_CHARACTERS] for start in range(0, len(text), TRAINER_CHARACTERS))
        except GolfError as error:  # of reading the text; the trainer would pass it on with a stack
            met.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=parts(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            required_chars=SPACE,  # also of text without spaces (Chinese): later text may have one
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            hard_vocab_limit=False,
            max_sentence_length=2**16,
            num_threads=1,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(markers),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        if met:
            raise met[0] from None
        reason = str(error).rpartition("] ")[2].strip()  # behind the trainer's source line and condition
        if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
            reason = f"the text has so many characters that it needs at least {least[1]} pieces; ask for more (--vocab-size)"
        nothing = "too little text to train on (documents are split into training and validation first)"
        raise GolfError(f"tokenizer: training at vocab_size={vocab_size} failed: {reason or nothing}") from error
    tokenizer = Tokenizer(model.getvalue())
    if tokenizer.vocab_size != vocab_size:
        raise GolfError(f"tokenizer: the text yields {tokenizer.vocab_size} pieces, not vocab_size={vocab_size}; ask for fewer")
    return tokenizer.model
