"""The byte ledger: where the bytes of an artifact go, against the cap, and how far each stream is from its entropy."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from golf_jax.artifact.container import Entry, Section, inspect, join_section, read_section, section_plan
from golf_jax.config import CAP_BYTES
from golf_jax.quant import QTensor

HEADER_ALLOWANCE = 1_200  # prefix, config and tensor table of the five recipes take 0.8 to 1.1 kB
CODE_RATE = {"zstd": 1.009, "lzma": 1.027, "brotli": 1.006, "rans": 0.997}  # stored bytes per byte of entropy, measured at full size
FLOAT_RATE = 0.98


@dataclass(frozen=True)
class Line:
    """One stream of the artifact."""

    label: str
    tensors: int
    items: int
    raw_bytes: int
    entropy_bytes: float
    """Order-0 entropy of the bytes, per byte plane: what coding symbol by symbol would need."""
    stored_bytes: int


@dataclass(frozen=True)
class Ledger:
    """All bytes that count. total = header + streams + code; headroom is negative over the cap."""

    lines: tuple[Line, ...]
    header_bytes: int
    code_bytes: int
    cap_bytes: int = CAP_BYTES

    @property
    def model_bytes(self) -> int:
        return self.header_bytes + sum(line.stored_bytes for line in self.lines)

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.code_bytes

    @property
    def headroom_bytes(self) -> int:
        return self.cap_bytes - self.total_bytes

    def table(self) -> str:
        """The ledger as text, one line per stream."""
        row = "{:<28} {:>7} {:>11} {:>11} {:>11} {:>11} {:>9}"
        rows = [row.format("stream", "tensors", "values", "raw bytes", "entropy", "stored", "bits/val")]
        for line in self.lines:
            bits = f"{8 * line.stored_bytes / line.items:.3f}"
            entropy, stored = f"{line.entropy_bytes:,.0f}", f"{line.stored_bytes:,}"
            rows.append(row.format(line.label, line.tensors, f"{line.items:,}", f"{line.raw_bytes:,}", entropy, stored, bits))
        rows.append(row.format("header", "", "", "", "", f"{self.header_bytes:,}", ""))
        rows.append(row.format("model", "", "", "", "", f"{self.model_bytes:,}", ""))
        if self.code_bytes:
            rows.append(row.format("code", "", "", "", "", f"{self.code_bytes:,}", ""))
        rows.append(row.format("total", "", "", "", "", f"{self.total_bytes:,}", ""))
        over = "" if self.headroom_bytes >= 0 else "   OVER THE CAP"
        rows.append(row.format(f"headroom to {self.cap_bytes:,}", "", "", "", "", f"{self.headroom_bytes:,}", "") + over)
        return "\n".join(line.rstrip() if not line.endswith("CAP") else line for line in rows)


def ledger(data: bytes, code_bytes: int = 0) -> Ledger:
    """The ledger of an artifact's bytes; code_bytes: what the code adds (see `golf_jax.artifact.code`). Raises ArtifactError."""
    opened = inspect(data)
    lines = []
    for section, stored in zip(opened.sections, opened.stored, strict=True):
        raw = read_section(opened, section, stored)
        lines.append(_line(section, raw, len(stored)))
    return Ledger(tuple(lines), opened.header_bytes, code_bytes)


def estimate_bytes(qtensors: Mapping[str, QTensor], compressor: str) -> int:
    """Bytes the artifact will take, from entropies alone: a fraction of a second for a full-size model, so it can run at every
    evaluation of a training run. Within 0.4 % for synthetic full-size recipes (docs/artifact.md)."""
    entries = [Entry(name, q.kind, q.dtype, tuple(q.shape)) for name, q in qtensors.items()]
    tensors = list(qtensors.values())
    total = HEADER_ALLOWANCE
    for section in section_plan(entries):
        rate = CODE_RATE[compressor] if section.part == "codes" else FLOAT_RATE
        total += rate * _entropy_bytes(join_section(section, tensors), section.itemsize)
    return round(total)


def _line(section: Section, raw: bytes, stored: int) -> Line:
    items = section.raw_bytes // section.itemsize
    return Line(section.label, len(section.members), items, len(raw), _entropy_bytes(raw, section.itemsize), stored)


def _entropy_bytes(raw: bytes, planes: int) -> float:
    total = 0.0
    for plane in np.frombuffer(raw, np.uint8).reshape(planes, -1):
        counts = np.bincount(plane, minlength=256)
        counts = counts[counts > 0]
        total += float((counts * np.log2(counts.sum() / counts)).sum()) / 8
    return total
