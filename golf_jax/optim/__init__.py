"""Muon and AdamW by parameter role, schedules, weight averages."""

from golf_jax.optim.muon import StackLayout, newton_schulz, scale_by_muon
from golf_jax.optim.optimizer import make_optimizer

__all__ = ["StackLayout", "make_optimizer", "newton_schulz", "scale_by_muon"]
