"""How the packed model is scored: the settings of every method of evaluation."""

from dataclasses import dataclass
from typing import Literal

from golf_jax.config.base import check, countable, not_negative, positive


@dataclass(frozen=True)
class SlidingConfig:
    """Scoring with a window of `data.seq_len` tokens that moves on."""

    stride: int = 64
    """New targets per window; 0 leaves this evaluation out."""
    windows: Literal["pr372", "tail", "tail_min", "exact"] = "exact"
    """Window list of the recipe (docs/recipes, section 6): `pr372` scores only full strides, `tail` (638, 1182) and `tail_min` (562,
    score-first of 1182) re-score the tail, `exact` (2005) scores every target once."""

    def __post_init__(self):
        check(self.stride >= 0, f"eval: stride must be >= 0, got {self.stride}")

    @property
    def on(self) -> bool:
        """Whether the recipe asks for this evaluation."""
        return self.stride > 0


@dataclass(frozen=True)
class TTTConfig(SlidingConfig):
    """Sliding evaluation with training on the validation text: what both kinds of it share."""

    stride: int = 64
    """New targets per window."""
    epochs: int = 0
    """Passes over what is trained on; 0 leaves this evaluation out."""
    lr: float = 0.002
    batch_rows: int = 32
    """Most sequences per rank and update."""
    ranks: int = 8
    """Ranks whose split of the text is reproduced."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    fake_quant: bool = False
    """Fake quantization in the training forwards (what really ran in PRs 562 and 1182)."""

    def __post_init__(self):
        super().__post_init__()
        check(self.epochs >= 0, f"eval: epochs of test-time training must be >= 0, got {self.epochs}")
        for name in ("stride", "batch_rows", "ranks"):
            check(getattr(self, name) > 0, f"eval: {name} of test-time training must be positive, got {getattr(self, name)}")
        countable(self, "eval: test-time training", "ranks")

    @property
    def on(self) -> bool:
        return self.epochs > 0


@dataclass(frozen=True)
class ScoreFirstConfig(TTTConfig):
    """Chunk by chunk, score and then train by SGD (PRs 1182, 2005). Legal: every token is scored before an update sees it."""

    momentum: float = 0.9
    chunk_tokens: int = 32_768


@dataclass(frozen=True)
class AdaptFirstConfig(TTTConfig):
    """Train by Adam on everything, then score (PR 562). Illegal; reproduced as a reference."""

    proj_lr_scale: float = 1.0
    """Factor for output projections (PR 562: 3)."""
    fc_lr_scale: float = 1.0
    """Factor for the MLP's first matrix (PR 562: 0.5)."""


@dataclass(frozen=True)
class PackedConfig:
    """Rows side by side as flat streams: attention inside documents, cut every `seq_len` tokens (PR 2135's "diagnostic" evaluation)."""

    rows: int = 0
    """Rows per stream; a rank's rows that do not fill one are left out. 0: no such evaluation (PR 2135: 25)."""
    seq_len: int = 2560
    """Targets per row, tokens per attention segment at most."""
    ranks: int = 8
    """Ranks whose split of the rows is reproduced."""

    def __post_init__(self):
        not_negative(self, "eval.packed", "rows")
        positive(self, "eval.packed", "seq_len", "ranks")
        countable(self, "eval.packed", "ranks")

    @property
    def on(self) -> bool:
        return self.rows > 0


@dataclass(frozen=True)
class TiltConfig:
    """Scores tilted towards the token that followed the same context before (PR 2135, section 8), exactly normalised."""

    order: int = 0
    """Tokens of context and target; 0: no tilt (PR 2135: 16)."""
    threshold: float = 0.8
    """Least share of the context's occurrences that the hinted token must have."""
    boost: float = 2.625
    """Added to the hinted token's logit."""
    state: Literal["corpus", "queue"] = "queue"
    """Order in which the counts see the text. `queue`: that in which documents are scored, which is causal. `corpus`: as PR 2135 ran;
    with adapters it breaks C1 in every order of documents."""

    def __post_init__(self):
        check(self.order == 0 or 2 <= self.order <= 16, f"eval.documents.tilt.order must be 0 or in 2..16, got {self.order}")
        check(0 < self.threshold <= 1, f"eval.documents.tilt.threshold must lie in 0..1, got {self.threshold}")


@dataclass(frozen=True)
class DocumentsConfig:
    """Test-time training per document: low-rank adapters within it, and once, after a prefix, all weights (PR 2135, sections 5, 6)."""

    rank: int = 0
    """Of the adapters on q, v, o, MLP and head of every executed layer; 0 leaves this evaluation out (PR 2135: 80)."""
    alpha: float = 144.0
    """Adapters count alpha / rank times."""
    lr: float = 8e-5
    beta2: float = 0.99
    eps: float = 1e-10
    weight_decay: float = 2.0
    """AdamW of the adapters, without momentum, one step per chunk."""
    chunk: int = 48
    """Targets scored between two steps."""
    seq_len: int = 2560
    """Window: tokens of context at most."""
    batch: int = 64
    """Documents side by side."""
    prefix: int = 2500
    """Documents, of those scored by then, that train all weights once; 0: no such phase."""
    global_lr: float = 0.001
    global_momentum: float = 0.9
    global_chunk: int = 32_768
    """Tokens per step of that phase."""
    clip_norm: float = 1.0
    ranks: int = 8
    """Ranks whose split of that phase's sequences is reproduced."""
    tilt: TiltConfig = TiltConfig()

    def __post_init__(self):
        where, window = "eval.documents", self.seq_len
        not_negative(self, where, "rank", "prefix", "lr", "weight_decay", "global_lr", "clip_norm")
        positive(self, where, "chunk", "seq_len", "batch", "global_chunk", "ranks", "alpha", "eps")
        countable(self, where, "rank", "batch", "ranks")
        check(self.chunk <= window, f"{where}.chunk {self.chunk} exceeds the window of {window} ({where}.seq_len)")
        long = not self.prefix or self.global_chunk >= window
        check(long, f"{where}.global_chunk {self.global_chunk} is less than one sequence of {window}")

    @property
    def on(self) -> bool:
        return self.rank > 0


@dataclass(frozen=True)
class EvalConfig:
    """How the packed model is scored: always by rows side by side, and by each method below that is not left out."""

    batch_rows: int = 0
    """Sequences or windows per device and forward pass; 0: 1,024 tokens on a CPU, 65,536 elsewhere, one sequence at least."""
    every: int = 0
    """Validate the raw weights every N training steps (outside the clock); 0: only at the end."""
    sliding: SlidingConfig = SlidingConfig()
    score_first: ScoreFirstConfig = ScoreFirstConfig()
    adapt_first: AdaptFirstConfig = AdaptFirstConfig()
    packed: PackedConfig = PackedConfig()
    documents: DocumentsConfig = DocumentsConfig()

    def __post_init__(self):
        not_negative(self, "eval", "batch_rows", "every")

    def check_length(self, seq_len: int) -> None:
        """Raises GolfError unless every method that is asked for can work with windows of `seq_len` tokens."""
        for name in ("sliding", "score_first", "adapt_first"):
            method = getattr(self, name)
            fits = not method.on or method.stride <= seq_len
            check(fits, f"eval.{name}.stride {method.stride} exceeds the window of {seq_len} tokens (data.seq_len)")
        chunk = self.score_first.chunk_tokens
        fits = not self.score_first.on or chunk >= seq_len
        check(fits, f"eval.score_first.chunk_tokens {chunk} is less than one sequence of {seq_len} (data.seq_len)")
