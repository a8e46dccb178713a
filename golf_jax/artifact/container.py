"""`artifact.golf`: the container of a packed model.

    prefix    "GOLF", version u8, compressor u8, file length u32, header length u32 (stored), header length u32 (raw), SHA-256 of the
              rest of the prefix and everything after it; little endian, 50 bytes
    header    JSON, compressed: {"header": the caller's, "tensors": [[name, kind, dtype, shape], ...], "sections": [stored length, ...]}.
              Codes with another number of scales than rows give it as a fifth entry. The factors of a tensor's low-rank correction are
              the lines NAME.lowrank_a and NAME.lowrank_b
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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from golf_jax.artifact.codecs import ArtifactError, exactly
from golf_jax.artifact.compressors import COMPRESSORS, Compressor, compressor
from golf_jax.config import GolfError, parse_json
from golf_jax.quant import QTensor
from golf_jax.quant.schemes import FLOATS, WIDTHS

MAGIC = b"GOLF"
VERSION = 2
READABLE = (1, 2)  # 2: fifth entries and corrections
# Far above any model that fits the cap; a file that claims more is refused before anything is allocated or decompressed.
MAX_FILE_BYTES = 1 << 26
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 1 << 12
MAX_NAME = 200
FREE_VALUES, VALUES_PER_BYTE = 1 << 22, 64  # a file of n bytes may hold 4 M + 64 n values: a small one can never cost gigabytes
_PREFIX = struct.Struct("<4sBBIII")
_DIGEST = 32
FACTORS = (".lowrank_a", ".lowrank_b")


@dataclass(frozen=True)
class Entry:
    """One line of the tensor table."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    groups: int | None = None
    """Scales of codes, each for equally many of them in row-major order; None: one per row."""

    def parts(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The arrays that store it: fields of its QTensor, their dtypes and shapes. All that the layout of the file depends on."""
        if self.kind in WIDTHS:
            return {
                "codes": (np.dtype(np.int8), self.shape),
                "scale": (np.dtype(np.float16), self.shape[:1] if self.groups is None else (self.groups,)),
            }
        return {"values": (FLOATS[self.kind], self.shape)}

    def line(self) -> list[Any]:
        return [self.name, self.kind, self.dtype, list(self.shape), *([] if self.groups is None else [self.groups])]


@dataclass(frozen=True)
class Section:
    """One compressed stream: `part` of the tensors at `members` of the table."""

    label: str
    part: str
    """codes, scale or values"""
    itemsize: int
    members: tuple[int, ...]
    raw_bytes: int

    @property
    def own_coder(self) -> bool:
        """Codes that a compressor's coder for codes takes; factors are too few to pay for its histograms and states."""
        return self.part == "codes" and not self.label.endswith(tuple(suffix[1:] for suffix in FACTORS))


def role(name: str) -> str:
    """The tensor name without its layer number: tensors of one role share statistics (`blocks.3.mlp.fc.weight` -> `mlp.fc`)."""
    if name.endswith(FACTORS):
        return name.rpartition(".")[2]  # few codes each: all together
    return re.sub(r"\d+\.|^blocks\.|\.weight$", "", name)


def section_plan(entries: list[Entry]) -> list[Section]:
    """How the tensors are laid out in streams; a function of the table alone, the same for writer and reader."""
    groups: dict[tuple[str, str], list[int]] = {}
    for stored in ("codes", "scale", "values"):
        for i, e in enumerate(entries):
            if stored in e.parts():
                label = {"codes": f"{e.kind} {role(e.name)}", "scale": "scales", "values": e.kind}[stored]
                groups.setdefault((label, stored), []).append(i)
    sections = []
    for (label, part), members in groups.items():
        arrays = [entries[i].parts()[part] for i in members]
        raw_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in arrays)
        if raw_bytes:
            sections.append(Section(label, part, arrays[0][0].itemsize, tuple(members), raw_bytes))
    return sections


def flatten(qtensors: Mapping[str, QTensor]) -> dict[str, QTensor]:
    """The factors of low-rank corrections as tensors of their own, behind their tensor."""
    flat = {}
    for name, q in qtensors.items():
        flat[name] = replace(q, lowrank=None)
        flat |= {name + suffix: factor for suffix, factor in zip(FACTORS, q.lowrank or (), strict=False)}
    return flat


def _fold(flat: dict[str, QTensor]) -> dict[str, QTensor]:
    """Inverse of `flatten`. Raises ArtifactError."""
    result = {}
    for name, q in flat.items():
        if name.endswith(FACTORS):
            base = name.rpartition(".")[0]
            _require(base in flat and all(base + suffix in flat for suffix in FACTORS), f"{name}: half of a low-rank correction")
            continue
        if (a := flat.get(name + FACTORS[0])) is not None and (b := flat.get(name + FACTORS[1])) is not None:
            fits = all(x.codes is not None and len(x.shape) == 2 for x in (q, a, b))
            fits = fits and (a.shape[0], b.shape[1]) == q.shape and a.shape[1] == b.shape[0]
            _require(fits, f"{name}: its low-rank correction has factors of shapes {a.shape} and {b.shape}")
            q = replace(q, lowrank=(a, b))
        result[name] = q
    return result


