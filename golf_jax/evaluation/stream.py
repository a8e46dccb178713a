"""What an evaluation reads: a stream of tokens, how its bytes are counted, and in which portions it is worked through."""

from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import Mesh

from golf_jax.data.sidecar import Sidecar
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation.windows import truncate
from golf_jax.mesh import platform

CPU_TOKENS, ACCELERATOR_TOKENS = 1 << 10, 1 << 16  # per device and forward pass: caches, and filling the device


@dataclass(frozen=True)
class Stream:
    """Targets to be scored, in order. All of what is given is scored; `of` cuts to whole rows as every recipe does."""

    tokens: np.ndarray
    """uint16 [targets + 1]"""
    tables: ByteTables | Sidecar
    seq_len: int
    """Targets per row, and tokens of context at most."""
    rows: int = 0
    """Sequences per device and forward pass (`eval.batch_rows`)."""
    share: float = 1.0
    """Share of the validation text's whole rows that this is; below 1 every result says PARTIAL."""
    keep_scores: bool = False
    """Results carry the nll of every target."""

    @classmethod
    def of(cls, tokens: np.ndarray, tables: ByteTables | Sidecar, seq_len: int, rows: int = 0, max_targets: int = 0) -> "Stream":
        """The whole rows of `tokens` [n]; max_targets: about this many, for a quick look (0: all). Raises GolfError without one row."""
        used = truncate(tokens, seq_len, max_targets)
        return cls(used, tables, seq_len, rows, (len(used) - 1) / ((len(tokens) - 1) // seq_len * seq_len))

    @property
    def targets(self) -> int:
        return len(self.tokens) - 1

    def batch_rows(self, mesh: Mesh) -> int:
        """Sequences per device and forward pass. Automatic: 1,024 tokens on a CPU, 65,536 elsewhere, one sequence at least."""
        return self.rows or max(1, (CPU_TOKENS if platform(mesh) == "cpu" else ACCELERATOR_TOKENS) // self.seq_len)

    def first_batch(self, mesh: Mesh) -> "Stream":
        """One batch of the standard evaluation: scoring it compiles the program for all of them."""
        return self.beginning(mesh.size * self.batch_rows(mesh) * self.seq_len)

    def beginning(self, targets: int) -> "Stream":
        """About the first `targets`, whole rows and one at least."""
        used = truncate(self.tokens, self.seq_len, targets)
        return replace(self, tokens=used, share=self.share * (len(used) - 1) / self.targets)


def first_documents(tokens: np.ndarray, bos_id: int, documents: int) -> int:
    """Targets in the first `documents` documents; 0 if there are no more than those."""
    starts = np.flatnonzero(tokens == bos_id)
    return int(starts[documents]) - 1 if documents < len(starts) else 0
