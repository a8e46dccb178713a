"""`artifact.golf`: the container of a packed model.

    prefix    "GOLF", version u8, compressor u8, file length u32, header length u32 (stored), header length u32 (raw), SHA-256 of the
              rest of the prefix and everything after it; little endian, 50 bytes
    header    JSON, compressed: {"header": the caller's, "tensors": [[name, kind, dtype, shape], ...], "sections": [stored length, ...]}
    sections  compressed one by one, in the order of `section_plan`: the codes of every group (same kind and role in all layers) row by
              row, then all scales and all floats with their bytes split into planes

Reading executes nothing and trusts nothing: the length and the hash come first, every size is computed from the checked tensor table,
decompression stops at that size, and whatever does not fit raises ArtifactError.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golf_jax.artifact import rans
from golf_jax.artifact.codecs import COMPRESSORS, ArtifactError, compress, decompress
from golf_jax.quant import QTensor
from golf_jax.quant.schemes import FLOATS

MAGIC = b"GOLF"
VERSION = 1
MAX_RAW_BYTES = 1 << 30  # far above any model that fits the cap; a file that claims more is refused before anything is allocated
MAX_HEADER_BYTES = 1 << 20
_PREFIX = struct.Struct("<4sBBIII")
_DIGEST = 32
CODE_RANGE = {"int5": (-16, 15), "int6": (-32, 31), "int7": (-64, 63), "int8": (-128, 127)}


@dataclass(frozen=True)
class Entry:
    """One line of the tensor table."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Section:
    """One compressed stream: `part` of the tensors at `members` of the table."""

    label: str
    part: str
    """codes, scale or values"""
    itemsize: int
    members: tuple[int, ...]
    raw_bytes: int


def role(name: str) -> str:
    """The tensor name without its layer number: tensors of one role share statistics (`blocks.3.mlp.fc.weight` -> `mlp.fc`)."""
    return re.sub(r"\d+\.|^blocks\.|\.weight$", "", name)


def section_plan(entries: list[Entry]) -> list[Section]:
    """How the tensors are laid out in streams; a function of the table alone, the same for writer and reader."""
    groups: dict[tuple[str, str, int], list[int]] = {}
    for i, e in enumerate(entries):
        if e.kind in CODE_RANGE:
            groups.setdefault((f"{e.kind} {role(e.name)}", "codes", 1), []).append(i)
    for i, e in enumerate(entries):
        if e.kind in CODE_RANGE:
            groups.setdefault(("scales", "scale", 2), []).append(i)
    for i, e in enumerate(entries):
        if e.kind not in CODE_RANGE:
            groups.setdefault((e.kind, "values", FLOATS[e.kind].itemsize), []).append(i)
    sections = []
    for (label, part, itemsize), members in groups.items():
        items = sum(entries[i].shape[0] if part == "scale" else entries[i].numel for i in members)
        if items:
            sections.append(Section(label, part, itemsize, tuple(members), items * itemsize))
    return sections


