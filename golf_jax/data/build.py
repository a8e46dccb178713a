"""Text in, training data out: tokenizer, shards and manifest in one directory that appears complete or not at all."""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from golf_jax.config import GolfError
from golf_jax.data import caseops
from golf_jax.data.documents import find_files, read_documents
from golf_jax.data.manifest import COUNTS, NAME, file_entry, read_manifest, write_manifest
from golf_jax.data.proof import marker_use, refuse_markers, refuse_private_text
from golf_jax.data.shards import find_hole, load_val_tokens, open_shard, write_shard
from golf_jax.data.sidecar import Sidecar, beside, encode_counted, prove_sidecar
from golf_jax.data.tokenizer import SPACE, ByteTables, Tokenizer, byte_tables, check_tables, count_bytes, train_bpe
from golf_jax.files import folder_beside, write_atomic
from golf_jax.progress import Log, Progress

TOKENIZER_SAMPLE = 100_000_000  # characters of training text the tokenizer learns from; more changes little and takes long
SHARD_TOKENS = 100_000_000  # the official export's
SMALLEST = 261  # pieces: 256 bytes, 4 of control, and one
ENCODE_BATCH = 512
SHOWN = 20  # files named one by one
TRANSFORMS = ("", "caseops")


def is_validation(text: str, val_every: int) -> bool:
    """The split rule: one document in `val_every`, by the SHA-256 of its text, wherever it stands and however often."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % val_every == 0


class _SplitWriter:
    """Collects the documents of one split and writes a shard whenever enough tokens came together; `sidecar`: their byte counts, too."""

    def __init__(self, directory: Path, split: str, shard_tokens: int, sidecar: bool) -> None:
        self.directory, self.split, self.shard_tokens, self.sidecar = directory, split, shard_tokens, sidecar
        self.buffer: list[np.ndarray] = []  # rows: tokens, bytes of each
        self.buffered = self.documents = self.bytes = 0
        self.files: list[dict[str, Any]] = []
        self.sidecars: list[dict[str, Any]] = []

    def add(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        self.buffer.append(np.stack([tokens, counts]))
        self.buffered, self.documents, self.bytes = self.buffered + len(tokens), self.documents + 1, self.bytes + int(counts.sum())
        while self.buffered >= self.shard_tokens:
            self._write(self.shard_tokens)

    def _write(self, count: int) -> None:
        rows = np.concatenate(self.buffer, axis=1)
        path = self.directory / f"{self.split}_{len(self.files):06d}.bin"
        if found := find_hole(rows[0, :count]):  # whoever reads it would take it for a file that was not written whole
            raise GolfError(
                f"data build: {path.name}: {found}, which is no text; leave out the document that repeats one character so often"
            )
        self.files.append(file_entry(write_shard(path, rows[0, :count]), count))
        if self.sidecar:
            self.sidecars.append(file_entry(write_shard(beside(path), rows[1, :count]), count))
        self.buffer, self.buffered = [rows[:, count:]], rows.shape[1] - count

    def finish(self) -> dict[str, Any]:
        if self.buffered:
            self._write(self.buffered)
        tokens = sum(file["tokens"] for file in self.files)
        facts = {"documents": self.documents, "tokens": tokens, "bytes": self.bytes, "files": self.files}
        return facts | ({"sidecars": self.sidecars} if self.sidecar else {})


def build_documents(
    documents: Callable[[], Iterable[str]],
    directory: str | Path,
    *,
    source: str,
    vocab_size: int = 1024,
    tokenizer: str | Path | None = None,
    val_every: int = 10,
    shard_tokens: int = SHARD_TOKENS,
    transform: str = "",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes tokenizer.model, train_*.bin, val_*.bin and manifest.json for `documents` (read twice); returns the manifest.

    The tokenizer learns from training documents only. A document whose tokens came before is dropped, so none can be in both
    splits. transform `caseops`: text is CaseOps text, its operators pieces of the tokenizer, and bytes of the original text go into
    val_bytes_*.bin. GolfError when `directory` exists, when a split stays empty, when the byte counts disagree with the text.
    """
    if transform not in TRANSFORMS:
        raise GolfError(f"data build: transform {transform!r} is unknown; there is {', '.join(filter(None, TRANSFORMS))}")
    directory = Path(directory)
    if os.path.lexists(directory):  # also a link to nothing, which the finished folder could not replace
        raise GolfError(f"{directory}: exists already; remove it or name another directory")
    if tokenizer is None and not SMALLEST <= vocab_size <= 1 << 16:
        raise GolfError(f"data build: vocab_size={vocab_size} must lie between {SMALLEST} (bytes and control pieces) and 65,536")
    if val_every < 2 or shard_tokens < 2:
        raise GolfError(f"data build: val_every={val_every} and shard_tokens={shard_tokens} must be at least 2")
    try:
        with folder_beside(directory) as temporary:
            if tokenizer is None:
                log(f"training a tokenizer of {vocab_size} pieces")
                training = _first_characters((text for text in documents() if not is_validation(text, val_every)), TOKENIZER_SAMPLE)
                model = (
                    train_bpe(map(caseops.encode, training), vocab_size, caseops.OPERATORS)
                    if transform
                    else train_bpe(training, vocab_size)
                )
            else:
                model = Tokenizer(tokenizer).model
            name = str(tokenizer or "tokenizer.model")
            if bool(transform) != (opened := Tokenizer(model, name)).caseops:
                why = "text of a tokenizer with case operators is CaseOps text: give --transform caseops"
                raise GolfError(f"tokenizer {name}: {'has not the four case operators as user-defined pieces' if transform else why}")
            manifest = {
                "source": source,
                "split": f"validation: first 8 bytes of SHA-256(text), big-endian, mod {val_every} == 0; repeated documents dropped",
                **({"transform": transform} if transform else {}),
                **_write_splits(documents(), temporary, opened, val_every, shard_tokens, log),
            }
            write_manifest(temporary, manifest)
            temporary.chmod(0o755)
            os.rename(temporary, directory)
    except OSError as error:
        raise GolfError(f"{directory}: cannot be written ({error.strerror})") from error
    text = manifest["text"]
    log(
        "text: {documents:,} documents, {bytes:,} bytes; left out: {repeated:,} repeated, {blank:,} blank, {left_out_bytes:,} bytes".format(
            **text
        )
    )
    kept, counted = text["bytes"] - text["left_out_bytes"], sum(manifest[split]["bytes"] for split in ("train", "val"))
    lossy = f" (with this tokenizer {'; '.join(text['changes'])})" if text["changes"] else ""
    changed = f"{text['changed']:,} documents{lossy}" if text["changed"] else "nothing"
    log(f"counted: {counted:,} of {kept:,} bytes; changed: {changed}")
    for split in ("train", "val"):
        log("{}: {documents:,} documents, {tokens:,} tokens, {bytes:,} bytes".format(split, **manifest[split]))
    return read_manifest(directory / NAME)


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text
        if (limit := limit - len(text)) <= 0:
            return


