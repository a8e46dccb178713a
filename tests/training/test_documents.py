"""Packed documents in training: devices and interruptions change nothing, documents do not see each other, what the record leaks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_recipes import SHIPPED, tiny

from golf_jax.config import GolfError, PackedConfig
from golf_jax.data import make_loader
from golf_jax.mesh import make_mesh, put_replicated, rows
from golf_jax.model import init_params, leaves, nll, resolve
from golf_jax.optim.schedules import Clock
from golf_jax.plan import border, check_text
from golf_jax.training import loop
from golf_jax.training.leak import leaked_momentum, momentum_leaks
from golf_jax.training.phases import phases
from golf_jax.training.state import init_state
from golf_jax.training.step import make_step, micro_rows, step_inputs

pytestmark = pytest.mark.usefixtures("quick_compilation")
BOS = 1


@pytest.fixture
def recipe():
    made = tiny("pr2135", steps=6, rows_per_rank=2)
    return replace(made, model=resolve(made.model, "cpu", documents=True), log_every=1)


@pytest.fixture
def small(recipe):
    """Two plain layers and one phase, on two ranks: compiles in seconds."""
    off = {"loop_start": -1, "loop_end": -1, "loop_repeats": 0, "two_lanes_from": -1}
    schedule, data = replace(recipe.schedule, loop_from=0.0, leak_momentum_steps=2), replace(recipe.data, ranks=2)
    return replace(recipe, model=replace(recipe.model, num_layers=2, **off), schedule=schedule, data=data)


def loader_of(recipe, tokens):
    d = recipe.data
    return make_loader(d.order, [tokens], d.ranks, d.rows_per_rank, d.seq_len)


def test_the_shape_of_a_step(recipe):
    assert recipe.data.batch_shape == (8, 32) and micro_rows(recipe, 8) == micro_rows(recipe, 2) == 1
    assert [(p.name, p.seq_len, p.rows) for p in phases(recipe)] == [("train", 32, 8), ("train_looping", 32, 8)]
    with pytest.raises(GolfError, match="packed rows are not cut"):
        replace(recipe, schedule=replace(recipe.schedule, seq_lens=((0.0, 8),)))
    with pytest.raises(GolfError, match="does not divide over 16 devices"):
        micro_rows(recipe, 16)


def distance(one, other):
    """Relative L2 distance of all parameters."""
    pairs = [(np.asarray(x, np.float64), np.asarray(other.params[name], np.float64)) for name, x in one.params.items()]
    return np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(a**2) for a, _ in pairs))


@pytest.mark.slow
def test_devices_change_no_more_than_rounding_does_as_run(recipe, run_training, tmp_path, monkeypatch):
    """Per-rank clips, the momentum of the discarded steps and segments included.

    The record's bfloat16 gradients and Newton-Schulz make a last bit of a weight grow to 1e-2 of some scales in six steps, on the same
    device, so the bar is what moving the first weights by 6e-8 does. In float32 it is 1e-5, below.
    """
    recipe = replace(recipe, numerics="as_run", model=replace(recipe.model, bf16_params=()))
    plain = tuple(replace(g, bf16_momentum=False) if g.kind == "muon" else g for g in recipe.optim.groups)
    recipe = replace(recipe, optim=replace(recipe.optim, groups=plain), schedule=replace(recipe.schedule, leak_momentum_steps=1))
    one, two, eight = (run_training(recipe, tmp_path / str(n), devices=n) for n in (1, 2, 8))
    assert "Muon starts with the momentum of 1 discarded steps" in (tmp_path / "8/log.txt").read_text()

    def moved(*arguments):
        state, signs = init_state(*arguments), np.random.default_rng(0)
        params = {n: x * (1 + 6e-8 * signs.choice([-1, 1], x.shape)).astype(x.dtype) for n, x in state.params.items()}
        return state._replace(params={n: jax.device_put(x, state.params[n].sharding) for n, x in params.items()})

    monkeypatch.setattr(loop, "init_state", moved)
    bar = distance(one, run_training(recipe, tmp_path / "moved", devices=1))
    assert 0 < bar < 0.01 and distance(one, two) < 1.5 * bar and distance(one, eight) < 1.5 * bar


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_devices_do_not_change_what_is_learned_in_float32(recipe, run_training, tmp_path, devices):
    one, many = (run_training(recipe, tmp_path / str(n), devices=n) for n in (1, devices))
    for name, value in one.params.items():
        np.testing.assert_allclose(value, many.params[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_resume_is_bit_for_bit(recipe, run_training, tmp_path):
    """Stopped within the phase with depth recurrence, as the record's rounding has it."""
    recipe = replace(recipe, numerics="as_run", checkpoint_every=4, schedule=replace(recipe.schedule, leak_momentum_steps=1))

    class Dies:
        def __init__(self, source):
            self.source = source

        def __getattr__(self, name):
            return getattr(self.source, name)

        def next_batch(self):
            if self.source.batches == 5:
                raise RuntimeError("the disk is gone")
            return self.source.next_batch()

    whole = run_training(recipe, tmp_path / "whole", devices=2)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        run_training(recipe, tmp_path / "dies", devices=2, loader=Dies)
    resumed = run_training(recipe, tmp_path / "dies", devices=2, resume=True)
    assert "resumed at step 4" in (tmp_path / "dies/log.txt").read_text()
    for name, value in whole.params.items():
        assert np.asarray(value).tobytes() == np.asarray(resumed.params[name]).tobytes(), name


