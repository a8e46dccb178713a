"""Token shards in the challenge's format: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens."""

import glob
from pathlib import Path

import numpy as np

from golf_jax.config import GolfError
from golf_jax.files import write_atomic

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
TOKEN = np.dtype("<u2")
MAX_TOKENS = 2**31 - 1  # the count is a signed 32-bit header word


def open_shard(path: str | Path) -> np.memmap:
    """Memory-maps the tokens of one shard, read-only: uint16 [tokens]. Nothing but the header is read.

    Raises GolfError, naming the file, when it is missing, truncated, longer than its header says, or no shard at all.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        header = np.fromfile(path, dtype="<i4", count=HEADER_WORDS)
    except OSError as error:
        raise GolfError(f"{path}: cannot be read ({error.strerror})") from error
    if header.size < HEADER_WORDS:
        raise GolfError(f"{path}: truncated, {size} bytes where the header alone takes {HEADER_BYTES}; fetch it again")
    magic, version, count = (int(word) for word in header[:3])
    if magic != MAGIC:
        raise GolfError(f"{path}: not a token shard (magic {magic}, expected {MAGIC})")
    if version != VERSION:
        raise GolfError(f"{path}: shard version {version}, expected {VERSION}")
    if count < 1:
        raise GolfError(f"{path}: the header says {count} tokens; a shard holds at least one")
    expected = HEADER_BYTES + count * TOKEN.itemsize
    if size < expected:
        raise GolfError(f"{path}: truncated, {size} bytes but {count} tokens need {expected}; fetch or build it again")
    if size > expected:
        raise GolfError(f"{path}: {size - expected} trailing bytes after the {count} tokens of the header")
    return np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(count,))


def find_shards(pattern: str | Path) -> list[Path]:
    """Files that match the glob `pattern`, sorted by name (the order of the training stream). GolfError when none does."""
    paths = [Path(name) for name in sorted(glob.glob(str(pattern)))]
    if not paths:
        raise GolfError(f"{pattern}: no shard matches; build or fetch data with `python -m golf_jax.data --help`")
    for path in paths:
        # CaseOps exports put byte counts beside the tokens, in the same format: read as tokens they would pass every check.
        if "_bytes_" in path.name:
            raise GolfError(f"{path}: a sidecar of byte counts, not tokens; narrow the glob {pattern}")
    return paths


def write_shard(path: str | Path, tokens: np.ndarray) -> Path:
    """Writes integer `tokens` [n] as one shard. The file appears complete or not at all (temporary file, fsync, rename)."""
    path, tokens = Path(path), np.asarray(tokens)
    if tokens.ndim != 1 or not 1 <= tokens.size <= MAX_TOKENS or tokens.dtype.kind not in "iu":
        raise GolfError(f"{path}: tokens must be a flat array of 1 to {MAX_TOKENS} integers, got {tokens.dtype}{tokens.shape}")
    if tokens.min() < 0 or tokens.max() > 0xFFFF:
        raise GolfError(f"{path}: token ids {tokens.min()}..{tokens.max()} do not fit uint16")
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    return write_atomic(path, header.tobytes(), np.ascontiguousarray(tokens, dtype=TOKEN).data)


def check_token_range(tokens: np.ndarray, vocab_size: int, where: object) -> None:
    """GolfError when a token lies outside the vocabulary (a JAX gather would clamp it in silence)."""
    if tokens.size and (top := int(tokens.max())) >= vocab_size:
        raise GolfError(f"{where}: token {top} is outside a vocabulary of {vocab_size}; the tokenizer is not that of the shards")


def load_val_tokens(pattern: str | Path, vocab_size: int | None = None) -> np.ndarray:
    """All validation shards of the glob `pattern`, concatenated in name order: uint16 [tokens], in memory (120 MB officially)."""
    shards = [open_shard(path) for path in find_shards(pattern)]
    tokens = np.concatenate(shards)
    if vocab_size is not None:
        check_token_range(tokens, vocab_size, pattern)
    return tokens
