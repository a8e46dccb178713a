"""Is a difference between runs real? Welch's one-sided t-test and paired differences, in nats per token."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtr

MARGIN_NATS, LEVEL = 0.005, 0.01  # the written rule of the challenge


@dataclass(frozen=True)
class Test:
    """gain: mean nats per token by which the candidate is better; p: chance of such a gain if the true one were `margin`."""

    gain: float
    p: float
    t: float
    degrees: float


def t_test(candidate: Sequence[float], baseline: Sequence[float]) -> Test | None:
    """One-sided test that mean(baseline) - mean(candidate) > MARGIN_NATS, variances unequal (Welch 1947).

    A baseline of one number is taken as exact. None where nothing can be tested: fewer than two candidates, or no spread at all.
    """
    if len(candidate) < 2 or not baseline:
        return None
    parts = [statistics.variance(x) / len(x) if len(x) > 1 else 0.0 for x in (candidate, baseline)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return None
    weights = [part**2 / (len(x) - 1) for part, x in zip(parts, (candidate, baseline), strict=True) if len(x) > 1]
    gain = statistics.fmean(baseline) - statistics.fmean(candidate)
    return _test(gain, error, sum(parts) ** 2 / sum(weights), MARGIN_NATS)


def paired_test(candidate: Mapping[int, float], baseline: Mapping[int, float], margin: float = MARGIN_NATS) -> Test | None:
    """The same on the differences of runs with the same seed; None with fewer than two such pairs or equal differences."""
    gains = [baseline[seed] - candidate[seed] for seed in sorted(candidate.keys() & baseline.keys())]
    if len(gains) < 2 or (spread := statistics.stdev(gains)) == 0:
        return None
    return _test(statistics.fmean(gains), spread / math.sqrt(len(gains)), len(gains) - 1, margin)


def _test(gain: float, error: float, degrees: float, margin: float) -> Test:
    t = (gain - margin) / error
    return Test(gain, float(stdtr(degrees, -t)), t, degrees)