def test_only_muons_momentum_survives_the_discarded_steps(small, tokens):
    recipe = small
    assert not momentum_leaks(recipe) and momentum_leaks(replace(recipe, numerics="as_run"))
    assert not momentum_leaks(replace(recipe, numerics="as_run", data=replace(recipe.data, ranks=1)))
    mesh, loader = make_mesh(2), loader_of(recipe, tokens)
    state = init_state(recipe, mesh, 0)
    before, position = jax.tree.map(np.asarray, state), loader.state()
    state = leaked_momentum(recipe, mesh, state, loader, [make_step(recipe, mesh, phases(recipe)[-1])])
    assert loader.state() == position
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(state.opt["matrix"]))
    for part in ("params", "ema", "stale"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, part), getattr(state, part))
    for group in ("token", "vector"):
        jax.tree.map(np.testing.assert_array_equal, before.opt[group], state.opt[group])


def test_the_step_sees_segments(small, tokens):
    """The loss of a step is that of the model inside documents, and no other."""
    recipe = small
    mesh, batch = make_mesh(1), loader_of(recipe, tokens).next_batch()
    key = jax.random.key(3)
    params = {n: p + 0.1 * jax.random.normal(key, p.shape) for n, p in init_params(recipe.model, key).items()}
    state = init_state(recipe, mesh, 0, params)
    mean = jax.jit(lambda segments: jnp.mean(nll(recipe.model, params, batch.inputs, batch.targets, segments_BT=segments, training=True)))
    losses = [float(mean(batch.segments)), float(mean(None))]
    inputs = put_replicated(mesh, step_inputs(recipe, Clock(0, 0.0)))
    _, metrics = make_step(recipe, mesh, phases(recipe)[-1])(state, jax.device_put(batch, rows(mesh)), inputs)
    np.testing.assert_allclose(metrics.loss, losses[0], rtol=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-4


def test_with_the_fix_a_recipe_does_not_look_over_the_border(small):
    looks_over_the_border_only_without_the_fix(small.model, training=False)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*SHIPPED, "pr2135"])
def test_with_the_fix_no_recipe_looks_over_the_border(name, training):
    looks_over_the_border_only_without_the_fix(resolve(tiny(name).model, "cpu", documents=True), training)


def looks_over_the_border_only_without_the_fix(model, training):
    """Another middle document changes no score of the other two, where documents start with the boundary token. Where they start with
    another one, as if there were no fix, exactly the models leak of which the log says so."""
    model, rng, segments = replace(model, boundary_token=BOS), np.random.default_rng(0), np.array([[0] * 7 + [1] * 8 + [2] * 9] * 4)
    params = {  # no gate or map is shut
        n: (0.3 * rng.standard_normal(leaf.shape) + (leaf.role in ("vector", "softcap"))).astype(np.float32)
        for n, leaf in leaves(model).items()
    }
    x = rng.integers(3, 64, 25)
    other = x.copy()
    other[8:15] = (x[8:15] + 17) % 61 + 3
    rows = np.stack([x, other, x, other])
    rows[:, [0, 7, 15]] = np.array([BOS, BOS, 2, 2])[:, None]
    run = jax.jit(lambda p, x: nll(model, p, x[:, :-1], x[:, 1:], segments_BT=segments, training=training))
    scores = np.asarray(run(params, rows))
    fixed, as_run = scores[0] != scores[1], scores[2] != scores[3]
    inside = (np.arange(24) >= 7) & (np.arange(24) < 15)  # the last of them predicts the start of the next document
    assert fixed[inside].all() and not fixed[~inside].any()
    assert not as_run[:7].any() and as_run[15:].any() == ("mixes" in border(replace(model, boundary_token=-1), BOS))


def test_the_border_between_documents_is_told(recipe):
    model = recipe.model
    assert "smear mixes the first token" in border(model, BOS) and "--model.boundary-token 1" in border(model, BOS)
    assert "nothing looks over the border" in border(replace(model, boundary_token=BOS), BOS)
    assert "nothing looks over the border" in border(replace(model, input_smear_gate=False), BOS)
    with_hash = replace(model, input_smear_gate=False, bigram_buckets=8, bigram_dim=4)
    assert "bigram mixes" in border(with_hash, BOS)
    recipe = replace(recipe, eval=replace(recipe.eval, packed=PackedConfig(rows=2, seq_len=32, ranks=4)))
    check_text(recipe, 10_000, BOS)
    with pytest.raises(GolfError, match="100 validation tokens fill no stream of 2 rows of 32"):
        check_text(recipe, 100, BOS)
    with pytest.raises(GolfError, match="documents of this text start with BOS 1"):
        check_text(replace(recipe, model=replace(model, boundary_token=5)), 10_000, BOS)
