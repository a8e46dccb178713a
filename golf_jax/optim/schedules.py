"""Host-side schedules: plain floats that enter the compiled step as traced scalars.

Two clocks (docs/recipes, section 4): on elapsed training seconds, as the records ran, or on steps, as their own fallback does and as a
reproducible run needs.
"""

from dataclasses import dataclass

from golf_jax.config import BudgetConfig, GroupConfig, ScheduleConfig


@dataclass(frozen=True)
class Clock:
    """Where a run stands when a step starts."""

    step: int
    seconds: float
    """Elapsed training time: compilation, evaluation and pauses excluded."""


def fraction(budget: BudgetConfig, clock: Clock) -> float:
    """Share of the run that is over."""
    return clock.step / budget.steps if budget.steps else clock.seconds / budget.seconds


def lr_factor(schedule: ScheduleConfig, budget: BudgetConfig, clock: Clock) -> float:
    """Factor of every learning rate: 1, then a linear warmdown to `lr_floor`. There is no warm-up in any of the recipes."""
    floor = schedule.lr_floor
    if schedule.warmdown_frac:
        frac = fraction(budget, clock)
        return 1.0 if frac < 1 - schedule.warmdown_frac else max((1 - frac) / schedule.warmdown_frac, floor)
    if budget.steps:
        left = budget.steps - clock.step
        return floor + (1 - floor) * left / schedule.warmdown_steps if 0 < left <= schedule.warmdown_steps else 1.0
    # The records' estimate: warmdown_steps at the average step time so far.
    left = max(budget.seconds - clock.seconds, 0.0)
    window = schedule.warmdown_steps * clock.seconds / max(clock.step, 1)
    return floor + (1 - floor) * left / max(window, 1e-12) if left <= window else 1.0


def muon_momentum(group: GroupConfig, step: int) -> float:
    """Linear warm-up from `momentum_start` to `momentum` over the first `momentum_warmup_steps` steps."""
    f = min(step / group.momentum_warmup_steps, 1.0) if group.momentum_warmup_steps else 1.0
    return (1 - f) * group.momentum_start + f * group.momentum


def fake_quant_strength(schedule: ScheduleConfig, factor: float) -> float:
    """1 where late QAT acts, else 0."""
    return float(schedule.fake_quant_below >= 1 or factor < schedule.fake_quant_below)


def swa_collects(schedule: ScheduleConfig, factor: float, steps_done: int) -> bool:
    """Whether the weights after this step enter the stochastic weight average."""
    return bool(schedule.swa_every) and factor < schedule.swa_below and steps_done % schedule.swa_every == 0
