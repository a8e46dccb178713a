"""Landing under the cap: one factor on the rounding steps of all integer tensors, solved in a few encode trials."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from golf_jax.config import GolfError, QuantConfig
from golf_jax.quant.rules import quantize
from golf_jax.quant.schemes import FLOATS, QTensor, dequantize

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


@dataclass(frozen=True)
class _Trial:
    factor: float
    config: QuantConfig
    quantized: dict[str, QTensor]
    data: bytes


def scale_steps(config: QuantConfig, factor: float) -> QuantConfig:
    """`config` with the step of every integer rule multiplied; float rules have none."""
    rules = tuple(r if r.scheme in FLOATS else replace(r, step=r.step * factor) for r in config.rules)
    return replace(config, rules=rules)


def fit_to_cap(
    tensors: Mapping[str, np.ndarray],
    config: QuantConfig,
    budget_bytes: int,
    encode: Callable[[dict[str, QTensor]], bytes],
    *,
    hessians: Mapping[str, np.ndarray] | None = None,
    score: Callable[[dict[str, QTensor]], float] | None = None,
    slack: float = 0.002,
    max_trials: int = 8,
) -> tuple[QuantConfig, bytes, FitReport]:
    """(config, encoded, report): the tensors quantized by `config` and encoded, in at most `budget_bytes`.

    A recipe that fits is returned unchanged after one trial. Otherwise all steps grow by one factor, the least that fits to within
    `slack` of the budget: doubling a step takes about one bit per code, which gives the first guess, and false position on
    (log2 factor, bytes) the rest. encode: the real container with its compressor; the caller takes the code's bytes off the budget.
    score: measures the quantized model (bpb), called for the first and the last if they differ. Raises GolfError if even a step 16
    times as coarse does not fit.
    """
    trials: list[tuple[float, int]] = []

    def attempt(log_factor: float) -> _Trial:
        candidate = scale_steps(config, 2.0**log_factor)
        quantized = quantize(tensors, candidate, hessians)
        trial = _Trial(2.0**log_factor, candidate, quantized, encode(quantized))
        trials.append((trial.factor, len(trial.data)))
        return trial

    first = best = attempt(0.0)
    low, low_size = 0.0, len(first.data)  # largest factor known to be too small
    high, high_size = math.inf, 0  # smallest factor known to fit
    codes = sum(q.codes.size for q in first.quantized.values() if q.codes is not None)
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
        size = len(candidate.data)
        if size <= budget_bytes:
            best, high, high_size = candidate, guess, size
        else:
            low, low_size = guess, size
    if len(best.data) > budget_bytes:
        raise GolfError(
            f"quant: {trials[-1][1]:,} bytes at step x {trials[-1][0]:.2f} still exceed the budget of {budget_bytes:,}; "
            "give the model fewer parameters or its largest float tensors an integer rule"
        )
    report = FitReport(
        factor=best.factor,
        budget_bytes=budget_bytes,
        encoded_bytes=len(best.data),
        trials=tuple(trials),
        error_before=relative_error(tensors, first.quantized),
        error_after=relative_error(tensors, best.quantized),
        score_before=score(first.quantized) if score and best is not first else None,
        score_after=score(best.quantized) if score and best is not first else None,
    )
    return best.config, best.data, report


def relative_error(tensors: Mapping[str, np.ndarray], quantized: Mapping[str, QTensor]) -> float:
    """Root of (sum of squared errors / sum of squared weights) over the integer-coded tensors; 0 if there is none."""
    error = power = 0.0
    for name, q in quantized.items():
        if q.codes is not None:
            w = np.asarray(tensors[name]).astype(np.float32)
            error += float(np.square(dequantize(q).astype(np.float32) - w).sum(dtype=np.float64))
            power += float(np.square(w).sum(dtype=np.float64))
    return math.sqrt(error / power) if power else 0.0
