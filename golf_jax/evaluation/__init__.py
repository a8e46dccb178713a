"""Scores in bits per byte: standard, sliding window, test-time training, and the facts that make them legal."""

from golf_jax.evaluation.methods import METHODS, methods_of, score, score_ahead
from golf_jax.evaluation.score import Facts, Result, Score
from golf_jax.evaluation.stream import Stream

__all__ = ["METHODS", "Facts", "Result", "Score", "Stream", "methods_of", "score", "score_ahead"]
