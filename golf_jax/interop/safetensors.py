"""`.safetensors` files: a JSON header of names, dtypes, shapes and byte ranges, and the arrays behind it.

8 bytes little-endian length of the header, the header, the data: every byte of the data belongs to exactly one tensor.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from golf_jax.config import GolfError, named, parse_json
from golf_jax.files import read_bytes, write_atomic

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
MAX_HEADER = 1 << 24


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """All tensors of a file, in their dtypes. Raises GolfError naming the file for whatever the layout does not allow."""
    data = read_bytes(path)
    header, length = _header(data, path)
    try:
        entries = {n: (e["dtype"], _whole(e["shape"]), *_whole(e["data_offsets"])) for n, e in header.items() if n[:2] != "__"}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise GolfError(f"{path}: damaged safetensors header ({type(e).__name__})") from None
    tensors, position, body = {}, 0, memoryview(data)[8 + length :]
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda kv: kv[1][2:]):
        if dtype not in DTYPES:
            raise GolfError(f"{path}: {name} is {dtype}; only {', '.join(DTYPES)} are weights here")
        size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if begin != position or end - begin != size or end > len(body) or min(shape, default=0) < 0:
            raise GolfError(f"{path}: {name}: bytes {begin}..{end} of {len(body)} do not fit {dtype} {shape}")
        tensors[name] = np.frombuffer(body[begin:end], DTYPES[dtype]).reshape(shape).copy()
        position = end
    if position != len(body):
        raise GolfError(f"{path}: {len(body) - position} bytes behind the last tensor")
    return tensors


def _whole(numbers: Any) -> tuple[int, ...]:
    """ValueError for anything but integers: not for text, fractions and truth values that `int` takes."""
    if any(type(number) is not int for number in numbers):
        raise ValueError
    return tuple(numbers)


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a writer noted beside the tensors; empty where nothing is noted. Raises GolfError naming the file."""
    found = _header(read_bytes(path), path)[0].get("__metadata__", {})
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _header(data: bytes, path: str | Path) -> tuple[dict[str, Any], int]:
    """The header, and how long it is."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER, len(data) - 8):
        raise GolfError(f"{path}: not a safetensors file, or cut short")
    with named(f"{path}: damaged safetensors header"):
        header = parse_json(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise GolfError(f"{path}: damaged safetensors header (it is no object)")
    return header, length


def write_safetensors(tensors: Mapping[str, Any], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays of float64, float32, float16 or bfloat16. metadata: noted beside them."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, position = [], 0
    for name, x in tensors.items():
        x = np.asarray(x)
        if x.dtype not in names:
            raise GolfError(f"{name}: {x.dtype} cannot be written to safetensors; only {', '.join(DTYPES)}")
        raw = np.ascontiguousarray(x).tobytes()
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": [position, position + len(raw)]}
        parts.append(raw)
        position += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(path, len(text).to_bytes(8, "little"), text, *parts)
