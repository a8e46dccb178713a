"""Training on an array of tokens."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import KEPT

from golf_jax.config import Recipe
from golf_jax.data import make_loader
from golf_jax.data.prefetch import local_rows
from golf_jax.interrupt import Signals
from golf_jax.mesh import make_mesh
from golf_jax.model import resolve
from golf_jax.training.checkpoints import Checkpoints
from golf_jax.training.keep import Keeper
from golf_jax.training.loop import Trained, train
from golf_jax.training.rundir import RunDir
from golf_jax.training.state import state_shapes


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """A stream with something to learn: each token is a function of the one before, or noise."""
    rng = np.random.default_rng(0)
    out = rng.integers(0, 64, 40_000)
    for i in np.flatnonzero(rng.random(len(out)) < 0.7):
        out[i] = (5 * out[i - 1] + 7) % 64
    return out.astype(np.uint16)


@pytest.fixture
def run_training(tokens: np.ndarray) -> Callable[..., Trained]:
    """train(recipe) on the token stream, in a run directory of its own; with `resume` from its newest checkpoint."""

    def run(
        recipe: Recipe, path: Path, *, devices: int = 8, resume: bool = False, loader: Any = None, signals: Any = None, **options: Any
    ) -> Trained:
        recipe, mesh, d = replace(recipe, model=resolve(recipe.model, "cpu")), make_mesh(devices), recipe.data
        own = local_rows(mesh, d.batch_shape[0])
        source = make_loader(d.order, [tokens], d.ranks, d.rows_per_rank, d.seq_len, own)
        with closing(RunDir(path, resume=resume)) as directory, closing(Checkpoints(path / "checkpoints")) as checkpoints:
            directory.write("config.json", "{}")
            keeper = Keeper(recipe, checkpoints, directory, signals or Signals(), KEPT)
            found = checkpoints.restore(state_shapes(recipe, mesh), directory.log) if resume else None
            return train(recipe, mesh, loader(source) if loader else source, directory, keeper, found=found, **options)

    return run
