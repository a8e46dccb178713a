"""Muon and AdamW by parameter role, schedules, weight averages."""

from golf_jax.optim.muon import StackLayout, newton_schulz
from golf_jax.optim.optimizer import make_optimizer

__all__ = ["StackLayout", "make_optimizer", "newton_schulz"]
