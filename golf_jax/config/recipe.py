"""Everything else a run needs, and the recipe that holds it all."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from golf_jax.config.base import check, check_finite, countable, not_negative, positive
from golf_jax.config.evaluation import EvalConfig
from golf_jax.config.model import ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and in which order they are trained on."""

    train: str = "embedded"
    """Glob of training shards, or `embedded`: the corpus made from this Python's own documentation."""
    val: str = ""
    """Glob of validation shards (none with `embedded`)."""
    tokenizer: str = ""
    """SentencePiece model file (none with `embedded`)."""
    order: Literal["stream", "shuffled", "documents"] = "stream"
    """`stream`: consecutive spans per rank (PRs 372, 562, 638, 1182); `shuffled`: random sequences per rank (PR 2005); `documents`: one
    packed row per rank, attention inside documents cut at `seq_len` (PR 2135)."""
    seq_len: int = 2048
    ranks: int = 8
    """Ranks whose data order is reproduced; independent of how many devices run it."""
    rows_per_rank: int = 48
    """Sequences per rank and step; batch tokens = ranks * rows_per_rank * seq_len. `documents`: one row, so many times seq_len."""

    def __post_init__(self):
        positive(self, "data", "seq_len", "ranks", "rows_per_rank")
        countable(self, "data", "ranks")
        if self.train == "embedded":
            given = " and ".join(f"data.{name}" for name in ("val", "tokenizer") if getattr(self, name))
            check(not given, f"data.train is the embedded corpus, which has its own: {given} would not be read; give data.train, too")
        else:
            check(bool(self.val), "data.val is empty: give the glob of the validation shards")
            check(bool(self.tokenizer), "data.tokenizer is empty: give the SentencePiece model file")

    @property
    def batch_tokens(self) -> int:
        return self.ranks * self.rows_per_rank * self.seq_len

    @property
    def packed(self) -> bool:
        """Every rank has one row of documents, and attention stays inside them."""
        return self.order == "documents"

    @property
    def batch_shape(self) -> tuple[int, int]:
        """(sequences of all ranks, tokens of each) of a step, as the model sees them."""
        return (self.ranks, self.rows_per_rank * self.seq_len) if self.packed else (self.ranks * self.rows_per_rank, self.seq_len)

    @property
    def rank_rows(self) -> int:
        """Sequences of one rank, as the model sees them."""
        return 1 if self.packed else self.rows_per_rank


@dataclass(frozen=True)
class GroupConfig:
    """One optimizer group: which parameter roles, which rule, and the rule's settings. A setting the rule does not read stays as it is."""

    name: str
    roles: tuple[str, ...]
    """Roles of golf_jax.model.params: matrix, gate, proj, token, table, vector, trigram, softcap."""
    kind: Literal["muon", "adamw", "frozen"]
    lr: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW: decay of the two moments."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""
    momentum: float = 0.99
    """Muon: after the warm-up from `momentum_start` over `momentum_warmup_steps` steps."""
    momentum_start: float = 0.92
    momentum_warmup_steps: int = 1500
    newton_schulz_steps: int = 5
    newton_schulz_coefficients: tuple[tuple[float, float, float], ...] = ((3.4445, -4.7750, 2.0315),)
    """Muon: (a, b, c) of X <- a X + (b A + c A A) X with A = X X^T; one for all steps, or one per step (Polar Express, PR 2135)."""
    row_normalize: bool = False
    """MuonEq-R: rows of the Nesterov update are normalised before Newton-Schulz (PR 2005)."""
    bf16_momentum: bool = False
    """PR 1182's Muon: momentum and averaged matrix gradients in bfloat16 when `numerics = "as_run"`, and its rounding order."""

    def __post_init__(self):
        where = f"optim.groups ({self.name})"
        for f in fields(self):
            check_finite(getattr(self, f.name), f"{where}.{f.name}")
            read = f.name in ("name", "roles", "kind", *_READS.get(self.kind, ()))
            check(read or getattr(self, f.name) == f.default, f"{where}: kind {self.kind!r} does not read {f.name}")
        not_negative(self, where, "lr", "weight_decay", "momentum_warmup_steps")
        for name, values in (("betas", self.betas), ("momentum", (self.momentum,)), ("momentum_start", (self.momentum_start,))):
            check(all(0 <= v < 1 for v in values), f"{where}.{name} must be in 0..1 and below 1, got {getattr(self, name)}")
        positive(self, where, "eps", "newton_schulz_steps")
        given, steps = len(self.newton_schulz_coefficients), self.newton_schulz_steps
        check(steps <= MAX_NEWTON_SCHULZ, f"{where}.newton_schulz_steps must be at most {MAX_NEWTON_SCHULZ}, got {steps}")
        check(given in (1, steps), f"{where}.newton_schulz_coefficients: give one triple, or one for each of {steps} steps, not {given}")


