"""PR 2135's frame for integer codes, `PGRP` (docs/recipes/pr2135_quant_eval.md, section 3): read, and its row order.

Little endian: PGRP, u32 version, u32 tensors; per tensor u16 name length, name, u32 rows, u32 columns, rows x u16 row order; u8 method
(1 lrzip, 0 brotli), u32 length, compressed codes; u32 length, compressed remainder. The codes of each tensor have their rows in that order
and lie column by column.
"""

import math
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import brotli
import numpy as np

from golf_jax.config import GolfError

MAGIC = b"PGRP"
MAX_CODES = 1 << 28


class NotInstalled(GolfError):
    """A program or library that reads this file is not there."""


def row_order(codes_RC: np.ndarray) -> np.ndarray:
    """Rows by similarity, int [R]: from row 0 on always the unused one nearest to the last in L1 distance, the first of equals."""
    rows, left = codes_RC.astype(np.int16), np.ones(len(codes_RC), bool)
    order = np.zeros(len(rows), np.int64)
    left[0] = False
    for k in range(1, len(rows)):
        distance = np.abs(rows - rows[order[k - 1]]).sum(axis=1, dtype=np.int64)
        order[k] = np.where(left, distance, np.iinfo(np.int64).max).argmin()
        left[order[k]] = False
    return order


@dataclass(frozen=True)
class Frame:
    """A frame taken apart."""

    tensors: tuple[tuple[str, int, int, np.ndarray], ...]
    """Name, rows, columns, row order."""
    method: int
    stored: bytes
    remainder: bytes
    header_bytes: int
    """All that is neither codes nor remainder."""

    @property
    def size(self) -> int:
        return sum(rows * columns for _, rows, columns, _ in self.tensors)


def sizes(data: bytes) -> list[int]:
    """Tensors, method, bytes of codes, remainder and headers, codes unpacked, all of the frame."""
    f = parse(data)
    return [len(f.tensors), f.method, len(f.stored), len(f.remainder), f.header_bytes, f.size, len(data)]


def split(data: bytes, limit: int = MAX_CODES) -> tuple[dict[str, np.ndarray], bytes]:
    """(codes int8 [R, C] by the names in the frame, compressed remainder). limit: codes that are unpacked at most.

    Raises GolfError; NotInstalled where lrzip is absent.
    """
    frame = parse(data)
    if frame.size > limit:
        raise GolfError(f"packed file: a PGRP frame of {len(data):,} bytes that claims {frame.size:,} codes; at most {limit:,} are read")
    raw = (_lrzip if frame.method else _brotli)(frame.stored, frame.size)
    if len(raw) != frame.size:
        raise GolfError(f"packed file: {len(raw)} codes instead of {frame.size}")
    codes, start = {}, 0
    for name, rows, columns, order in frame.tensors:
        matrix = np.empty((rows, columns), np.int8)
        matrix[order] = np.frombuffer(raw, np.int8, math.prod((rows, columns)), start).reshape(columns, rows).T
        codes[name], start = matrix, start + rows * columns
    return codes, frame.remainder


def parse(data: bytes) -> Frame:
    """The parts of a frame, still compressed. Raises GolfError."""
    where = "packed file"
    try:
        version, count = struct.unpack_from("<II", data, 4)
        if version != 2 or count > 4096:
            raise GolfError(f"{where}: a PGRP frame of version {version} with {count} tensors cannot be read")
        at, tensors = 12, []
        for _ in range(count):
            (length,) = struct.unpack_from("<H", data, at)
            name = data[at + 2 : at + 2 + length].decode()
            rows, columns = struct.unpack_from("<II", data, at := at + 2 + length)
            order = np.frombuffer(data, "<u2", rows, at + 8).astype(np.int64)
            if not np.array_equal(np.sort(order), np.arange(rows)):
                raise GolfError(f"{where}: {name}: its row order is no permutation")
            tensors.append((name, rows, columns, order))
            at += 8 + 2 * rows
        method, length = struct.unpack_from("<BI", data, at)
        stored = data[at + 5 : at + 5 + length]
        (rest,) = struct.unpack_from("<I", data, at := at + 5 + length)
        if at + 4 + rest != len(data) or len(stored) != length or method not in (0, 1):
            raise GolfError(f"{where}: a PGRP frame whose lengths do not add up to {len(data)} bytes")
    except (struct.error, ValueError, UnicodeDecodeError) as e:
        raise GolfError(f"{where}: a PGRP frame that is cut short ({e})") from None
    frame = Frame(tuple(tensors), method, stored, data[at + 4 :], len(data) - length - rest)
    if frame.size > MAX_CODES:
        raise GolfError(f"{where}: a PGRP frame that claims {frame.size:,} codes")
    return frame


def _brotli(stored: bytes, size: int) -> bytes:
    try:
        return brotli.Decompressor().process(stored, output_buffer_limit=size + 1)
    except brotli.error as e:
        raise GolfError(f"packed file: not a whole brotli stream ({e})") from None


def _lrzip(stored: bytes, size: int) -> bytes:
    if not shutil.which("lrzip"):
        raise NotInstalled("packed file: its codes are packed with lrzip, which is not installed: install lrzip")
    with tempfile.TemporaryDirectory() as folder:
        packed, raw = Path(folder, "codes.lrz"), Path(folder, "codes")
        packed.write_bytes(stored)
        limited = f'ulimit -f {size // 512 + 1} && exec "$@"'  # in blocks of 512 bytes: a bomb ends there
        done = subprocess.run(["sh", "-c", limited, "sh", "lrzip", "-d", "-q", "-o", str(raw), str(packed)], capture_output=True)
        if done.returncode or not raw.exists():
            raise GolfError("packed file: not a whole lrzip stream")
        return raw.read_bytes()[: size + 1]
