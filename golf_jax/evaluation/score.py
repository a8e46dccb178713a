"""What an evaluation returns: sums of nats, tokens and bytes, the facts that decide whether it is legal, and the time it took."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from golf_jax.config import LIMIT_SECONDS, GolfError
from golf_jax.files import finite
from golf_jax.progress import Log, clock_seconds, patience

NORMALIZED = 1e-5  # largest |logsumexp(log p)| of a distribution


@dataclass(frozen=True)
class Score:
    """Sums over the scored targets. The score is bits per byte; nats, tokens and bytes always go with it."""

    nll_nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll_nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of text."""
        if not self.bytes:
            raise GolfError(f"{self.tokens} targets stand for 0 bytes of text: wrong tokenizer, or a sample without text")
        return self.nll_nats / math.log(2) / self.bytes

    def line(self) -> str:
        """`val_loss:... val_bpb:...` as the challenge's logs have it, and the three sums behind it."""
        return f"val_loss:{self.loss:.8f} val_bpb:{self.bpb:.8f} nats:{self.nll_nats:.6f} tokens:{self.tokens} bytes:{self.bytes}"


@dataclass(frozen=True)
class Facts:
    """Conditions C1-C4 of legal evaluation (issue 1017 of the challenge), as observed in this run."""

    targets: int
    """Targets of the stream."""
    covered: int
    """Distinct targets scored."""
    duplicates: int
    """Scores of targets that had been scored before (the tail windows of PRs 562, 638, 1182)."""
    order_violations: int
    """C3: scores of targets that an update had already used."""
    updates: int
    """Optimizer steps on validation tokens."""
    causal: bool | None = None
    """C1: flipping a token left every earlier distribution bit-equal (None: not checked)."""
    normalization_error: float | None = None
    """C2: largest |logsumexp(log p)| over all entries of the vocabulary at the sampled positions (None: not checked)."""

    @property
    def exactly_once(self) -> bool:
        """C4: every target scored exactly once."""
        return self.covered == self.targets and self.duplicates == 0

    @property
    def legal(self) -> bool:
        """No score used what it predicts: C1, C2 (where checked) and C3 hold."""
        return self.order_violations == 0 and self.causal is not False and self.normalized is not False

    @property
    def normalized(self) -> bool | None:
        """C2; NaN is a violation (None: not checked)."""
        return None if self.normalization_error is None else self.normalization_error <= NORMALIZED

    def lines(self) -> list[str]:
        unchecked = "not checked"
        c1 = unchecked if self.causal is None else ("ok, earlier distributions bit-equal" if self.causal else "VIOLATED")
        c2 = unchecked
        if self.normalized is not None:
            c2 = f"{'ok' if self.normalized else 'VIOLATED'}, |logsumexp| <= {self.normalization_error:.1e}"
        c3 = "ok" if not self.order_violations else f"VIOLATED for {self.order_violations} targets: trained on before they were scored"
        missing = self.targets - self.covered
        c4 = f"{self.covered} of {self.targets} targets scored, {missing} never, {self.duplicates} scores repeated"
        return [
            f"C1 causal: {c1}",
            f"C2 normalized: {c2}",
            f"C3 score before update: {c3} ({self.updates} updates)",
            f"C4 each target once: {'ok' if self.exactly_once else 'no'}, {c4}",
        ]


@dataclass(frozen=True)
class Trace:
    """Course of test-time training, one entry per chunk (score-first) or per optimizer step."""

    chunks: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    """nats, tokens, bytes of every chunk, float64 [chunks, 3]."""
    loss: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Mean training loss of every step before its update, nats per token."""
    grad_norm: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Global gradient norm of every step before clipping."""
    lr: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Base learning rate of every step."""
    params: dict[str, jax.Array] = field(default_factory=dict)
    """Weights after the last update, on the devices."""
    order: tuple[tuple[str, int, int], ...] = ()
    """Order log: ("score" or "update", first target, end target), in the order in which they were issued to the device."""
    loss_per_rank: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """`loss` by rank of the record's run, [updates, ranks]: each the mean over its own sequences, 0 where it has none."""


@dataclass(frozen=True)
class Result:
    """One evaluation."""

    mode: str
    """Name of the method."""
    score: Score
    facts: Facts
    seconds: dict[str, float]
    """Wall seconds per phase: compile, score, train, and hints, where there is a tilt."""
    share: float = 1.0
    """Share of the validation targets in this run; below 1 the result is partial."""
    trace: Trace | None = None
    scores: np.ndarray | None = None
    """Per-target nll, float32 [targets], NaN where unscored; only with `Stream.keep_scores`."""
    early: tuple[float, float] | None = None
    """(share of the work, seconds of all of it as projected then), when the first percent was done; for work of several phases."""

    @property
    def partial(self) -> bool:
        return self.share < 1

    @property
    def projected_seconds(self) -> float:
        """Time of the whole validation set, extrapolated from a partial run. Compilation not counted."""
        return clock_seconds(self.seconds) / self.share

    def line(self) -> str:
        """The score line. An illegal or partial number never appears without that word."""
        marks = ["ILLEGAL"] * (not self.facts.legal) + [f"PARTIAL({100 * self.share:.3g}%)"] * self.partial
        return " ".join([self.mode, *marks, self.score.line()])

    def lines(self) -> list[str]:
        """Score, facts and time, for the terminal."""
        phases = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        word = "projected for the whole set" if self.partial else "scoring and training"
        over = "within" if self.projected_seconds <= LIMIT_SECONDS else "OVER"
        time = f"time: {phases}; {word} {self.projected_seconds:.1f} s, {over} the {LIMIT_SECONDS:.0f} s limit on this machine"
        early = f"; after {self.early[0]:.2%} of the work {self.early[1]:.1f} s were projected" if self.early else ""
        return [self.line(), *self.facts.lines(), time + early]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able summary for result.json (without per-target scores and traces). None stands for what is not finite."""
        return finite(
            {
                "mode": self.mode,
                **asdict(self.score),
                "val_loss": self.score.loss,
                "val_bpb": self.score.bpb,
                "legal": self.facts.legal,
                "partial": self.partial,
                "share": self.share,
                "facts": asdict(self.facts) | {"exactly_once": self.facts.exactly_once},
                "seconds": self.seconds,
                "projected_seconds": self.projected_seconds,
                **({"early_projection": {"share": self.early[0], "seconds": self.early[1]}} if self.early else {}),
            }
        )


class Stopwatch:
    """Wall seconds per phase: `with watch("score"): ...` adds to `watch.seconds["score"]`. log hears when one phase takes long: compile."""

    def __init__(self, log: Log | None = None) -> None:
        self.log = log
        self.seconds: dict[str, float] = {"compile": 0.0, "score": 0.0, "train": 0.0}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        with patience(self.log if phase == "compile" else None, "compiling"):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """Sum of a float64 array over all processes; with one process the array itself."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    # As uint32 pairs: device arrays have no float64 unless jax_enable_x64 is on.
    gathered = multihost_utils.process_allgather(np.ascontiguousarray(values, np.float64).view(np.uint32))
    return np.ascontiguousarray(gathered).view(np.float64).sum(axis=0)
