"""An entropy coder for integer weight codes: interleaved rANS (Duda 2009; Giesen 2014) over classes of equal spread.

Weight codes have no repeated strings, so what a compressor can gain is a good histogram. Rows and columns of one matrix differ in
spread; a shared histogram pays for the mixture. Here every row and column gets a small integer level (log2 of its mean magnitude, in
steps of 1/4), the sum of both picks one of 16 histograms, and levels and histograms travel in front of the codes. All of it is integer
arithmetic, so decoding is the same everywhere. LANES states run side by side, which is what makes numpy fast enough.
"""

import struct
from collections.abc import Sequence

import numpy as np

from golf_jax.artifact.codecs import ArtifactError, exactly, to_brotli, unbrotli

LANES = 256
CLASSES = 16
PROB_BITS = 14
_LOW = 1 << 16
_LEVEL_STEPS = 4  # levels per octave of spread
_HEAD = struct.Struct("<II")


def encode(matrices: Sequence[np.ndarray]) -> bytes:
    """int8 matrices [R, C] as one stream; `decode` needs their shapes."""
    mean = sum(float(np.abs(m.astype(np.float32)).sum()) for m in matrices) / sum(m.size for m in matrices)
    levels = [_levels(m, mean) for m in matrices]
    classes = _flat_classes(levels)
    symbols = np.concatenate([m.reshape(-1) for m in matrices]).view(np.uint8)
    freq = np.stack([_normalize(np.bincount(symbols[classes == k], minlength=256)) for k in range(CLASSES)])
    side = to_brotli(_side_bytes(levels, freq), 11)
    padding = -len(symbols) % LANES
    symbols = np.append(symbols, np.full(padding, freq[0].argmax(), np.uint8)).reshape(-1, LANES)
    classes = np.append(classes, np.zeros(padding, np.uint8)).reshape(-1, LANES)
    flat_freq, flat_start = freq.reshape(-1), _starts(freq).reshape(-1)
    state = np.full(LANES, _LOW, np.int64)
    chunks = []
    for t in range(len(symbols) - 1, -1, -1):
        index = classes[t].astype(np.int64) * 256 + symbols[t]
        f = flat_freq[index]
        full = state >= f << (32 - PROB_BITS)
        chunks.append((state[full] & 0xFFFF).astype("<u2"))
        state[full] >>= 16
        quotient, remainder = np.divmod(state, f)
        state = (quotient << PROB_BITS) + remainder + flat_start[index]
    words = b"".join(chunk.tobytes() for chunk in reversed(chunks))
    return _HEAD.pack(len(side), len(words)) + side + state.astype("<u4").tobytes() + words