def _write_splits(
    documents: Iterable[str], directory: Path, tokenizer: Tokenizer, val_every: int, shard_tokens: int, log: Log
) -> dict[str, Any]:
    write_atomic(directory / "tokenizer.model", tokenizer.model)
    refuse_markers(tokenizer, tokenizer.caseops)
    tables, exact = byte_tables(tokenizer.processor), tokenizer.caseops and not tokenizer.changes()
    writers = {split: _SplitWriter(directory, split, shard_tokens, tokenizer.caseops and split == "val") for split in ("train", "val")}
    seen: set[bytes] = set()
    text_facts = Counter[str]()
    texts, progress = iter(documents), Progress(log, "documents encoded:")
    while batch := list(itertools.islice(texts, ENCODE_BATCH)):
        progress.at(text_facts["documents"])
        for text, (tokens, counts) in zip(batch, _encode(tokenizer, tables, batch), strict=True):
            size, plain = len(text.encode()), caseops.encode(text) if tokenizer.caseops else text
            text_facts.update(documents=1, bytes=size, blocks=text.count(SPACE))
            words = " ".join(text.split())
            digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
            if not words or len(tokens) < 2 or digest in seen:
                text_facts.update({"repeated" if words else "blank": 1, "left_out_bytes": size})
                continue
            if np.any(tokens == (unknown := tokenizer.processor.unk_id())):
                parts = zip(*tokenizer.encode_surfaces(plain), strict=True)
                lost = next(surface for token, surface in parts if token == unknown)
                raise GolfError(
                    f"tokenizer {tokenizer.name}: characters of document {text_facts['documents'] - 1} are unknown to it and would be lost "
                    f"(it has no byte fallback): {lost!a}"
                )
            if exact and counts.sum() != (kept := len(text.replace(SPACE, " ").encode())):
                raise GolfError(f"tokenizer {tokenizer.name}: counts {counts.sum()} bytes for a text of {kept}: {text[:40]!a}")
            text_facts["changed"] += tokenizer.decode(tokens) != plain
            seen.add(digest)
            writers["val" if is_validation(text, val_every) else "train"].add(tokens, counts)
    splits = {split: writer.finish() for split, writer in writers.items()}
    for split, entry in splits.items():
        if not entry["documents"]:
            raise GolfError(f"data build: {len(seen)} documents leave none for {split}; give more text or another --val-every")
    val_tokens = load_val_tokens(directory / "val_*.bin")
    if tokenizer.caseops:
        counts = np.concatenate([open_shard(directory / entry["name"])[:] for entry in splits["val"]["sidecars"]])
        prove_sidecar(tokenizer, val_tokens, Sidecar(counts))
    else:
        check_tables(tokenizer, val_tokens, tables)
        for said in filter(None, (refuse_private_text(tokenizer, val_tokens, tokenizer.bos_id), marker_use(tokenizer, val_tokens))):
            log(said)
    identity = {"file": "tokenizer.model", "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    counts = {name: text_facts[name] for name in COUNTS}
    blocks = [f"{text_facts['blocks']:,} characters U+2581 become spaces"] if text_facts["blocks"] else []
    return {"tokenizer": identity, "text": {**counts, "changes": tokenizer.changes() + blocks}, **splits}


def _encode(tokenizer: Tokenizer, tables: ByteTables, texts: Sequence[str]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(tokens with BOS, bytes of each) of every text."""
    if tokenizer.caseops:
        return encode_counted(tokenizer, texts)
    encoded = tokenizer.encode_documents(texts)
    return ((tokens, np.append(0, count_bytes(tables, tokens[:-1], tokens[1:]))) for tokens in encoded)


def build(
    inputs: Sequence[str | Path],
    directory: str | Path,
    *,
    field: str = "text",
    pattern: str = "",
    log: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, Any]:
    """`build_documents` (see there for `options`) on text files, JSON lines or directories of them, see `find_files`."""
    files, skipped = find_files(inputs, pattern)
    if skipped:
        more = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        log(f"skipped {len(skipped)} files: {', '.join(map(str, skipped[:SHOWN]))}{more}")
    source, counts = ", ".join(str(path) for path in inputs), Counter[Path]()

    def documents() -> Iterator[str]:
        counts.clear()  # read twice
        return read_documents(files, field, counts)

    try:
        return build_documents(documents, directory, source=source, log=log, **options)
    finally:
        for path in files[:SHOWN]:
            if counts:
                log(f"{path}: {counts[path]:,} documents")
