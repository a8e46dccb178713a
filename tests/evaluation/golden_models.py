"""The small reference models of tests/golden, and a still smaller one for tests of structure."""

from pathlib import Path

import jax
import numpy as np

from golf_jax.config import ModelConfig
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation import Stream
from golf_jax.interop.checks.base import Context
from golf_jax.interop.checks.evaluation import byte_tables
from golf_jax.model import Model, init_params


class Case:
    """A model and the tokens to score."""

    seq_len: int
    config: ModelConfig
    params: dict
    tokens: np.ndarray
    tables: ByteTables

    @property
    def model(self) -> Model:
        return Model(self.config, self.params)

    def stream(self, rows: int = 4, max_targets: int = 0) -> Stream:
        return Stream.of(self.tokens, self.tables, self.seq_len, rows, max_targets)


class Portable(Case):
    """tests/golden/prN.npz: model, tokens and byte tables of one PR; rows of 32, stride 8."""

    seq_len = 32

    def __init__(self, pr: int, folder: Path) -> None:
        context = Context(f"pr{pr}", folder / f"pr{pr}.npz")
        self.z, model = context.file("portable"), context.model("portable")
        self.config, self.params = model.config, model.params
        self.tokens = self.z["eval_tokens"].astype(np.uint16)
        self.tables = byte_tables(self.z)

    def sums(self, tag: str) -> tuple[float, int, int]:
        return float(self.z[f"{tag}/nll_sum"]), int(self.z[f"{tag}/token_count"]), int(self.z[f"{tag}/byte_count"])


class Tiny(Case):
    """Two layers on random tokens: compiles fast, and tests/evaluation/naive.py can follow it."""

    seq_len = 16
    config = ModelConfig(
        vocab_size=40, num_layers=2, width=16, num_heads=4, num_kv_heads=2, mlp_ratio=2.0, dtype="float32", attention="xla"
    )

    def __init__(self, tokens: int = 16 * 24 + 1) -> None:
        rng = np.random.default_rng(0)
        fresh = init_params(self.config, jax.random.key(0))
        # Noise on everything: output projections start at zero, and a zero path would test nothing.
        self.params = {n: np.asarray(p) + 0.3 * rng.standard_normal(p.shape).astype(np.float32) for n, p in fresh.items()}
        self.tokens = rng.integers(0, 40, tokens).astype(np.uint16)
        self.tables = ByteTables(rng.integers(0, 6, 40).astype(np.int16), rng.random(40) < 0.3, np.arange(40) < 4)
