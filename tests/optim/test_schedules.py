"""Learning-rate factor, momentum and phases, by hand; the records' own values are in test_reproduce."""

import pytest

from golf_jax.config import BudgetConfig, GroupConfig, ScheduleConfig
from golf_jax.optim.schedules import Clock, fake_quant_strength, lr_factor, muon_momentum, swa_collects

STEPS = BudgetConfig(steps=100)
CLOCK = BudgetConfig(seconds=600.0)


@pytest.mark.parametrize(("step", "want"), [(0, 1.0), (79, 1.0), (80, 1.0), (90, 0.55), (99, 0.145), (100, 1.0)])
def test_warmdown_on_steps_ends_at_the_floor(step, want):
    schedule = ScheduleConfig(warmdown_steps=20, lr_floor=0.1)
    assert lr_factor(schedule, STEPS, Clock(step, 0.0)) == pytest.approx(want, abs=1e-12)


def test_warmdown_longer_than_the_run_starts_below_one():
    assert lr_factor(ScheduleConfig(warmdown_steps=200), STEPS, Clock(0, 0.0)) == pytest.approx(0.5)


def test_no_warmdown_stays_at_one():
    assert lr_factor(ScheduleConfig(warmdown_steps=0), STEPS, Clock(99, 0.0)) == 1.0


@pytest.mark.parametrize(("frac", "want"), [(0.0, 1.0), (0.279, 1.0), (0.64, 0.5), (1.0, 0.0)])
def test_warmdown_by_fraction_on_either_clock(frac, want):
    schedule = ScheduleConfig(warmdown_frac=0.72)
    assert lr_factor(schedule, CLOCK, Clock(7, 600 * frac)) == pytest.approx(want, abs=1e-9)
    assert lr_factor(schedule, BudgetConfig(steps=1000), Clock(round(1000 * frac), 0.0)) == pytest.approx(want, abs=1e-9)


def test_warmdown_on_the_clock_uses_the_average_step_time():
    schedule = ScheduleConfig(warmdown_steps=1000)
    assert lr_factor(schedule, CLOCK, Clock(0, 0.0)) == 1.0
    assert lr_factor(schedule, CLOCK, Clock(4000, 400.0)) == 1.0  # 0.1 s per step: the window is the last 100 s
    assert lr_factor(schedule, CLOCK, Clock(5500, 550.0)) == pytest.approx(0.5)
    assert lr_factor(schedule, CLOCK, Clock(6000, 600.5)) == 0.0


def test_momentum_warms_up_linearly():
    group = GroupConfig("all", ("matrix",), "muon", momentum=0.99, momentum_start=0.92, momentum_warmup_steps=1500)
    assert [muon_momentum(group, s) for s in (0, 750, 1500, 9000)] == pytest.approx([0.92, 0.955, 0.99, 0.99])


def test_quantization_and_averaging_begin_where_the_factor_is_low():
    assert [fake_quant_strength(ScheduleConfig(fake_quant_below=b), f) for b, f in ((0.0, 0.1), (0.5, 0.5), (0.5, 0.49), (1.0, 1.0))] == [
        0.0, 0.0, 1.0, 1.0,
    ]  # fmt: skip
    swa = ScheduleConfig(swa_every=50, swa_below=0.4)
    assert [swa_collects(swa, f, s) for f, s in ((0.39, 100), (0.4, 100), (0.39, 101))] == [True, False, False]