def table_of(qtensors: Mapping[str, QTensor]) -> list[Entry]:
    """The lines of the table for flattened tensors."""
    groups = {name: None if q.scale is None or q.scale.size == q.shape[0] else q.scale.size for name, q in qtensors.items()}
    return [Entry(name, q.kind, q.dtype, tuple(q.shape), groups[name]) for name, q in qtensors.items()]


def pack(header: dict[str, Any], qtensors: Mapping[str, QTensor], name: str, level: int) -> bytes:
    """The artifact as bytes; the same input gives the same bytes. header: JSON-able (model config and whatever the reader needs).

    name, level: of the compressor. Raises GolfError if there is no such.
    """
    flat, by = flatten(qtensors), compressor(name, level)
    entries, tensors = table_of(flat), list(flat.values())
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compressors release the GIL
        stored = list(pool.map(lambda section: _store(section, tensors, by, level), section_plan(entries)))
    table = {
        "header": header,
        "tensors": [e.line() for e in entries],
        "sections": [len(s) for s in stored],
    }
    raw_head = json.dumps(table, separators=(",", ":"), allow_nan=False).encode()
    head = by.compress(raw_head, level)
    body = b"".join([head, *stored])
    prefix = _PREFIX.pack(MAGIC, VERSION, by.number, _PREFIX.size + _DIGEST + len(body), len(head), len(raw_head))
    return prefix + hashlib.sha256(prefix + body).digest() + body


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, QTensor]]:
    """Inverse of `pack`: (header, tensors in their original order). Raises ArtifactError, and nothing else, for any other bytes."""
    opened = inspect(data)
    return opened.header, tensors_of(opened)


def tensors_of(opened: "Opened") -> dict[str, QTensor]:
    """The tensors of a checked file, in their original order. Raises ArtifactError."""
    # Empty arrays are in no stream.
    arrays = [{part: np.zeros(shape, dtype) for part, (dtype, shape) in e.parts().items() if 0 in shape} for e in opened.entries]
    for section, stored in zip(opened.sections, opened.stored, strict=True):
        _split(section, read_section(opened, section, stored), opened.entries, arrays)
    result = {}
    for e, parts in zip(opened.entries, arrays, strict=True):
        if e.kind in WIDTHS:
            low, high = WIDTHS[e.kind]
            codes = parts["codes"]
            _require(np.isfinite(parts["scale"]).all(), f"{e.name}: a scale is NaN or infinite")
            _require(not codes.size or (codes.min() >= low and codes.max() <= high), f"{e.name}: a code is outside {e.kind}")
        else:
            with np.errstate(over="ignore"):
                finite = np.isfinite(parts["values"].astype(FLOATS[e.dtype])).all()
            _require(finite, f"{e.name}: a value is NaN or infinite")
        result[e.name] = QTensor(e.kind, e.dtype, parts.get("codes"), parts.get("scale"), parts.get("values"))
    return _fold(result)


@dataclass(frozen=True)
class Opened:
    """A checked file whose streams are still compressed."""

    header: dict[str, Any]
    compressor: str
    """Its name."""
    header_bytes: int
    """Prefix and stored header."""
    entries: list[Entry]
    sections: list[Section]
    stored: list[bytes]


