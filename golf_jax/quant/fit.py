"""Landing under the cap: one factor on the rounding steps of all integer tensors, solved in a few encode trials."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from golf_jax.config import GolfError, QuantConfig, QuantRule
from golf_jax.progress import Log
from golf_jax.quant.rules import quantize, without_hessians
from golf_jax.quant.schemes import FLOATS, SCHEMES, QTensor, dequantize

MAX_STEP = 16.0
MAX_TRIALS = 8
MIN_SIGMAS = 8.0
WIDER = {"gptq_int6": "gptq_int7", "int6_sdclip": "int7_sdclip"}


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
    """`config` with the step of every integer rule multiplied; float rules have none.

    Where a finer step would clip below `MIN_SIGMAS` standard deviations of a row, the rule gets a bit more: same step, twice the range.
    """

    def scaled(rule: QuantRule) -> QuantRule:
        if rule.scheme in FLOATS:
            return rule
        rule = replace(rule, step=rule.step * factor)
        scheme = SCHEMES[rule.scheme]
        clip = (rule.sigmas or scheme.sigmas) * rule.step
        if factor < 1 and clip and clip < MIN_SIGMAS and (wider := WIDER.get(rule.scheme)):
            rule = replace(rule, scheme=wider, sigmas=rule.sigmas or scheme.sigmas, step=rule.step * 63 / 31)
        return rule

    return replace(config, rules=tuple(map(scaled, config.rules)))


def fit_to_cap(
    tensors: Mapping[str, np.ndarray],
    config: QuantConfig,
    budget_bytes: int,
    encode: Callable[[dict[str, QTensor]], bytes],
    *,
    hessians: Mapping[str, np.ndarray] | None = None,
    score: Callable[[dict[str, QTensor]], float] | None = None,
    estimate: Callable[[dict[str, QTensor]], int] | None = None,
    slack: float = 0.002,
    log: Log | None = None,
) -> tuple[QuantConfig, bytes, FitReport]:
    """(config, encoded, report): the tensors quantized by `config` and encoded, in at most `budget_bytes`.

    A recipe that fits is returned unchanged after one trial, unless `config.margin` asks for the whole budget. Otherwise all steps get one
    factor, that which fits to within `slack` of the budget. `estimate`, the bytes by entropy, gives the first guess on plainly rounded
    weights (without it: doubling a step takes about one bit per code), and false position on (log2 factor, bytes) the rest.
    encode: the real container with its compressor; the caller takes the code's bytes, and the margin, off the budget.
    score: measures the quantized model (bpb), called for the first and the last if they differ. Raises GolfError if even a step 16
    times as coarse does not fit.
    """
    trials: list[tuple[float, int]] = []

    def attempt(log_factor: float) -> _Trial:
        candidate = scale_steps(config, 2.0**log_factor) if log_factor else config
        quantized = quantize(tensors, candidate, hessians, log)
        trial = _Trial(2.0**log_factor, candidate, quantized, encode(quantized))
        trials.append((trial.factor, len(trial.data)))
        return trial

    first = best = attempt(0.0)
    codes = sum(q.codes.size for q in first.quantized.values() if q.codes is not None)
    low, low_size, high, high_size = -math.inf, 0, math.inf, 0  # factors known to give too many bytes, and to fit
    target = budget_bytes * (1 - slack / 2)
    now, size = 0.0, len(first.data)
    while True:
        if size <= budget_bytes:
            high, high_size = now, size
        else:
            low, low_size = now, size
        full = high_size >= budget_bytes * (1 - slack) or (math.isinf(low) and config.margin < 0)
        if len(trials) >= MAX_TRIALS or not codes or (high_size and full):
            break
        if len(trials) == 1 and estimate:
            guess = _by_entropy(tensors, config, target * _over(estimate, tensors, config, size), estimate)
        elif math.isinf(high) or math.isinf(low):
            guess = now + (size - target) * 8 / codes * (1.02 if math.isinf(high) else 1)
            guess = max(guess, now + 1e-4) if math.isinf(high) else min(guess, now - 1e-4)
            guess = min(max(guess, now - 2), now + 2)
        else:
            guess = low + (high - low) * min(max((low_size - target) / (low_size - high_size), 0.05), 0.95)
        guess = min(max(guess, -math.log2(MAX_STEP)), math.log2(MAX_STEP))
        if guess == now or not low <= guess <= high:
            break
        candidate = attempt(guess)
        now, size = guess, len(candidate.data)
        if size <= budget_bytes and (len(best.data) > budget_bytes or size > len(best.data)):
            best = candidate
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


def _over(estimate: Callable[[dict[str, QTensor]], int], tensors: Mapping[str, np.ndarray], config: QuantConfig, size: int) -> float:
    """What the estimate of plain rounding is to the bytes that came out."""
    return estimate(quantize(tensors, without_hessians(config))) / max(size, 1)


def _by_entropy(
    tensors: Mapping[str, np.ndarray], config: QuantConfig, target: float, estimate: Callable[[dict[str, QTensor]], int]
) -> float:
    """log2 of the factor whose plainly rounded codes are estimated at `target` bytes, to 1/256."""
    plain = without_hessians(config)
    low, high = -2.0, math.log2(MAX_STEP)
    while high - low > 1 / 256:
        middle = (low + high) / 2
        if estimate(quantize(tensors, scale_steps(plain, 2.0**middle))) > target:
            low = middle
        else:
            high = middle
    return high


def relative_error(tensors: Mapping[str, np.ndarray], quantized: Mapping[str, QTensor]) -> float:
    """Root of (sum of squared errors / sum of squared weights) over the integer-coded tensors; 0 if there is none."""
    error = power = 0.0
    for name, q in quantized.items():
        if q.codes is not None:
            w = np.asarray(tensors[name]).astype(np.float32)
            error += float(np.square(dequantize(q).astype(np.float32) - w).sum(dtype=np.float64))
            power += float(np.square(w).sum(dtype=np.float64))
    return math.sqrt(error / power) if power else 0.0
