"""The PyTorch peer computes what golf_jax computes: otherwise the ratio of their step times would mean nothing."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from golf_jax.config import DataConfig, EvalConfig, GolfError, Recipe, SlidingConfig, load_recipe
from golf_jax.data.loader import Batch
from golf_jax.mesh import make_mesh
from golf_jax.model import init_params, leaves, to_tensors
from golf_jax.model.params import tensor_names
from golf_jax.optim.schedules import Clock
from golf_jax.training.phases import phases
from golf_jax.training.state import init_state
from golf_jax.training.step import make_step, step_inputs

torch = pytest.importorskip("torch", reason="the peer needs PyTorch (pip install golf-jax[torch])")
PEER = Path(__file__).resolve().parents[2] / "benchmarks" / "torch_peer.py"


@pytest.fixture(scope="module")
def peer():
    spec = importlib.util.spec_from_file_location("torch_peer", PEER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny(name: str) -> Recipe:
    recipe = load_recipe(name)
    small = dict(vocab_size=64, num_layers=4, width=32, num_heads=4, num_kv_heads=2, rope_dims=4, dtype="float32", attention="xla")
    small["xsa_last_n"] = min(recipe.model.xsa_last_n, 3)
    if recipe.model.loop_repeats:
        small |= dict(loop_start=1, loop_end=1, parallel_from=3)
    if recipe.model.bigram_buckets:
        small |= dict(bigram_buckets=32, bigram_dim=8)
    return replace(
        recipe,
        model=replace(recipe.model, **small),
        data=DataConfig(seq_len=24, ranks=2, rows_per_rank=2),
        eval=EvalConfig(sliding=SlidingConfig(stride=8)),
        numerics="fp32",
        micro_rows=2,
    )


def live_params(recipe: Recipe):
    """No zero matrices: a fresh model would hide most of the network behind its zero output projections."""
    fresh = init_params(recipe.model, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(fresh))
    return {n: p + 0.05 * jax.random.normal(k, p.shape) for k, (n, p) in zip(keys, fresh.items(), strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "looping"), [("quickstart", False), ("baseline", False), ("pr638", False), ("pr2005", True)])
def test_three_steps_have_the_same_losses(peer, name, looping):
    recipe = tiny(name)
    params = live_params(recipe)
    tensors, roles = to_tensors(recipe.model, params), {t: leaves(recipe.model)[n].role for t, (n, _) in tensor_names(recipe.model).items()}
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 64, (4, 24)).astype(np.int32) for _ in range(2))

    mesh = make_mesh(1)
    state = init_state(recipe, mesh, 0, params)
    groups = tuple(replace(g, momentum=0.9, momentum_warmup_steps=0) if g.kind == "muon" else g for g in recipe.optim.groups)
    step = make_step(recipe, mesh, phases(recipe)[-1 if looping else 0])
    inputs = step_inputs(replace(recipe, optim=replace(recipe.optim, groups=groups)), Clock(0, 0.0))._replace(lr_factor=np.float32(0.7))
    ours = []
    for _ in range(3):
        state, metrics = step(state, Batch(x, y), inputs)
        ours.append(float(metrics.loss))

    trainer = peer.Trainer(recipe, tensors, roles, "cpu", compile=False)
    trainer.model.looping = looping
    xt, yt = (torch.from_numpy(a).long() for a in (x, y))
    theirs = [float(trainer.step(xt, yt, 0.7, 0.9, rows=2)) for _ in range(3)]

    assert abs(ours[0] - theirs[0]) < 1e-5, "loss of the same parameters on the same batch"
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4, err_msg="losses after updates: the optimizers differ")
    assert abs(ours[2] - ours[0]) > 1e-2, "the steps changed nothing: the comparison of the optimizers is empty"


def test_refuses_parts_it_does_not_have(peer):
    recipe = load_recipe("pr1182")
    with pytest.raises(GolfError, match="model.fake_quant.matrices"):
        peer.check_supported(recipe)