def pack(header: dict[str, Any], qtensors: Mapping[str, QTensor], compressor: str, level: int) -> bytes:
    """The artifact as bytes; the same input gives the same bytes. header: JSON-able (model config and whatever the reader needs)."""
    entries = [Entry(name, q.kind, q.dtype, tuple(q.shape)) for name, q in qtensors.items()]
    tensors = list(qtensors.values())
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compressors release the GIL
        stored = list(pool.map(lambda section: _store(section, tensors, compressor, level), section_plan(entries)))
    table = {
        "header": header,
        "tensors": [[e.name, e.kind, e.dtype, list(e.shape)] for e in entries],
        "sections": [len(s) for s in stored],
    }
    raw_head = json.dumps(table, separators=(",", ":"), allow_nan=False).encode()
    head = compress(compressor, level, raw_head)
    body = b"".join([head, *stored])
    prefix = _PREFIX.pack(MAGIC, VERSION, COMPRESSORS.index(compressor), _PREFIX.size + _DIGEST + len(body), len(head), len(raw_head))
    return prefix + hashlib.sha256(prefix + body).digest() + body


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, QTensor]]:
    """Inverse of `pack`: (header, tensors in their original order). Raises ArtifactError, and nothing else, for any other bytes."""
    opened = inspect(data)
    tensors: list[dict[str, np.ndarray]] = [{} for _ in opened.entries]
    for section, stored in zip(opened.sections, opened.stored, strict=True):
        raw = read_section(opened, section, stored)
        _split(section, raw, opened.entries, tensors)
    result = {}
    for e, parts in zip(opened.entries, tensors, strict=True):
        if e.kind in CODE_RANGE:
            codes, scale = _part(parts, "codes", e.shape, np.int8), _part(parts, "scale", e.shape[:1], np.float16)
            low, high = CODE_RANGE[e.kind]
            _require(np.isfinite(scale).all(), f"{e.name}: a scale is NaN or infinite")
            _require(not codes.size or (codes.min() >= low and codes.max() <= high), f"{e.name}: a code is outside {e.kind}")
            result[e.name] = QTensor(e.kind, e.dtype, codes=codes, scale=scale)
        else:
            values = _part(parts, "values", e.shape, FLOATS[e.kind])
            _require(np.isfinite(values).all(), f"{e.name}: a value is NaN or infinite")
            result[e.name] = QTensor(e.kind, e.dtype, values=values)
    return opened.header, result


def read_artifact(path: str | Path) -> tuple[dict[str, Any], dict[str, QTensor]]:
    """`unpack` of a file; errors name the file."""
    data = read_bytes(path)
    try:
        return unpack(data)
    except ArtifactError as e:
        raise ArtifactError(f"{path}: {e}") from None


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file, or an ArtifactError that names it."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({e.strerror})") from None


@dataclass(frozen=True)
class Opened:
    """A checked file whose streams are still compressed."""

    header: dict[str, Any]
    compressor: str
    header_bytes: int
    """Prefix and stored header."""
    entries: list[Entry]
    sections: list[Section]
    stored: list[bytes]


