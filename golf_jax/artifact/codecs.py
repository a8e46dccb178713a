"""General compressors of the artifact: fixed settings per name, and decompression that never produces more than it was told to."""

import lzma
from collections.abc import Callable

import brotli
import zstandard

from golf_jax.config import GolfError

_ZSTD_WINDOW = 1 << 27  # what level 22 uses; a frame that asks for more is refused


class ArtifactError(GolfError):
    """The bytes are not a whole, unaltered artifact; the message says what is wrong."""


def zstd(data: bytes, level: int) -> bytes:
    # Weight codes have no repeats worth finding; the fastest level sometimes beats the best one by 3 % (docs/artifact.md).
    return min((zstandard.ZstdCompressor(level=n).compress(data) for n in (level, 1)), key=len)


def unzstd(data: bytes, size: int) -> bytes:
    # decompress() trusts the size in the frame header, so that is checked first.
    frame = zstandard.get_frame_parameters(data)
    if frame.content_size != size:
        raise ArtifactError(f"a zstd stream announces {frame.content_size} bytes instead of the {size} of its tensors")
    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompress(data, max_output_size=size, allow_extra_data=False)


def lzma2(data: bytes, level: int) -> bytes:
    # Raw LZMA2 without the xz frame (the container has its own hash). lc = pb = 0: neighbouring codes say nothing about each other,
    # so contexts only dilute the statistics (docs/artifact.md).
    filters = [{"id": lzma.FILTER_LZMA2, "preset": level, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters)


def unlzma2(data: bytes, size: int) -> bytes:
    window = {"id": lzma.FILTER_LZMA2, "dict_size": max(size, 4096)}  # no match reaches further back than the output is long
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=[window])
    raw = decoder.decompress(data, max_length=size + 1)
    if not decoder.eof and len(raw) <= size:
        raw += decoder.decompress(b"", max_length=1)
    if len(raw) == size and (not decoder.eof or decoder.unused_data):
        raise ArtifactError("an lzma stream is cut short or has bytes behind its end")
    return raw


def to_brotli(data: bytes, level: int) -> bytes:
    return brotli.compress(data, quality=level)


def unbrotli(data: bytes, size: int) -> bytes:
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


def exactly(decompress: Callable[[bytes, int], bytes], name: str, data: bytes, size: int) -> bytes:
    """`size` bytes from `data`, no fewer and no more; allocates little else (the compressor's window). Raises ArtifactError."""
    try:
        raw = decompress(data, size)
    except (zstandard.ZstdError, lzma.LZMAError, brotli.error, MemoryError) as e:
        raise ArtifactError(f"a {name} stream is damaged ({e})") from None
    if len(raw) != size:
        raise ArtifactError(f"a {name} stream holds {'more' if len(raw) > size else 'fewer'} bytes than the {size} of its tensors")
    return raw
