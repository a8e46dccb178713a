"""Compressors of the artifact: fixed settings per name, and decompression that never produces more than it was told to."""

import lzma
from collections.abc import Callable

import brotli
import zstandard

from golf_jax.config import GolfError

COMPRESSORS = ("zstd", "lzma", "brotli", "rans")
_ZSTD_WINDOW = 1 << 27  # what level 22 uses; a frame that asks for more is refused


class ArtifactError(GolfError):
    """The bytes are not a whole, unaltered artifact; the message says what is wrong."""


def _lzma_filters(level: int) -> list[dict]:
    # Raw LZMA2 without the xz frame (the container has its own hash). lc = pb = 0: neighbouring codes say nothing about each other,
    # so contexts only dilute the statistics (docs/artifact.md).
    return [{"id": lzma.FILTER_LZMA2, "preset": level, "lc": 0, "lp": 0, "pb": 0}]


def compress(name: str, level: int, data: bytes) -> bytes:
    """`data` compressed by `zstd` (level 1..22), `lzma` (preset 0..9) or `brotli` (quality 0..11).

    `rans` is brotli here: only integer codes have a coder of their own (golf_jax.artifact.rans).
    """
    top = {"zstd": 22, "lzma": 9, "brotli": 11, "rans": 11}.get(name)
    if top is None:
        raise GolfError(f"quant.compressor: unknown {name!r}; known: {', '.join(COMPRESSORS)}")
    if not (1 if name == "zstd" else 0) <= level <= top:
        raise GolfError(f"quant.level: {name} has levels up to {top}, got {level}")
    if name == "zstd":
        # Weight codes have no repeats worth finding; the fastest level sometimes beats the best one by 3 % (docs/artifact.md).
        return min((zstandard.ZstdCompressor(level=n).compress(data) for n in (level, 1)), key=len)
    if name == "lzma":
        return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_lzma_filters(level))
    return brotli.compress(data, quality=level)


def decompress(name: str, data: bytes, size: int) -> bytes:
    """Exactly `size` bytes from `data`; allocates no more than that (plus the compressor's window). Raises ArtifactError."""
    bounded: Callable[[bytes, int], bytes] = {"zstd": _zstd, "lzma": _lzma, "brotli": _brotli, "rans": _brotli}[name]
    try:
        raw = bounded(data, size)
    except (zstandard.ZstdError, lzma.LZMAError, brotli.error, MemoryError) as e:
        raise ArtifactError(f"a {name} stream is damaged ({e})") from None
    if len(raw) != size:
        raise ArtifactError(f"a {name} stream holds {'more' if len(raw) > size else 'fewer'} bytes than the {size} of its tensors")
    return raw


def _zstd(data: bytes, size: int) -> bytes:
    # decompress() trusts the size in the frame header, so that is checked first.
    frame = zstandard.get_frame_parameters(data)
    if frame.content_size != size:
        raise ArtifactError(f"a zstd stream announces {frame.content_size} bytes instead of the {size} of its tensors")
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompress(data, max_output_size=size, allow_extra_data=False)


def _lzma(data: bytes, size: int) -> bytes:
    window = {"id": lzma.FILTER_LZMA2, "dict_size": max(size, 4096)}  # no match reaches further back than the output is long
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=[window])
    raw = decoder.decompress(data, max_length=size + 1)
    if not decoder.eof and len(raw) <= size:
        raw += decoder.decompress(b"", max_length=1)
    if len(raw) == size and (not decoder.eof or decoder.unused_data):
        raise ArtifactError("an lzma stream is cut short or has bytes behind its end")
    return raw


def _brotli(data: bytes, size: int) -> bytes:
    decoder = brotli.Decompressor()
    raw = decoder.process(data, output_buffer_limit=size + 1)
    while len(raw) <= size and not decoder.is_finished():
        more = decoder.process(b"", output_buffer_limit=size + 1 - len(raw))
        if not more:
            break
        raw += more
    if len(raw) == size and not decoder.is_finished():
        raise ArtifactError("a brotli stream is cut short")
    return raw