_MOMENTUM = ("momentum", "momentum_start", "momentum_warmup_steps")
MAX_NEWTON_SCHULZ = 100  # each is compiled; 5 are enough, and a million never end
_NEWTON_SCHULZ = ("newton_schulz_steps", "newton_schulz_coefficients", "row_normalize", "bf16_momentum")
_READS = {"muon": ("lr", "weight_decay", *_MOMENTUM, *_NEWTON_SCHULZ), "adamw": ("lr", "weight_decay", "betas", "eps"), "frozen": ()}


@dataclass(frozen=True)
class OptimConfig:
    """Groups with a rule each; all learning rates share one factor over time, all gradients one norm."""

    groups: tuple[GroupConfig, ...] = (
        GroupConfig("matrix", ("matrix", "proj", "gate"), "muon", 0.025, 0.04),
        GroupConfig("token", ("token", "table"), "adamw", 0.035, 0.04),
        GroupConfig("vector", ("vector",), "adamw", 0.025, 0.04),
    )
    decay_last: bool = False
    """Weight decay after the update, on the updated weight (PR 372); otherwise before it."""
    clip_norm: float = 0.3
    """Global L2 norm of the gradient; 0 switches clipping off."""
    clip_per_rank: bool = False
    """Clip each rank's own gradient before averaging (PR 1182)."""

    def __post_init__(self):
        names, roles = [g.name for g in self.groups], [r for g in self.groups for r in g.roles]
        for name in names:
            check(names.count(name) == 1, f"optim.groups: two groups have the name {name!r}")
        for r in roles:
            check(roles.count(r) == 1, f"optim.groups: role {r!r} is claimed by two groups")
        not_negative(self, "optim", "clip_norm")
        check(not (self.clip_per_rank and self.clip_norm <= 0), "optim.clip_per_rank needs optim.clip_norm > 0")

    @property
    def leaks_frozen_gradients(self) -> bool:
        """Gradients of frozen parameters are never cleared and enter the clip norm (docs/recipes/pr1182.md, section 7.1)."""
        return self.clip_per_rank and any(g.kind == "frozen" for g in self.groups)