def decode(data: bytes, shapes: Sequence[tuple[int, int]]) -> bytes:
    """The codes of the matrices of the given shapes, one after the other, row by row. Raises ArtifactError."""
    if len(data) < _HEAD.size:
        raise ArtifactError("a rans stream is cut short")
    side_length, words_length = _HEAD.unpack_from(data)
    start = _HEAD.size + side_length + 4 * LANES
    if len(data) != start + words_length or words_length % 2:
        raise ArtifactError("a rans stream has the wrong length")
    levels, freq = _read_side(data[_HEAD.size : _HEAD.size + side_length], shapes)
    classes = _flat_classes(levels)
    count = len(classes)
    classes = np.append(classes, np.zeros(-count % LANES, np.uint8)).reshape(-1, LANES)
    # Per class and slot: the symbol, and what the state gains.
    symbol_of = np.stack([np.repeat(np.arange(256), f) for f in freq]).reshape(-1)
    flat_freq, flat_start = freq.reshape(-1), _starts(freq).reshape(-1)
    state = np.frombuffer(data, "<u4", LANES, _HEAD.size + side_length).astype(np.int64)
    words = np.frombuffer(data, "<u2", words_length // 2, start).astype(np.int64)
    out = np.empty(classes.shape, np.uint8)
    position = 0
    for t in range(len(out)):
        group = classes[t].astype(np.int64)
        slot = state & ((1 << PROB_BITS) - 1)
        symbol = symbol_of[(group << PROB_BITS) + slot]
        out[t] = symbol
        index = group * 256 + symbol
        state = flat_freq[index] * (state >> PROB_BITS) + slot - flat_start[index]
        low = np.flatnonzero(state < _LOW)
        if position + len(low) > len(words):
            raise ArtifactError("a rans stream is cut short")
        state[low] = (state[low] << 16) | words[position : position + len(low)]
        position += len(low)
    if position != len(words) or (state != _LOW).any():
        raise ArtifactError("a rans stream does not end where it should")
    return out.reshape(-1)[:count].tobytes()


def _levels(m: np.ndarray, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Levels uint8 [R] and [C]; their sum grows with the expected magnitude of a code, relative to the `mean` of all."""
    if not m.size:
        return np.zeros(m.shape[0], np.uint8), np.zeros(m.shape[1], np.uint8)
    size = np.abs(m.astype(np.float32)) + 0.05
    row, column = size.mean(axis=1) / (mean + 0.05), size.mean(axis=0) / size.mean()
    # The mean of few codes is noisy; where columns vary no more than that, their levels would only cost.
    if np.log2(column).std() < 1.5 / np.sqrt(len(m)):
        column = np.ones_like(column)
    row_level = np.clip(np.rint(_LEVEL_STEPS * np.log2(row)) + CLASSES // 2, 0, CLASSES - 1)
    column_level = np.clip(np.rint(_LEVEL_STEPS * np.log2(column)), -CLASSES, CLASSES) + CLASSES
    return row_level.astype(np.uint8), column_level.astype(np.uint8)


def _flat_classes(levels: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    parts = []
    for row, column in levels:
        total = row.astype(np.int16)[:, None] + (column.astype(np.int16) - CLASSES)[None, :]
        parts.append(np.clip(total, 0, CLASSES - 1).astype(np.uint8).reshape(-1))
    return np.concatenate(parts)


def _normalize(counts: np.ndarray) -> np.ndarray:
    """Counts as frequencies that sum to 2**PROB_BITS, at least 1 for every symbol that occurs."""
    total = 1 << PROB_BITS
    if not counts.sum():
        counts = np.eye(1, 256, dtype=np.int64)[0]
    freq = np.where(counts > 0, np.maximum(counts * total // counts.sum(), 1), 0).astype(np.int64)
    while (excess := int(freq.sum()) - total) != 0:
        top = int(freq.argmax())
        freq[top] -= max(min(excess, int(freq[top]) // 2), -total)
    return freq


def _starts(freq: np.ndarray) -> np.ndarray:
    return np.cumsum(freq, axis=1) - freq


def _side_bytes(levels: Sequence[tuple[np.ndarray, np.ndarray]], freq: np.ndarray) -> bytes:
    planes = freq.astype("<u2").reshape(-1).view(np.uint8).reshape(-1, 2).T  # 2**14 fits 16 bits
    return b"".join(row.tobytes() + column.tobytes() for row, column in levels) + planes.tobytes()


def _read_side(side: bytes, shapes: Sequence[tuple[int, int]]) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    size = sum(rows + columns for rows, columns in shapes) + 2 * 256 * CLASSES
    raw = np.frombuffer(exactly(unbrotli, "brotli", side, size), np.uint8)
    levels, offset = [], 0
    for rows, columns in shapes:
        levels.append((raw[offset : offset + rows], raw[offset + rows : offset + rows + columns]))
        offset += rows + columns
    freq = np.ascontiguousarray(raw[offset:].reshape(2, -1).T).view("<u2").reshape(CLASSES, 256).astype(np.int64)
    if (freq.sum(axis=1) != 1 << PROB_BITS).any():
        raise ArtifactError("a rans histogram does not add up")
    return levels, freq
