"""Token shards in the challenge's format: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens."""

import glob
import os
import stat
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from golf_jax.config import GolfError
from golf_jax.files import refuse_pointer, write_atomic

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
TOKEN = np.dtype("<u2")
BLOCK = 1 << 16  # tokens; no text repeats one so often
PAGE = 1 << 11  # tokens; what a file system reads where nothing was written, in which 0 is padding or unknown, never so much text
MAX_TOKENS = 2**31 - 1  # the count is a signed 32-bit header word


class Shard:
    """The tokens of one shard file, read on demand: `shard[start:stop]` is uint16 [tokens], a copy.

    Read with pread, not mapped: a file that is truncated meanwhile would end a mapped process with SIGBUS, one that is overwritten
    would be trained on. Every read compares size and modification time with those at opening (a few microseconds per sequence). What
    only changed the time of the last change (another name or mode, its removal, or other content under an old time) asks `still`.
    """

    still: Callable[[int], bool] | None = None
    """Whether the content behind this descriptor is what it was (`golf_jax.data.identity.watch`)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would block for ever
                raise GolfError(f"{path}: cannot be read (not a regular file)")
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self._stamp = self._stat()
            header = np.frombuffer(os.pread(self._descriptor, HEADER_BYTES, 0), np.uint8)
        except GolfError:
            raise
        except (OSError, ValueError) as error:
            raise GolfError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
        self._count = _count_of(path, header, self._stamp[0])

    def _stat(self) -> tuple[int, int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _unchanged(self) -> bool:
        if (now := self._stat()) == self._stamp:
            return True
        same = now[:2] == self._stamp[:2] and (self.still is None or self.still(self._descriptor))
        self._stamp = now if same else self._stamp
        return same

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self._count)
        if step != 1:
            raise IndexError("a shard is read in contiguous parts")
        view, done = memoryview(raw := self._room(max(stop - start, 0))), 0
        try:
            while done < len(view):
                if not (count := os.preadv(self._descriptor, [view[done:]], HEADER_BYTES + TOKEN.itemsize * start + done)):
                    break
                done += count
            unchanged = done == len(view) and self._unchanged()
        except OSError as error:
            raise GolfError(f"{self.path}: cannot be read ({error.strerror})") from error
        if not unchanged:
            raise GolfError(f"{self.path}: was truncated or altered while in use; restore the file and start again")
        return np.frombuffer(raw, TOKEN)

    def _room(self, count: int) -> bytearray:
        try:
            return bytearray(TOKEN.itemsize * count)
        except MemoryError:
            raise GolfError(f"{self.path}: there is too little memory for its {count:,} tokens") from None

    def whole(self) -> np.ndarray:
        """All tokens. GolfError, before much is read, for a file that begins with a hole: such a one can claim 4 GB and take none."""
        check_holes(self[:BLOCK], self.path)
        return self[:]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def _count_of(path: str | Path, raw: np.ndarray, size: int) -> int:
    """The tokens that the header `raw` (uint8) of a file of `size` bytes promises; GolfError unless they are there."""
    refuse_pointer(path, raw[:64].tobytes())
    if raw.size < HEADER_BYTES:
        raise GolfError(f"{path}: truncated, {size} bytes where the header alone takes {HEADER_BYTES}; fetch it again")
    magic, version, count = (int(word) for word in raw.view("<i4")[:3])
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
    return count


def open_shard(path: str | Path) -> Shard:
    """One shard, open for reading; nothing but the header is read.

    Raises GolfError, naming the file, when it is missing, truncated, longer than its header says, or no shard at all.
    """
    return Shard(path)


def find_shards(pattern: str | Path) -> list[Path]:
    """Files that match the glob `pattern`, sorted by name (the order of the training stream). GolfError when none does.

    Byte counts beside the tokens (`golf_jax.data.sidecar`, `_bytes_` in the name) are of the same format and are left out: read as tokens
    they would pass every check.
    """
    if os.path.isdir(pattern):
        raise GolfError(f"{pattern}: a directory; give a glob of its shards, as '{pattern}/*train_*.bin' or '{pattern}/*val_*.bin'")
    folder, name = os.path.split(pattern)
    where = os.path.join(glob.escape(folder), name) if os.path.isdir(folder) else str(pattern)  # a folder may be called `[2024]`
    found = [Path(path) for path in sorted(glob.glob(where))]
    paths = [path for path in found if "_bytes_" not in path.name]
    if found and not paths:
        raise GolfError(f"{found[0]}: a sidecar of byte counts, not tokens; name the shards beside it")
    if not paths:
        raise GolfError(f"{pattern}: no shard matches; build or fetch data with `python -m golf_jax.data --help`")
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


def find_hole(tokens: np.ndarray, first: int = 0) -> str:
    """Which block of `tokens`, which begin at `first`, is one token, or which page is zeros; empty where there is none."""
    for size in (PAGE, BLOCK):
        blocks = tokens[: len(tokens) // size * size].reshape(-1, size)
        if len(holes := np.flatnonzero((blocks == (0 if size == PAGE else blocks[:, :1])).all(axis=1))):
            start = int(holes[0]) * size
            return f"the {size:,} tokens from {first + start:,} on are all {tokens[start]}"
    return ""


def check_holes(tokens: np.ndarray, where: object, first: int = 0) -> None:
    """GolfError where `tokens`, which begin at `first`, have a hole: room never written to."""
    if found := find_hole(tokens, first):
        raise GolfError(f"{where}: {found}: part of the file was never written; fetch it again")


def load_val_tokens(pattern: str | Path, vocab_size: int | None = None) -> np.ndarray:
    """All validation shards of the glob `pattern`, concatenated in name order: uint16 [tokens], in memory (120 MB officially)."""
    shards = [open_shard(path) for path in find_shards(pattern)]
    tokens = np.concatenate([shard.whole() for shard in shards])
    if vocab_size is not None:
        check_token_range(tokens, vocab_size, pattern)
    return tokens