@dataclass(frozen=True)
class BudgetConfig:
    """When training ends: `steps` if positive, otherwise the wall clock."""

    steps: int = 0
    """Fixed number of steps: schedules run on steps and the run is bit-reproducible. 0: schedules run on elapsed time."""
    seconds: float = 600.0
    """Training clock: excludes compilation, evaluation and pauses. PR 2005 trains 588 s and keeps 12 s for GPTQ."""

    def __post_init__(self):
        not_negative(self, "budget", "steps", "seconds")
        check(self.steps > 0 or self.seconds > 0, "budget: give budget.steps or a positive budget.seconds")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate factor, phases and averaging over a run."""

    warmdown_steps: int = 3500
    """Linear warmdown over the last N steps (in clock mode: over N times the measured step time)."""
    warmdown_frac: float = 0.0
    """If positive: warmdown over this fraction of the run instead (PR 2005: 0.72)."""
    lr_floor: float = 0.0
    """Factor at the end of the warmdown (PR 372: 0.1)."""
    loop_from: float = 0.0
    """Depth recurrence starts at this fraction of the run (PR 2005: 0.35)."""
    seq_lens: tuple[tuple[float, int], ...] = ()
    """Ramp of the sequence length: (from this fraction of the run, tokens), the first from 0. Each divides `data.seq_len`, whose
    sequences are cut: tokens per step and their order stay. Empty: `data.seq_len` throughout."""
    ema_decay: float = 0.997
    """Exponential average of all parameters from the initial weights; 0 switches it off."""
    swa_every: int = 0
    """Stochastic weight averaging: add the weights every N steps ..."""
    swa_below: float = 0.0
    """... while the learning-rate factor is below this (PR 562: 0.4)."""
    export: Literal["raw", "ema", "swa"] = "ema"
    """Which weights become the model."""
    fake_quant_below: float = 0.0
    """Late QAT: fake quantization in training once the factor is below this; 0 never, 1 and more: from step 0 (PR 372)."""
    leak_warmup_steps: int = 0
    """PR 1182 only: discarded warm-up steps whose gradients of frozen parameters leak into the run (20 there)."""
    leak_momentum_steps: int = 0
    """PR 2135 only: discarded warm-up steps of every phase (20 there) whose Muon momentum the run starts with, where `numerics` is `as_run`
    and `data.ranks` above 1, as in its distributed runs."""

    def __post_init__(self):
        for name in ("warmdown_frac", "lr_floor", "loop_from", "ema_decay"):
            check(0 <= getattr(self, name) <= 1, f"schedule.{name} must be in 0..1, got {getattr(self, name)}")
        not_negative(self, "schedule", "warmdown_steps", "swa_every", "swa_below", "fake_quant_below")
        not_negative(self, "schedule", "leak_warmup_steps", "leak_momentum_steps")
        check(self.ema_decay < 1, f"schedule.ema_decay must be below 1, got {self.ema_decay}")
        starts = [start for start, _ in self.seq_lens]
        ramp = not starts or (starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < 1)
        check(ramp, f"schedule.seq_lens must start at 0 and rise below 1, got {', '.join(map(str, starts))}")
        check(self.export != "ema" or self.ema_decay > 0, "schedule.export 'ema' needs schedule.ema_decay > 0")
        check(self.export != "swa" or self.swa_every > 0, "schedule.export 'swa' needs schedule.swa_every > 0")


@dataclass(frozen=True)
class QuantRule:
    """First match wins: tensors whose name contains `pattern` and have more than `min_numel` elements get `scheme`."""

    pattern: str
    """Substring of the tensor name (`blocks.3.attn.c_q.weight`); empty matches all. `|` separates alternatives, `blocks.-1.` is the
    last layer, whatever their number."""
    scheme: str
    """Name of a scheme of golf_jax.quant.schemes (int6_row, int5_row, int8_percentile, gptq_int6, float16, ...)."""
    min_numel: int = 0
    max_numel: int = 0
    """Only tensors with at most this many elements; 0: no limit."""
    step: float = 1.0
    """Multiplies the scheme's rounding step: above 1 coarser and smaller, 1 exactly as the PR. `quant.fit_to_cap` solves for it."""
    sigmas: float = 0.0
    """Clip at so many standard deviations of the row, for the schemes that do (PR 2135: by group of tensors); 0: the scheme's own."""

    def __post_init__(self):
        check(0 <= self.sigmas < math.inf, f"quant.rules: sigmas must be >= 0, got {self.sigmas} (pattern {self.pattern!r})")
        check(0 < self.step < math.inf, f"quant.rules: step must be positive, got {self.step} (pattern {self.pattern!r})")
        for name in ("min_numel", "max_numel"):
            check(getattr(self, name) >= 0, f"quant.rules: {name} must be >= 0, got {getattr(self, name)} (pattern {self.pattern!r})")


@dataclass(frozen=True)
class LowRankConfig:
    """Coded low-rank correction of the tensors that quantization hurts most (PR 2135: LQER)."""

    rank: int = 0
    """0: no correction (PR 2135: 4)."""
    top: int = 3
    """Corrected tensors: those with the largest norm of what their codes miss."""
    group: int = 32
    """Consecutive elements of the second factor per scale; what it does not divide gets a scale per row in both factors."""

    def __post_init__(self):
        not_negative(self, "quant.lowrank", "rank")
        positive(self, "quant.lowrank", "top", "group")


