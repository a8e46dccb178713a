"""Tokenized text as a value: the one place where shards, tokenizer and model are fitted to each other."""

import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np

from golf_jax.config import GolfError
from golf_jax.data.identity import identify
from golf_jax.data.overlap import Overlap
from golf_jax.data.proof import prove_text
from golf_jax.data.shards import find_shards, load_val_tokens, open_shard
from golf_jax.data.sidecar import Sidecar, find_sidecars, load_sidecar
from golf_jax.data.tokenizer import ByteTables, Tokenizer, byte_tables
from golf_jax.processes import cache_directory

SECONDS = 2.0  # for each of the proofs that can be done on samples


@dataclass(frozen=True)
class Text:
    """Tokenized text, ready to use."""

    train: str
    """Glob of the training shards; empty where there are none."""
    val: str
    """Glob of the validation shards."""
    val_tokens: np.ndarray
    """uint16 [tokens]"""
    tokenizer: Tokenizer
    tables: ByteTables | Sidecar
    """How bytes of the original text are counted: by pieces, or where the text was transformed by what lies beside the shards."""
    val_bytes: int
    """Bytes of validation text whose count was proved against the original text."""
    facts: tuple[str, ...] = ()
    """What was proved, for log and result; what begins with WARNING is doubtful."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What makes it this text and no other, as JSON data (`golf_jax.data.identity`)."""
    overlap: Overlap | None = None
    """Validation text met where training was read."""


def embedded() -> Any:
    """`golf_jax.data.corpus`, by name: it ships with the recipes that train on it alone."""
    return import_module("golf_jax.data.corpus")


def open_text(train: str, val: str, tokenizer: str, vocab_size: int, seq_len: int, *, sha256: str = "") -> Text:
    """Open shards and tokenizer and check that they fit the model and each other.

    train: glob of training shards, empty for scoring alone, or `embedded`: all three from the corpus that every Python carries. val: glob.
    tokenizer: SentencePiece model. sha256: hex digest that the tokenizer must have, empty for any. What is wrong with the text is told
    here (`golf_jax.data.proof`). Raises GolfError.
    """
    if train == "embedded":
        directory = Path(embedded().build_embedded(cache_directory(), vocab_size)["directory"])
        train, val, tokenizer = (str(directory / n) for n in ("train_*.bin", "val_*.bin", "tokenizer.model"))
    if not Path(tokenizer).is_file():
        raise GolfError(f"tokenizer {tokenizer}: no such file; the export has it: python -m golf_jax.data download --help")
    model = Tokenizer(tokenizer)
    if model.vocab_size != vocab_size:
        raise GolfError(f"tokenizer {tokenizer}: {model.vocab_size} pieces, the model has a vocabulary of {vocab_size} (model.vocab_size)")
    if sha256 and model.sha256 != sha256:
        raise GolfError(
            f"tokenizer {tokenizer}: SHA-256 {model.sha256[:12]}..., the model was trained with {sha256[:12]}...; give that tokenizer"
        )
    if jax.process_index() == 0:
        print(f"proving the text: {train and f'{train}, '}{val}", file=sys.stderr, flush=True)
    tokens = load_val_tokens(val, vocab_size)
    if len(tokens) <= seq_len:
        raise GolfError(f"{val}: {len(tokens)} validation tokens are fewer than one window of data.seq_len {seq_len}")
    train_paths = find_shards(train) if train else []
    sidecar = load_sidecar(val)
    proof = prove_text(model, [open_shard(path) for path in train_paths], tokens, SECONDS, sidecar=sidecar)
    identity = identify(model.sha256, train_paths, find_shards(val) + find_sidecars(val))
    return Text(
        train, val, tokens, model, sidecar or byte_tables(model.processor), proof.val_bytes, tuple(proof.facts), identity, proof.overlap
    )
