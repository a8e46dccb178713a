"""The small reference models of tests/golden, and a still smaller one for tests of structure."""

import json
from pathlib import Path

import jax
import numpy as np

from golf_jax.config import ModelConfig
from golf_jax.data.tokenizer import ByteTables
from golf_jax.interop import from_torch
from golf_jax.model import init_params


class Portable:
    """tests/golden/prN.npz: model, tokens and byte tables of one PR; rows of 32, stride 8."""

    def __init__(self, pr: int, folder: Path) -> None:
        self.z = dict(np.load(folder / f"pr{pr}.npz"))
        state = {k.removeprefix("param/"): x for k, x in self.z.items() if k.startswith("param/")}
        self.config, self.params = from_torch(f"pr{pr}", json.loads(str(self.z["config"])), state)
        self.tokens = self.z["eval_tokens"].astype(np.uint16)
        tables = {k: x for k, x in self.z.items() if k.startswith("lut")}
        base, space, boundary = (next(x for k, x in tables.items() if p in k) for p in ("base_bytes", "leading_space", "boundary"))
        self.tables = ByteTables(base.astype(np.int16), space.astype(bool), boundary.astype(bool))

    def sums(self, tag: str) -> tuple[float, int, int]:
        return float(self.z[f"{tag}/nll_sum"]), int(self.z[f"{tag}/token_count"]), int(self.z[f"{tag}/byte_count"])


class Tiny:
    """Two layers on random tokens: compiles fast, and tests/evaluation/naive.py can follow it."""

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
