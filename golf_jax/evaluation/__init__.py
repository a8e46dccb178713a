"""Scores in bits per byte: standard, sliding window, test-time training, and the facts that make them legal."""

from golf_jax.evaluation.fixed import evaluate_sliding, evaluate_standard
from golf_jax.evaluation.score import Facts, Result, Score
from golf_jax.evaluation.ttt import evaluate_ttt

__all__ = ["Facts", "Result", "Score", "evaluate_sliding", "evaluate_standard", "evaluate_ttt"]
