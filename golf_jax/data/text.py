"""Text opened for use: shards and tokenizer that fit each other and the model, in one place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golf_jax.config import GolfError
from golf_jax.data.corpus import CACHE, build_embedded
from golf_jax.data.shards import load_val_tokens
from golf_jax.data.tokenizer import ByteTables, Tokenizer, byte_tables, check_tables

SAMPLE = 1 << 22  # tokens whose byte count is checked against the decoded text


@dataclass(frozen=True)
class Text:
    """Tokenized text, ready to use."""

    train: str
    """Glob of the training shards; empty where there is only something to score."""
    val: str
    """Glob of the validation shards."""
    val_tokens: np.ndarray
    """uint16 [n]"""
    tokenizer: Tokenizer
    tables: ByteTables
    val_bytes: int
    """Bytes of validation text that were proved against the decoded text."""

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this text and no other, as JSON data."""
        return {"tokenizer_sha256": self.tokenizer.sha256}


def open_text(train: str, val: str, tokenizer: str, vocab_size: int, seq_len: int) -> Text:
    """Open shards and tokenizer and check that they fit the model and each other. `train`: a glob, `embedded`, or nothing.

    Raises GolfError naming the file and the flag.
    """
    if train == "embedded":
        directory = Path(build_embedded(CACHE, vocab_size)["directory"])
        train, val, tokenizer = (str(directory / n) for n in ("train_*.bin", "val_*.bin", "tokenizer.model"))
    if not Path(tokenizer).is_file():
        raise GolfError(
            f"{tokenizer}: no such tokenizer; give --data.tokenizer, or fetch the export: python -m golf_jax.data download --help"
        )
    model = Tokenizer(tokenizer)
    if model.vocab_size != vocab_size:
        raise GolfError(f"model.vocab_size {vocab_size} differs from the {model.vocab_size} pieces of {tokenizer}: set --model.vocab-size")
    tokens = load_val_tokens(val, vocab_size)
    if len(tokens) <= seq_len:
        raise GolfError(f"{val}: {len(tokens)} validation tokens are fewer than one window of data.seq_len {seq_len}")
    tables = byte_tables(model.processor)
    return Text(train, val, tokens, model, tables, check_tables(model, tokens[:SAMPLE], tables))
