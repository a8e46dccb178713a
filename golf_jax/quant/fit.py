"""Landing under the cap: one factor on the rounding steps of all integer tensors, solved in a few encode trials."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from golf_jax.config import GolfError, QuantConfig
from golf_jax.quant.schemes import FLOATS, QTensor, dequantize, quantize

MAX_STEP = 16.0


@dataclass(frozen=True)
class FitReport:
    """What the fit did and what it cost. Errors are relative RMS over all integer-coded tensors; scores are the caller's (bpb)."""

    factor: float
    """On every rule's `step`; 1.0: the recipe fitted as it was."""
    budget_bytes: int
    encoded_bytes: int
    trials: tuple[tuple[float, int], ...]
    """(factor, bytes) of every encode, in order."""
    error_before: float
    error_after: float
    score_before: float | None = None
    score_after: float | None = None

    def __str__(self) -> str:
        text = f"{self.encoded_bytes:,} of {self.budget_bytes:,} bytes at step x {self.factor:.4f} after {len(self.trials)} encodings"
        text += f"; relative quantization error {self.error_before:.5f} -> {self.error_after:.5f}"
        if self.score_before is not None and self.score_after is not None:
            text += f"; bpb {self.score_before:.5f} -> {self.score_after:.5f} ({self.score_after - self.score_before:+.5f})"
        return text


def scale_steps(config: QuantConfig, factor: float) -> QuantConfig:
    """`config` with the step of every integer rule multiplied; float rules have none."""
    rules = tuple(r if r.scheme in FLOATS else replace(r, step=r.step * factor) for r in config.rules)
    return replace(config, rules=rules)


def fit_to_cap(
    tensors: Mapping[str, np.ndarray],
    config: QuantConfig,
    budget_bytes: int,
    encode: Callable[[dict[str, QTensor]], int],
    *,
    hessians: Mapping[str, np.ndarray] | None = None,
    score: Callable[[dict[str, QTensor]], float] | None = None,
    slack: float = 0.002,
    max_trials: int = 8,
) -> tuple[QuantConfig, dict[str, QTensor], FitReport]:
    """(config, quantized tensors, report) with `encode(tensors) <= budget_bytes`.

    A recipe that fits is returned unchanged after one trial. Otherwise all steps grow by one factor, the least that fits to within
    `slack` of the budget: doubling a step takes about one bit per code, which gives the first guess, and false position on
    (log2 factor, bytes) the rest. encode: the real container with its compressor, code bytes included by the caller in the budget.
    score: measures the quantized model (bpb), called for the first and the last if they differ. Raises GolfError if even a step 16
    times as coarse does not fit.
    """
    trials: list[tuple[float, int]] = []

    def attempt(log_factor: float) -> tuple[QuantConfig, dict[str, QTensor], int]:
        candidate = scale_steps(config, 2.0**log_factor)
        quantized = quantize(tensors, candidate, hessians)
        size = encode(quantized)
        trials.append((2.0**log_factor, size))
        return candidate, quantized, size

    first = best = attempt(0.0)
    low, low_size = 0.0, first[2]  # largest factor known to be too small
    high, high_size = math.inf, 0  # smallest factor known to fit
    codes = sum(q.codes.size for q in first[1].values() if q.codes is not None)
    target = budget_bytes * (1 - slack / 2)
    while low_size > budget_bytes and len(trials) < max_trials and not (high_size >= budget_bytes * (1 - slack)):
        if math.isinf(high):
            guess = low + (low_size - target) * 8 / max(codes, 1) * 1.02
            guess = min(max(guess, low + 1e-4), low + 2, math.log2(MAX_STEP))
        else:
            guess = low + (high - low) * min(max((low_size - target) / (low_size - high_size), 0.05), 0.95)
        if guess <= low:
            break
        candidate = attempt(guess)
        if candidate[2] <= budget_bytes:
            best, high, high_size = candidate, guess, candidate[2]
        else:
            low, low_size = guess, candidate[2]
    if best[2] > budget_bytes:
        raise GolfError(
            f"quant: {trials[-1][1]:,} bytes at step x {trials[-1][0]:.2f} still exceed the budget of {budget_bytes:,}; "
            "give the model fewer parameters or its largest float tensors an integer rule"
        )
    report = FitReport(
        factor=next(f for f, size in reversed(trials) if size == best[2]),
        budget_bytes=budget_bytes,
        encoded_bytes=best[2],
        trials=tuple(trials),
        error_before=relative_error(tensors, first[1]),
        error_after=relative_error(tensors, best[1]),
        score_before=score(first[1]) if score and best is not first else None,
        score_after=score(best[1]) if score and best is not first else None,
    )
    return best[0], best[1], report


def relative_error(tensors: Mapping[str, np.ndarray], quantized: Mapping[str, QTensor]) -> float:
    """Root of (sum of squared errors / sum of squared weights) over the integer-coded tensors; 0 if there is none."""
    error = power = 0.0
    for name, q in quantized.items():
        if q.codes is not None:
            w = np.asarray(tensors[name]).astype(np.float32)
            error += float(np.square(dequantize(q).astype(np.float32) - w).sum(dtype=np.float64))
            power += float(np.square(w).sum(dtype=np.float64))
    return math.sqrt(error / power) if power else 0.0