def inspect(data: bytes) -> Opened:
    """Check prefix, length, hash and table of an artifact without decompressing its tensors. Raises ArtifactError."""
    start = _PREFIX.size + _DIGEST
    _require(data[:4] == MAGIC[: len(data[:4])] and len(data) > 0, "not a golf artifact (it does not begin with GOLF)")
    _require(len(data) >= start, f"truncated: {len(data)} bytes are less than the {start} of the prefix")
    _, version, codec, length, head_stored, head_raw = _PREFIX.unpack_from(data)
    _require(version == VERSION, f"format version {version}; this golf_jax reads version {VERSION}")
    _require(len(data) >= length, f"truncated: {len(data)} of {length} bytes")
    _require(len(data) == length, f"{len(data) - length} trailing bytes behind the {length} of the artifact")
    digest = hashlib.sha256(data[: _PREFIX.size] + data[start:]).digest()
    _require(digest == data[_PREFIX.size : start], "altered: the SHA-256 of the content does not match")
    _require(codec < len(COMPRESSORS), f"unknown compressor number {codec}")
    _require(head_raw <= MAX_HEADER_BYTES, f"the header claims {head_raw} bytes; at most {MAX_HEADER_BYTES} are read")
    body = start + head_stored
    _require(body <= length, "the header is longer than the file")
    compressor = COMPRESSORS[codec]
    header, entries, lengths = _parse_table(decompress(compressor, data[start:body], head_raw))
    sections = section_plan(entries)
    raw = sum(s.raw_bytes for s in sections)
    _require(raw <= MAX_RAW_BYTES, f"the tensors claim {raw} bytes; at most {MAX_RAW_BYTES} are read")
    _require(len(lengths) == len(sections), f"{len(lengths)} sections for a tensor table that needs {len(sections)}")
    _require(sum(lengths) == length - body, "the lengths of the sections do not add up to the file")
    ends = np.cumsum([body, *lengths]).tolist()
    stored = [data[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return Opened(header, compressor, body, entries, sections, stored)


def read_section(opened: Opened, section: Section, stored: bytes) -> bytes:
    """The raw bytes of one stream, exactly section.raw_bytes of them. Raises ArtifactError."""
    if opened.compressor == "rans" and section.part == "codes":
        shapes = [opened.entries[i].shape for i in section.members]
        return rans.decode(stored, [(rows, columns) for rows, columns in shapes])
    return decompress(opened.compressor, stored, section.raw_bytes)


def _store(section: Section, tensors: list[QTensor], compressor: str, level: int) -> bytes:
    if compressor == "rans" and section.part == "codes":
        return rans.encode([codes for i in section.members if (codes := tensors[i].codes) is not None])
    return compress(compressor, level, join_section(section, tensors))


def _require(ok: Any, message: str) -> None:
    if not ok:
        raise ArtifactError(message)


def _parse_table(raw: bytes) -> tuple[dict[str, Any], list[Entry], list[int]]:
    def refuse(constant: str):
        raise ValueError(constant)

    try:
        table = json.loads(raw.decode(), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise ArtifactError("the header is not valid JSON") from None
    _require(isinstance(table, dict) and set(table) == {"header", "tensors", "sections"}, "the header lacks its three parts")
    header, rows, lengths = table["header"], table["tensors"], table["sections"]
    _require(isinstance(header, dict) and isinstance(rows, list) and isinstance(lengths, list), "the header has the wrong types")
    _require(all(_is_size(n) for n in lengths), "a section length is not a size")
    entries = []
    for row in rows:
        _require(isinstance(row, list) and len(row) == 4, "a line of the tensor table is not [name, kind, dtype, shape]")
        name, kind, dtype, shape = row
        _require(isinstance(name, str), "a tensor name is not a string")
        _require(isinstance(kind, str) and (kind in CODE_RANGE or kind in FLOATS), f"{name}: unknown kind {kind!r}")
        _require(dtype in ("float32", "bfloat16"), f"{name}: unknown dtype {dtype!r}")
        _require(isinstance(shape, list) and len(shape) <= 4 and all(_is_size(n) for n in shape), f"{name}: bad shape {shape!r}")
        _require(kind not in CODE_RANGE or len(shape) == 2, f"{name}: {kind} codes need a matrix, shape is {shape}")
        entries.append(Entry(name, kind, dtype, tuple(shape)))
    _require(len({e.name for e in entries}) == len(entries), "a tensor name occurs twice")
    return header, entries, lengths


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 31


def _part(parts: dict[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return parts[name] if name in parts else np.zeros(shape, dtype)  # empty tensors are in no stream


def join_section(section: Section, tensors: list[QTensor]) -> bytes:
    """The raw bytes of one stream: tensors one after the other, then split into byte planes."""
    raw = b"".join(np.ascontiguousarray(getattr(tensors[i], section.part)).tobytes() for i in section.members)
    return np.frombuffer(raw, np.uint8).reshape(-1, section.itemsize).T.tobytes()  # byte planes; codes have one


def _split(section: Section, raw: bytes, entries: list[Entry], tensors: list[dict[str, np.ndarray]]) -> None:
    flat = np.frombuffer(raw, np.uint8).reshape(section.itemsize, -1).T.tobytes()
    offset = 0
    for i in section.members:
        e = entries[i]
        dtype = {"codes": np.dtype(np.int8), "scale": np.dtype(np.float16)}.get(section.part) or FLOATS[e.kind]
        shape = e.shape[:1] if section.part == "scale" else e.shape
        count = math.prod(shape)
        tensors[i][section.part] = np.frombuffer(flat, dtype, count, offset).reshape(shape)
        offset += count * dtype.itemsize
