"""Phases of a run: what changes the compiled graph while training, as values. Each is compiled before the clock starts."""

from dataclasses import dataclass

from golf_jax.config import Recipe
from golf_jax.optim.schedules import Clock, fraction


@dataclass(frozen=True)
class Phase:
    """One compiled step of a run. Every phase trains on the same tokens per step, cut into `rows` sequences of `seq_len`."""

    name: str
    looping: bool
    """Depth recurrence is on (always, where the model has none to switch on)."""
    seq_len: int
    rows: int
    """Sequences of the global batch."""


def phase_at(recipe: Recipe, clock: Clock) -> Phase:
    """The phase of the step that starts at `clock`."""
    return _at(recipe, fraction(recipe.budget, clock))


def phases(recipe: Recipe) -> tuple[Phase, ...]:
    """Every phase of the run, in its order."""
    starts = sorted({0.0, recipe.schedule.loop_from, *(start for start, _ in recipe.schedule.seq_lens)})
    return tuple(dict.fromkeys(_at(recipe, start) for start in starts))


def _at(recipe: Recipe, fraction: float) -> Phase:
    loops = bool(recipe.model.loop_repeats) and recipe.schedule.loop_from > 0
    looping = not loops or fraction >= recipe.schedule.loop_from
    seq_len = ([recipe.data.batch_shape[1]] + [length for start, length in recipe.schedule.seq_lens if start <= fraction])[-1]
    name = "train" + "_looping" * (loops and looping) + f"_{seq_len}" * bool(recipe.schedule.seq_lens)
    return Phase(name, looping, seq_len, recipe.data.batch_tokens // seq_len)
