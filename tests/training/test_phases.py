"""Phases of a run, a ramp of the sequence length, and what a second run of a sweep compiles."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_recipes import tiny

from golf_jax.config import GolfError, ScheduleConfig
from golf_jax.data import make_loader
from golf_jax.mesh import make_mesh, put_replicated, rows
from golf_jax.model import resolve
from golf_jax.optim.schedules import Clock
from golf_jax.training.phases import phase_at, phases
from golf_jax.training.state import graph, init_state
from golf_jax.training.step import compile_step, step_inputs

pytestmark = pytest.mark.usefixtures("quick_compilation")

RAMP = ((0.0, 4), (0.5, 16))


def on_cpu(name):
    recipe = tiny(name)
    return replace(recipe, model=resolve(recipe.model, "cpu"))


def with_ramp(recipe):
    return replace(recipe, schedule=replace(recipe.schedule, seq_lens=RAMP))


def test_phases_come_in_the_order_of_the_run():
    recipe = tiny("pr2005", steps=100)  # depth recurrence from 35 %
    assert [p.name for p in phases(recipe)] == ["train", "train_looping"]
    assert [phase_at(recipe, Clock(s, 0.0)).looping for s in (34, 35)] == [False, True]
    assert [(p.name, p.rows) for p in phases(with_ramp(recipe))] == [("train_4", 32), ("train_looping_4", 32), ("train_looping_16", 8)]
    assert [phase_at(with_ramp(recipe), Clock(s, 0.0)).seq_len for s in (0, 49, 50, 99)] == [4, 4, 16, 16]
    assert [(p.name, p.looping) for p in phases(tiny("baseline"))] == [("train", True)]


@pytest.mark.parametrize("ramp", [((0.1, 4),), ((0.0, 4), (0.0, 8)), ((0.0, 4), (1.5, 8)), ((0.0, math.nan),), ((0.0, 5),), ((0.0, 0),)])
def test_a_ramp_that_cannot_be_is_refused(ramp):
    recipe = tiny("baseline")
    with pytest.raises(GolfError, match="seq_lens"):
        replace(recipe, schedule=replace(recipe.schedule, seq_lens=ramp))
    assert ScheduleConfig(seq_lens=RAMP).seq_lens == RAMP


def test_a_ramp_trains_on_the_same_tokens_in_shorter_sequences(tokens):
    """One step of the first phase is the step of a recipe of short sequences."""
    recipe, mesh = with_ramp(on_cpu("baseline")), make_mesh(2)
    short = replace(on_cpu("baseline"), data=replace(recipe.data, seq_len=4, rows_per_rank=4))
    after = []
    for r in (recipe, short):
        d = r.data
        batch = jax.device_put(make_loader(d.order, [tokens], d.ranks, d.rows_per_rank, d.seq_len).next_batch(), rows(mesh))
        step = compile_step(graph(r), mesh, phases(r)[0]).run
        after.append(step(init_state(r, mesh, 0), batch, put_replicated(mesh, step_inputs(r, Clock(0, 0.0)))))
    (one, metrics), (two, others) = after
    np.testing.assert_allclose(metrics.loss, others.loss, rtol=1e-6)
    np.testing.assert_allclose(one.params["up"], two.params["up"], atol=1e-6)


def test_a_second_run_of_a_sweep_compiles_nothing(tokens):
    """Other learning rates, decays, betas, momenta, clips and averages: the same programs, other numbers."""
    mesh, d = make_mesh(2), tiny("pr638").data
    batch = jax.device_put(make_loader(d.order, [tokens], d.ranks, d.rows_per_rank, d.seq_len).next_batch(), rows(mesh))

    def loss_after(recipe):
        state = init_state(recipe, mesh, 0)
        step = compile_step(graph(recipe), mesh, phases(recipe)[0]).run
        for i in range(3):
            state, metrics = step(state, batch, put_replicated(mesh, step_inputs(recipe, Clock(i, 0.0))))
        return float(metrics.loss), np.asarray(state.ema["up"])

    recipe = on_cpu("pr638")
    base = loss_after(recipe)
    compiled: list[str] = []
    listener = lambda name, *_, **__: compiled.append(name) if "compile" in name else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        changes = {
            "lr": {"lr": 0.01},
            "weight decay": {"weight_decay": 0.9},
            "betas": {"betas": (0.5, 0.6)},
            "eps": {"eps": 0.1},
            "momentum": {"momentum": 0.5, "momentum_start": 0.3},
        }
        for name, change in changes.items():
            reads = {"betas": "adamw", "eps": "adamw", "momentum": "muon"}.get(name)
            groups = tuple(replace(g, **change) if reads in (None, g.kind) else g for g in recipe.optim.groups)
            assert loss_after(replace(recipe, optim=replace(recipe.optim, groups=groups)))[0] != base[0], name
        assert loss_after(replace(recipe, optim=replace(recipe.optim, clip_norm=1e-3)))[0] != base[0]
        ema = loss_after(replace(recipe, schedule=replace(recipe.schedule, ema_decay=0.5)))
        assert ema[0] == base[0] and np.any(ema[1] != base[1])
    finally:
        jax._src.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
