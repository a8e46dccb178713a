"""The byte ledger: where the bytes of an artifact go, against the cap, and how far each stream is from its entropy."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from golf_jax.artifact.compressors import COMPRESSORS
from golf_jax.artifact.container import Section, flatten, inspect, join_section, read_section, section_plan, table_of
from golf_jax.config import CAP_BYTES, escape
from golf_jax.quant import QTensor

HEADER_ALLOWANCE = 1_200  # prefix, config and tensor table of the five recipes take 0.8 to 1.1 kB
FLOAT_RATE = 0.98  # stored bytes per byte of entropy, of scales and floats


@dataclass(frozen=True)
class Line:
    """One stream of the artifact."""

    label: str
    tensors: int
    items: int
    entropy_bytes: float
    """Order-0 entropy of the bytes, per byte plane: what coding symbol by symbol would need."""
    stored_bytes: int


@dataclass(frozen=True)
class ByteLedger:
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
        row = "{:<24} {:>7} {:>11} {:>11} {:>11} {:>9}"
        rows = [row.format("stream", "tensors", "values", "entropy", "stored", "bits/val")]
        for line in self.lines:
            bits = f"{8 * line.stored_bytes / line.items:.3f}"
            entropy, stored = f"{line.entropy_bytes:,.0f}", f"{line.stored_bytes:,}"
            rows.append(row.format(escape(line.label)[:24], line.tensors, f"{line.items:,}", entropy, stored, bits))
        sums = {"header": self.header_bytes, "model": self.model_bytes, "code": self.code_bytes, "total": self.total_bytes}
        sums[f"headroom to {self.cap_bytes:,}"] = self.headroom_bytes
        rows += [row.format(name, "", "", "", f"{n:,}", "").rstrip() for name, n in sums.items()]
        return "\n".join(rows) + ("" if self.headroom_bytes >= 0 else " OVER CAP")


def ledger(data: bytes, code_bytes: int = 0) -> ByteLedger:
    """The ledger of an artifact's bytes; code_bytes: what the code adds (see `golf_jax.artifact.code`). Raises ArtifactError."""
    opened = inspect(data)
    lines = []
    for section, stored in zip(opened.sections, opened.stored, strict=True):
        raw = read_section(opened, section, stored)
        lines.append(_line(section, raw, len(stored)))
    return ByteLedger(tuple(lines), opened.header_bytes, code_bytes)


def estimate_bytes(qtensors: Mapping[str, QTensor], compressor: str) -> int:
    """Bytes the artifact will take, from entropies alone: a fraction of a second for a full-size model, so it can run at every
    evaluation of a training run. Within 0.4 % for synthetic full-size recipes (docs/artifact.md)."""
    flat = flatten(qtensors)
    tensors = list(flat.values())
    total = HEADER_ALLOWANCE
    for section in section_plan(table_of(flat)):
        rate = COMPRESSORS[compressor].code_rate if section.part == "codes" else FLOAT_RATE
        total += rate * _entropy_bytes(join_section(section, tensors), section.itemsize)
    return round(total)


def _line(section: Section, raw: bytes, stored: int) -> Line:
    items = section.raw_bytes // section.itemsize
    return Line(section.label, len(section.members), items, _entropy_bytes(raw, section.itemsize), stored)


def _entropy_bytes(raw: bytes, planes: int) -> float:
    total = 0.0
    for plane in np.frombuffer(raw, np.uint8).reshape(planes, -1):
        counts = np.bincount(plane, minlength=256)
        counts = counts[counts > 0]
        total += float((counts * np.log2(counts.sum() / counts)).sum()) / 8
    return total
