"""The table of compressors: all that a name in `quant.compressor` stands for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from golf_jax.artifact import codecs, rans
from golf_jax.config import GolfError


@dataclass(frozen=True)
class Compressor:
    """How bytes, and integer codes if it has a coder of its own for them, are stored."""

    number: int
    """In the container; never given to another one."""
    levels: range
    code_rate: float
    """Stored bytes of codes per byte of their entropy, measured at full size."""
    compress: Callable[[bytes, int], bytes]
    """(data, level)"""
    decompress: Callable[[bytes, int], bytes]
    """(stored, size) -> `size` bytes, or others to tell that there are more or fewer; never many more."""
    encode: Callable[[Sequence[np.ndarray]], bytes] | None = None
    """int8 matrices [R, C] as one stream."""
    decode: Callable[[bytes, Sequence[tuple[int, int]]], bytes] | None = None
    """(stored, shapes) -> the codes of all matrices, row by row."""


COMPRESSORS = {
    "zstd": Compressor(0, range(1, 23), 1.009, codecs.zstd, codecs.unzstd),
    "lzma": Compressor(1, range(10), 1.027, codecs.lzma2, codecs.unlzma2),
    "brotli": Compressor(2, range(12), 1.006, codecs.to_brotli, codecs.unbrotli),
    "rans": Compressor(3, range(12), 0.997, codecs.to_brotli, codecs.unbrotli, rans.encode, rans.decode),
}


def compressor(name: str, level: int) -> Compressor:
    """The compressor of that name. Raises GolfError if there is none, or it has no such level."""
    if name not in COMPRESSORS:
        raise GolfError(f"quant.compressor: unknown {name!r}; known: {', '.join(COMPRESSORS)}")
    levels = COMPRESSORS[name].levels
    if level not in levels:
        raise GolfError(f"quant.level: {name} has levels {levels[0]} to {levels[-1]}, got {level}")
    return COMPRESSORS[name]