@dataclass(frozen=True)
class QuantConfig:
    """How weights become integer codes and bytes."""

    rules: tuple[QuantRule, ...] = (
        QuantRule("", "float16", max_numel=8192),
        QuantRule("", "int6_row"),
    )
    prune_fraction: float = 0.0
    """Magnitude pruning before quantization (PR 562: 0.03)."""
    prune_min_numel: int = 65_536
    """Only 2-D tensors with more elements than this are pruned."""
    lowrank: LowRankConfig = LowRankConfig()
    gptq_batches: int = 0
    """Calibration batches for the Hessians of GPTQ schemes (PR 2005: 64)."""
    margin: int = -1
    """Bytes that artifact and code are to stay below the cap: one factor on all steps, up or down, is solved for it. -1: the steps are the
    rules', coarser only where the cap asks for it."""
    compressor: str = "zstd"
    """zstd, lzma, brotli or rans (golf_jax.artifact.compressors).

    `rans` is this project's own coder for integer codes, 1 to 2 % smaller (docs/artifact.md); scales and floats by brotli."""
    level: int = 22
    """zstd 1..22, lzma 0..9, brotli and rans 0..11."""

    def __post_init__(self):
        check(0 <= self.prune_fraction < 1, f"quant.prune_fraction must be in 0..1, got {self.prune_fraction}")
        not_negative(self, "quant", "prune_min_numel", "gptq_batches")
        check(self.margin >= -1, f"quant.margin must be -1 or a number of bytes, got {self.margin}")


@dataclass(frozen=True)
class Recipe:
    """Everything a run needs. `python -m golf_jax.train RECIPE --section.field value` overrides any field."""

    name: str
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    budget: BudgetConfig = BudgetConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    quant: QuantConfig = QuantConfig()
    eval: EvalConfig = EvalConfig()
    numerics: Literal["as_run", "fp32"] = "as_run"
    """`as_run`: `model.bf16_params`, their moments and Newton-Schulz in bfloat16, initial weights rounded to bfloat16, as the
    records do; `fp32`: everything float32."""
    micro_rows: int | Literal["auto"] = 0
    """Sequences per device and forward pass (gradient accumulation); 0: as many as one rank has; `auto`: of what one rank has the most
    that fit the device's memory, known from the compiled step before the run."""
    seed: int = 1337
    checkpoint_every: int = 0
    """Save a checkpoint every N steps; 0: about once a minute of training. The last two are kept, and the final state always."""
    log_every: int = 50

    def __post_init__(self):
        r = self
        check_finite(r)
        fixed = 0 if r.micro_rows == "auto" else r.micro_rows
        for name, value in (("micro_rows", fixed), ("checkpoint_every", r.checkpoint_every)):
            check(value >= 0, f"{name} must be >= 0, got {value}")
        check(r.log_every > 0, f"log_every must be positive, got {r.log_every}")
        has_fake_quant = r.model.fake_quant.matrices != "none"
        check(
            r.schedule.fake_quant_below == 0 or has_fake_quant,
            "schedule.fake_quant_below is set but model.fake_quant.matrices is 'none'",
        )
        for name in ("score_first", "adapt_first"):
            check(not getattr(r.eval, name).fake_quant or has_fake_quant, f"eval.{name}.fake_quant needs model.fake_quant.matrices")
        r.eval.check_length(r.data.seq_len)
        for _, length in r.schedule.seq_lens:
            fits = length > 0 and r.data.seq_len % length == 0
            check(fits, f"schedule.seq_lens: {length} must be positive and divide data.seq_len {r.data.seq_len}")
        packed = "schedule.seq_lens: packed rows are not cut (data.order 'documents'); leave the ramp out"
        check(not (r.schedule.seq_lens and r.data.packed), packed)
        check(
            r.data.rank_rows % max(fixed, 1) == 0 or fixed % r.data.rank_rows == 0,
            f"micro_rows {r.micro_rows} must divide or be a multiple of data.rows_per_rank {r.data.rank_rows}",
        )
        check(
            not r.optim.clip_per_rank or r.micro_rows in (0, r.data.rank_rows),
            "optim.clip_per_rank clips one rank's whole gradient: leave micro_rows 0",
        )
