"""Both forms that the AdamW benchmark compares compute the same update."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from tiny_recipes import tiny

from golf_jax.mesh import make_mesh

DIRECTORY = Path(__file__).resolve().parents[2] / "benchmarks"


def test_replicated_and_sharded_state_give_the_same_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(DIRECTORY))
    spec = importlib.util.spec_from_file_location("adamw_state", DIRECTORY / "adamw_state.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes, forms = module.forms(tiny("pr638"), 2)
    rng = np.random.default_rng(0)
    start, grads = ({n: rng.normal(size=s.shape).astype(np.float32) for n, s in shapes.items()} for _ in range(2))
    ends = {}
    for name, (update, state, layout) in forms.items():
        step = jax.shard_map(update, mesh=make_mesh(2), in_specs=(P(), P(), layout), out_specs=(P(), layout), check_vma=False)
        zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), state)
        params, state = jax.jit(step)(start, grads, zeros)
        ends[name], _ = jax.jit(step)(params, grads, state)
    for n in shapes:
        assert np.abs(np.asarray(ends["sharded"][n]) - start[n]).max() > 0.01
        np.testing.assert_allclose(ends["sharded"][n], ends["replicated"][n], rtol=1e-6, atol=1e-7, err_msg=n)