def inspect(data: bytes) -> Opened:
    """Check prefix, length, hash and table of an artifact without decompressing its tensors. Raises ArtifactError."""
    start = _PREFIX.size + _DIGEST
    _require(data[:4] == MAGIC[: len(data[:4])] and len(data) > 0, "not a golf artifact (it does not begin with GOLF)")
    _require(len(data) <= MAX_FILE_BYTES, f"{len(data)} bytes; at most {MAX_FILE_BYTES} are read")
    _require(len(data) >= start, f"truncated: {len(data)} bytes are less than the {start} of the prefix")
    _, version, codec, length, head_stored, head_raw = _PREFIX.unpack_from(data)
    _require(version in READABLE, f"format version {version}; this golf_jax reads versions up to {VERSION}")
    _require(len(data) >= length, f"truncated: {len(data)} of {length} bytes")
    _require(len(data) == length, f"{len(data) - length} trailing bytes behind the {length} of the artifact")
    digest = hashlib.sha256(data[: _PREFIX.size] + data[start:]).digest()
    _require(digest == data[_PREFIX.size : start], "altered: the SHA-256 of the content does not match")
    names = {c.number: name for name, c in COMPRESSORS.items()}
    _require(codec in names, f"unknown compressor number {codec}")
    _require(head_raw <= MAX_HEADER_BYTES, f"the header claims {head_raw} bytes; at most {MAX_HEADER_BYTES} are read")
    body = start + head_stored
    _require(body <= length, "the header is longer than the file")
    name = names[codec]
    header, entries, lengths = _parse_table(exactly(COMPRESSORS[name].decompress, name, data[start:body], head_raw))
    claimed = sum(math.prod(max(n, 1) for n in e.shape) for e in entries)  # an axis of an empty tensor costs as well
    allowed = FREE_VALUES + VALUES_PER_BYTE * length
    _require(claimed <= allowed, f"the tensors claim {claimed} values; of a file of {length} bytes at most {allowed} are read")
    sections = section_plan(entries)
    _require(len(lengths) == len(sections), f"{len(lengths)} sections for a tensor table that needs {len(sections)}")
    _require(sum(lengths) == length - body, "the lengths of the sections do not add up to the file")
    ends = np.cumsum([body, *lengths]).tolist()
    stored = [data[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return Opened(header, name, body, entries, sections, stored)


def read_section(opened: Opened, section: Section, stored: bytes) -> bytes:
    """The raw bytes of one stream, exactly section.raw_bytes of them. Raises ArtifactError."""
    by = COMPRESSORS[opened.compressor]
    if by.decode and section.own_coder:
        shapes = [opened.entries[i].shape for i in section.members]
        return by.decode(stored, [(rows, columns) for rows, columns in shapes])
    return exactly(by.decompress, opened.compressor, stored, section.raw_bytes)


def _store(section: Section, tensors: list[QTensor], by: Compressor, level: int) -> bytes:
    if by.encode and section.own_coder:
        return by.encode([codes for i in section.members if (codes := tensors[i].codes) is not None])
    return by.compress(join_section(section, tensors), level)


def _require(ok: Any, message: str) -> None:
    if not ok:
        raise ArtifactError(message)


def _parse_table(raw: bytes) -> tuple[dict[str, Any], list[Entry], list[int]]:
    try:
        table = parse_json(raw)
    except GolfError:
        raise ArtifactError("the header is not valid JSON") from None
    _require(isinstance(table, dict) and set(table) == {"header", "tensors", "sections"}, "the header lacks its three parts")
    header, rows, lengths = table["header"], table["tensors"], table["sections"]
    _require(isinstance(header, dict) and isinstance(rows, list) and isinstance(lengths, list), "the header has the wrong types")
    _require(all(_is_size(n) for n in lengths), "a section length is not a size")
    _require(len(rows) <= MAX_TENSORS, f"{len(rows)} tensors; at most {MAX_TENSORS} are read")
    entries = []
    for row in rows:
        _require(isinstance(row, list) and len(row) in (4, 5), "a line of the tensor table is not [name, kind, dtype, shape]")
        name, kind, dtype, shape = row[:4]
        _require(isinstance(name, str) and len(name) <= MAX_NAME, f"a tensor name is not a string of at most {MAX_NAME} characters")
        _require(isinstance(kind, str) and (kind in WIDTHS or kind in FLOATS), f"{name}: unknown kind {str(kind)[:MAX_NAME]!r}")
        _require(dtype in ("float32", "bfloat16"), f"{name}: unknown dtype {str(dtype)[:MAX_NAME]!r}")
        good = isinstance(shape, list) and len(shape) <= 4 and all(_is_size(n) for n in shape)
        _require(good, f"{name}: bad shape {str(shape)[:MAX_NAME]}")
        _require(kind not in WIDTHS or len(shape) == 2, f"{name}: {kind} codes need a matrix, shape is {shape}")
        groups = row[4] if len(row) > 4 else None
        divides = groups is None or (kind in WIDTHS and _is_size(groups) and groups > 0 and math.prod(shape) % groups == 0)
        _require(divides, f"{name}: {str(groups)[:20]} scales for codes of shape {shape}")
        entries.append(Entry(name, kind, dtype, tuple(shape), groups))
    _require(len({e.name for e in entries}) == len(entries), "a tensor name occurs twice")
    return header, entries, lengths


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 31


def join_section(section: Section, tensors: list[QTensor]) -> bytes:
    """The raw bytes of one stream: tensors one after the other, then split into byte planes."""
    raw = b"".join(np.ascontiguousarray(getattr(tensors[i], section.part)).tobytes() for i in section.members)
    return np.frombuffer(raw, np.uint8).reshape(-1, section.itemsize).T.tobytes()  # byte planes; codes have one


def _split(section: Section, raw: bytes, entries: list[Entry], arrays: list[dict[str, np.ndarray]]) -> None:
    flat = np.frombuffer(raw, np.uint8).reshape(section.itemsize, -1).T.tobytes()
    offset = 0
    for i in section.members:
        dtype, shape = entries[i].parts()[section.part]
        count = math.prod(shape)
        arrays[i][section.part] = np.frombuffer(flat, dtype, count, offset).reshape(shape)
        offset += count * dtype.itemsize
