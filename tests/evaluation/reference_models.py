"""The small reference models of tests/reference, and a still smaller one for tests of structure."""

from pathlib import Path

import jax
import numpy as np

from golf_jax.config import ModelConfig
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation import Stream
from golf_jax.interop.reference import Set
from golf_jax.model import Model, init_params, resolve


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
    """tests/reference/prN.npz: model, tokens and byte tables of one PR; rows of 32, stride 8."""

    seq_len = 32

    def __init__(self, pr: int, folder: Path) -> None:
        self.refs = Set(folder / f"pr{pr}.npz")
        case = self.refs.case("eval/standard")
        self.config, self.params = resolve(case.model, "cpu"), case.params
        self.tokens, self.tables = case.text

    def sums(self, name: str) -> tuple[float, int, int]:
        """Nats, targets and bytes of a case of `eval`."""
        own = self.refs.case(f"eval/{name}").own
        return float(own["nats"]), int(own["count"]), int(own["bytes"])


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
