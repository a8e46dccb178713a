"""What every check of `golf_jax.reproduce` is made of: comparisons with tolerances, and their results."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from golf_jax.config import GolfError

Measure = Literal["abs", "of max", "rel L2", "rel", "equal", "change", "sigmas"]
MEASURES = get_args(Measure)
# What is raised of text for numbers, null for a table, ... in a set; a fault of ours would look the same.
MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def bars_of(given: Any, item: str, tensor: str, shape: tuple[int, ...]) -> list[tuple[dict[str, Any], Any]]:
    """The tolerances `given` (one, or a list tried in order) that hold for an item of that tensor and shape, each with the part it is for.

    GolfError for what is no tolerance, and where a part of the item has none: it would count as compared.
    """
    bars, found, done = given if isinstance(given, list) else [given], [], 0
    for bar in bars:
        number = type(bar.get("value")) in (int, float) and bar.get("measure") in MEASURES if isinstance(bar, dict) else False
        if not number or type(bar.get("until", 1)) is not int or not isinstance(bar.get("names", ""), str):
            measures = ", ".join(MEASURES)
            raise GolfError(f"tolerance of {item}: measure is one of {measures}, value a number, until one, names text; found {bar}")
    for bar in bars:
        if any(part in tensor for part in bar.get("names", "").split("|")):
            found.append((bar, slice(done, bar.get("until")) if "until" in bar or done else ()))
            done = bar.get("until", done)
            if "until" not in bar:
                return found
    if not done or done < (shape or (0,))[0]:
        raise GolfError(f"no tolerance for {item}{f' from its entry {done} on' if done else ''}")
    return found


@dataclass
class CheckResult:
    """One row of the table: pairs (ours, reference) under one tolerance.

        row = CheckResult("grads", 1e-3, "rel L2"); row.add("grad/tok_emb.weight", ours, reference); row.ok

    A reference that is zero throughout is compared absolutely. NaN, infinity and a wrong shape fail.
    """

    name: str
    tolerance: float
    measure: Measure
    """What the tolerance limits: the absolute error, the error relative to the tensor's maximum, its relative L2 norm, every element's
    relative error, (`equal`) the fraction of unequal elements, (`change`) the L2 norm relative to that of the change, or (`sigmas`) the
    distance in standard errors."""
    compared: int = 0
    """Tensors (or numbers) compared."""
    max_abs: float = 0.0
    max_rel: float = 0.0
    """Largest relative error in the check's own measure (`abs`, `equal`: of the tensor's maximum)."""
    error: float = -1.0
    """The largest of what the tolerance limits; infinity where something fails for a reason that is not a number."""
    worst: str = "nothing to compare"
    """The tensor with the largest error, or what failed."""

    @property
    def ok(self) -> bool:
        return self.compared > 0 and self.error <= self.tolerance

    def add(self, key: str, ours: Any, reference: Any, start: Any = None) -> None:
        """start: what `change` counts from."""
        ours, reference = np.asarray(ours), np.asarray(reference)
        self.compared += 1
        if ours.shape != reference.shape:
            return self._fail(f"{key}: shape {ours.shape}, reference {reference.shape}")
        a, b = ours.astype(np.float64), reference.astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return self._fail(f"{key}: not finite")
        if self.measure == "change" and start is None:
            return self._fail(f"{key}: nothing to measure the change from")
        absolute = float(np.abs(a - b).max(initial=0.0))
        error, relative = self._errors(a, b, absolute, np.zeros(()) if start is None else np.asarray(start, np.float64))
        self.max_abs, self.max_rel = max(self.max_abs, absolute), max(self.max_rel, relative)
        if error > self.error:
            self.error, self.worst = error, key

    def _errors(self, a: np.ndarray, b: np.ndarray, absolute: float, start: np.ndarray) -> tuple[float, float]:
        """(what the tolerance limits, the relative error shown)."""
        scale = float(np.abs(b).max(initial=0.0))
        of_max = absolute / scale if scale else absolute
        if self.measure in ("abs", "sigmas"):
            return absolute, of_max
        if self.measure == "of max" or not a.size:
            return of_max, of_max
        if self.measure == "equal":
            return float((a != b).mean()), of_max
        if self.measure == "rel":
            worst = float((np.abs(a - b) / np.where(b == 0, 1, np.abs(b))).max())
            return worst, worst
        norm = float(np.linalg.norm(b - start if self.measure == "change" else b))
        l2 = float(np.linalg.norm(a - b)) / (norm or 1.0)
        return l2, l2

    def _fail(self, why: str) -> None:
        if self.error != np.inf:
            self.error, self.worst = np.inf, why
