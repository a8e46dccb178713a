"""Configuration: frozen dataclasses, validated on construction, JSON round trip.

A recipe is a file in `configs/` with a function `recipe() -> Recipe`. Every field has one reader; combinations that cannot work are
refused here, before anything is compiled, in one line that names the field and the fix.
"""

import dataclasses
import importlib
import importlib.util
import json
import math
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

CAP_BYTES = 16_000_000  # artifact cap of the challenge, decimal, code + model


class GolfError(ValueError):
    """A mistake of the user, or bad input, told in one line that names the place, the field and the fix."""


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise GolfError(message)


@dataclass(frozen=True)
class FakeQuantConfig:
    """Straight-through fake quantization of weights inside the forward pass (a property of the model in PR 372)."""

    matrices: Literal["none", "all", "projections"] = "none"
    """Which linear maps: block matrices and hash projections (`all`, PRs 372/562/638) or only the small projections of hash and
    value embeddings (`projections`, PR 1182, whose banks bypass its fake quantizer)."""
    attn_levels: int = 31
    """Largest code of attention matrices (31: int6)."""
    mlp_levels: int = 31
    """Largest code of MLP matrices (15: int5, PR 372)."""
    scale_floor: float = 0.0
    """Smallest step of a row. 0: the step follows the row (PR 372); 1/31: PRs 562, 638, 1182."""
    min_numel: int = 0
    """Only matrices with more elements than this (PR 372: 65,536)."""
    late_k_layers: int = 0
    """The key matrices of the last N layers stay exempt (PR 372: 1)."""
    in_eval: bool = False
    """Also in evaluation (PR 372); otherwise only in training forwards."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and parts of the network. Everything a forward pass needs besides parameters and tokens."""

    vocab_size: int = 1024
    num_layers: int = 11
    width: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_ratio: float = 3.0
    mlp_slope: float = 0.0
    """Slope of the leaky ReLU that is squared; 0 is relu^2, 0.5 is the records' LeakyReLU(0.5)^2."""
    rope_dims: int = 0
    """Rotated dimensions per head, half-split; 0 rotates all."""
    rope_base: float = 10_000.0
    rope_train_len: int = 0
    """Sequences longer than this use base * (T / rope_train_len)^(r / (r - 2)); 0 never rescales."""
    rope_bf16_frequencies: bool = False
    """Round the inverse frequencies to bfloat16, as the buffers of PRs 372 and 2005 were."""
    q_gain_init: float = 1.5
    softcap: float = 30.0
    embed_init_std: float = 0.005
    smear_gate: bool = False
    bigram_buckets: int = 0
    """Rows of the BigramHash table (the last one is the row-start bucket); 0 leaves it out."""
    bigram_dim: int = 128
    trigram: Literal["off", "shared", "table"] = "off"
    """`shared`: XOR trigrams look up the bigram table too (PR 562); `table`: a table of their own (PR 1182)."""
    trigram_buckets: int = 0
    trigram_dim: int = 128
    linear_init: Literal["orthogonal", "uniform"] = "orthogonal"
    """Linear maps start orthogonal (both dimensions >= 64), or uniform(+-1/sqrt(in)) as in the naive baseline; outputs start at zero."""
    hash_proj_init: Literal["orthogonal", "orthogonal_scaled"] = "orthogonal_scaled"
    """`orthogonal_scaled` multiplies by 1/sqrt(2 num_layers) (PRs 372, 562, 638); PR 1182 does not."""
    xsa_last_n: int = 0
    """XSA (removal of the component along the token's own value) on the last N layers; N >= num_layers: on all."""
    value_residual: bool = False
    value_residual_first: bool = False
    """Layer 0 multiplies its own value by lambda0 + lambda1 (PR 562); otherwise its lambdas are dead (PRs 638, 1182)."""
    head_gate: Literal["off", "linear", "query_rows"] = "off"
    """Sigmoid gate per head: a linear map with bias (PRs 562, 638) or extra rows of the query projection (PR 2005)."""
    layer_scale: bool = False
    """Multiply the normalised branch inputs by 1/sqrt(layer + 1)."""
    value_embed_layers: tuple[int, ...] = ()
    """Layers that add a shared token value embedding (PR 1182: 5, 9, 10)."""
    value_embed_dim: int = 128
    skip: Literal["add", "gated"] = "add"
    """U-Net skips: x + w*s, or the sigmoid lerp g*x + (1-g)*w*s of PR 2005."""
    parallel_from: int = -1
    """Attention and MLP read the same input from this layer on; -1: nowhere."""
    loop_start: int = -1
    """First layer of the recurrent stretch; -1: no depth recurrence."""
    loop_end: int = -1
    loop_repeats: int = 0
    """Extra passes through layers loop_start..loop_end (PR 2005: 2, three passes in total)."""
    fake_quant: FakeQuantConfig = FakeQuantConfig()
    bf16_params: tuple[str, ...] = ("tok_emb",)
    """Parameters that `numerics = "as_run"` keeps in bfloat16 (with their AdamW moments), as the records do."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activation dtype; `auto` is bfloat16 on accelerators and float32 on CPU."""
    attention: Literal["auto", "xla", "pallas", "cudnn"] = "auto"
    """Attention backend; `auto` picks by platform. What is named is what runs, or an error."""

    def __post_init__(self) -> None:
        c = self
        for name in ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads"):
            _check(getattr(c, name) > 0, f"model.{name} must be positive, got {getattr(c, name)}")
        _check(c.width % c.num_heads == 0, f"model.width {c.width} is not divisible by model.num_heads {c.num_heads}")
        _check(
            c.num_heads % c.num_kv_heads == 0,
            f"model.num_heads {c.num_heads} is not divisible by model.num_kv_heads {c.num_kv_heads}",
        )
        _check(c.head_dim % 2 == 0, f"model.width / model.num_heads = {c.head_dim} must be even for RoPE")
        _check(c.mlp_dim > 0, f"model.mlp_ratio {c.mlp_ratio} gives no hidden unit at width {c.width}")
        _check(
            c.rope_dims % 2 == 0 and 0 <= c.rope_dims <= c.head_dim,
            f"model.rope_dims {c.rope_dims} must be even and at most the head dimension {c.head_dim}",
        )
        _check(c.xsa_last_n >= 0, f"model.xsa_last_n must be >= 0, got {c.xsa_last_n}")
        _check(c.bigram_buckets == 0 or c.bigram_buckets > 1, "model.bigram_buckets must be 0 (off) or at least 2")
        _check(c.trigram != "shared" or c.bigram_buckets > 0, "model.trigram 'shared' needs model.bigram_buckets > 0")
        _check(
            (c.trigram == "table") == (c.trigram_buckets > 1),
            "model.trigram 'table' and model.trigram_buckets >= 2 go together",
        )
        _check(
            all(0 <= i < c.num_layers for i in c.value_embed_layers),
            f"model.value_embed_layers {c.value_embed_layers} must lie in 0..{c.num_layers - 1}",
        )
        _check(c.parallel_from < c.num_layers, f"model.parallel_from {c.parallel_from} must be below {c.num_layers}")
        _check(
            (c.loop_repeats > 0) == (c.loop_start >= 0),
            "model.loop_start and model.loop_repeats go together (-1 and 0 switch depth recurrence off)",
        )
        if c.loop_repeats:
            _check(
                0 <= c.loop_start <= c.loop_end < c.num_layers,
                f"model.loop_start..loop_end {c.loop_start}..{c.loop_end} must lie in 0..{c.num_layers - 1}",
            )
        _check(
            not (c.value_residual_first and not c.value_residual),
            "model.value_residual_first needs model.value_residual",
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_ratio * self.width)

    def layer_order(self, looping: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Physical layer of every virtual layer, as (encoder, decoder) halves of the U-Net (spec PR 2005, 2.3)."""
        layers = list(range(self.num_layers))
        if looping and self.loop_repeats:
            loop = layers[self.loop_start : self.loop_end + 1]
            layers = layers[: self.loop_start] + loop * (self.loop_repeats + 1) + layers[self.loop_end + 1 :]
        half = len(layers) // 2
        return tuple(layers[:half]), tuple(layers[half:])

    @property
    def num_skips(self) -> int:
        encoder, decoder = self.layer_order(looping=True)
        return min(len(encoder), len(decoder))


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from and in which order they are trained on."""

    train: str = "embedded"
    """Glob of training shards, or `embedded`: the corpus made from this Python's own documentation."""
    val: str = ""
    """Glob of validation shards (unused with `embedded`)."""
    tokenizer: str = ""
    """SentencePiece model file (unused with `embedded`)."""
    order: Literal["stream", "shuffled"] = "stream"
    """`stream`: consecutive spans per rank (PRs 372, 562, 638, 1182); `shuffled`: random sequences per rank (PR 2005)."""
    seq_len: int = 2048
    ranks: int = 8
    """Ranks whose data order is reproduced; independent of how many devices run it."""
    rows_per_rank: int = 48
    """Sequences per rank and step; batch tokens = ranks * rows_per_rank * seq_len."""

    def __post_init__(self):
        for name in ("seq_len", "ranks", "rows_per_rank"):
            _check(getattr(self, name) > 0, f"data.{name} must be positive, got {getattr(self, name)}")
        if self.train != "embedded":
            _check(bool(self.val), "data.val is empty: give the glob of the validation shards")
            _check(bool(self.tokenizer), "data.tokenizer is empty: give the SentencePiece model file")

    @property
    def batch_tokens(self) -> int:
        return self.ranks * self.rows_per_rank * self.seq_len


@dataclass(frozen=True)
class GroupConfig:
    """One optimizer group: which parameter roles, which rule, learning rate and decay."""

    name: str
    roles: tuple[str, ...]
    """Roles of golf_jax.model.params: matrix, gate, proj, token, table, vector, trigram."""
    kind: Literal["muon", "adamw", "frozen"]
    lr: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class OptimConfig:
    """Muon for matrices, AdamW for the rest; all learning rates share one factor over time."""

    groups: tuple[GroupConfig, ...] = (
        GroupConfig("matrix", ("matrix", "proj", "gate"), "muon", 0.025, 0.04),
        GroupConfig("token", ("token", "table"), "adamw", 0.035, 0.04),
        GroupConfig("vector", ("vector",), "adamw", 0.025, 0.04),
    )
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.99
    momentum_start: float = 0.92
    momentum_warmup_steps: int = 1500
    newton_schulz_steps: int = 5
    row_normalize: bool = False
    """MuonEq-R: rows of the Nesterov update are normalised before Newton-Schulz (PR 2005)."""
    bf16_momentum: bool = False
    """PR 1182's Muon: momentum and averaged matrix gradients in bfloat16 when `numerics = "as_run"`, and its rounding order."""
    decay_last: bool = False
    """Weight decay after the update, on the updated weight (PR 372); otherwise before it."""
    clip_norm: float = 0.3
    """Global L2 norm of the gradient; 0 switches clipping off."""
    clip_per_rank: bool = False
    """Clip each rank's own gradient before averaging (PR 1182)."""

    def __post_init__(self):
        roles = [r for g in self.groups for r in g.roles]
        for r in roles:
            _check(roles.count(r) == 1, f"optim.groups: role {r!r} is claimed by two groups")
        _check(not (self.clip_per_rank and self.clip_norm <= 0), "optim.clip_per_rank needs optim.clip_norm > 0")

    @property
    def leaks_frozen_gradients(self) -> bool:
        """PR 1182: gradients of frozen parameters are never cleared and enter the clip norm (spec 7.1)."""
        return self.clip_per_rank and any(g.kind == "frozen" for g in self.groups)


@dataclass(frozen=True)
class BudgetConfig:
    """When training ends: `steps` if positive, otherwise the wall clock."""

    steps: int = 0
    """Fixed number of steps: schedules run on steps and the run is bit-reproducible. 0: schedules run on elapsed time."""
    seconds: float = 600.0
    """Training clock: excludes compilation, evaluation and pauses. PR 2005 trains 588 s and keeps 12 s for GPTQ."""

    def __post_init__(self):
        _check(self.steps >= 0, f"budget.steps must be >= 0, got {self.steps}")
        _check(self.steps > 0 or self.seconds > 0, "budget: give budget.steps or a positive budget.seconds")


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

    def __post_init__(self):
        _check(0 <= self.warmdown_frac <= 1, f"schedule.warmdown_frac must be in 0..1, got {self.warmdown_frac}")
        _check(0 <= self.ema_decay < 1, f"schedule.ema_decay must be in 0..1, got {self.ema_decay}")
        _check(self.export != "ema" or self.ema_decay > 0, "schedule.export 'ema' needs schedule.ema_decay > 0")
        _check(self.export != "swa" or self.swa_every > 0, "schedule.export 'swa' needs schedule.swa_every > 0")


@dataclass(frozen=True)
class QuantRule:
    """First match wins: tensors whose name contains `pattern` and have more than `min_numel` elements get `scheme`."""

    pattern: str
    """Substring of the tensor name (`blocks.3.attn.c_q.weight`); empty matches all. `|` separates alternatives."""
    scheme: str
    """Name of a scheme of golf_jax.quant.schemes (int6_row, int5_row, int8_percentile, gptq, float16, ...)."""
    min_numel: int = 0
    max_numel: int = 0
    """Only tensors with at most this many elements; 0: no limit."""
    step: float = 1.0
    """Multiplies the scheme's rounding step: above 1 coarser and smaller, 1 exactly as the PR. `quant.fit_to_cap` solves for it."""

    def __post_init__(self):
        _check(self.step > 0, f"quant.rules: step must be positive, got {self.step} (pattern {self.pattern!r})")


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
    gptq_batches: int = 0
    """Calibration batches for the Hessians of GPTQ schemes (PR 2005: 64)."""
    compressor: Literal["zstd", "lzma", "brotli", "rans"] = "zstd"
    """`rans` is this project's own coder for integer codes, 1 to 2 % smaller (docs/artifact.md); scales and floats by brotli."""
    level: int = 22
    """zstd 1..22, lzma 0..9, brotli and rans 0..11."""

    def __post_init__(self):
        _check(0 <= self.prune_fraction < 1, f"quant.prune_fraction must be in 0..1, got {self.prune_fraction}")


@dataclass(frozen=True)
class TTTConfig:
    """Test-time training. `score_first` is legal (every token is scored before an update sees it); `adapt_first` is not."""

    kind: Literal["off", "score_first", "adapt_first"] = "off"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.002
    momentum: float = 0.9
    epochs: int = 3
    chunk_tokens: int = 32_768
    batch_rows: int = 32
    """Most sequences per rank and update."""
    ranks: int = 8
    """Ranks whose split of every chunk is reproduced."""
    clip_norm: float = 1.0
    fake_quant: bool = False
    """Fake quantization in the training forwards of TTT (what really ran in PRs 562 and 1182)."""
    proj_lr_scale: float = 1.0
    """`adamw`: factor for output projections (PR 562: 3)."""
    fc_lr_scale: float = 1.0
    """`adamw`: factor for the MLP's first matrix (PR 562: 0.5)."""


@dataclass(frozen=True)
class EvalConfig:
    """How the packed model is scored."""

    stride: int = 64
    """Sliding window: new targets per window; 0 leaves the sliding evaluation out."""
    windows: Literal["pr372", "tail", "tail_min", "exact"] = "exact"
    """Window list of the recipe (spec section 6): `pr372` scores only full strides, `tail` (638, 1182) and `tail_min` (562)
    re-score the tail, `exact` (2005) scores every target once."""
    batch_rows: int = 32
    """Sequences or windows per device and step."""
    every: int = 0
    """Validate the raw weights every N training steps (outside the clock); 0: only at the end."""
    ttt: TTTConfig = TTTConfig()

    def __post_init__(self):
        _check(self.stride >= 0, f"eval.stride must be >= 0, got {self.stride}")
        _check(self.batch_rows > 0, f"eval.batch_rows must be positive, got {self.batch_rows}")


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
    micro_rows: int = 0
    """Sequences per device and forward pass (gradient accumulation); 0: as many as one rank has."""
    seed: int = 1337
    checkpoint_every: int = 0
    """Save a checkpoint every N steps (0: none); `--resume DIR` of golf_jax.train goes on from it bit for bit."""
    log_every: int = 50

    def __post_init__(self):
        r = self
        has_fake_quant = r.model.fake_quant.matrices != "none"
        _check(
            r.schedule.fake_quant_below == 0 or has_fake_quant,
            "schedule.fake_quant_below is set but model.fake_quant.matrices is 'none'",
        )
        _check(not r.eval.ttt.fake_quant or has_fake_quant, "eval.ttt.fake_quant needs model.fake_quant.matrices")
        _check(
            r.eval.stride <= r.data.seq_len,
            f"eval.stride {r.eval.stride} exceeds the window data.seq_len {r.data.seq_len}",
        )
        _check(
            r.data.rows_per_rank % max(r.micro_rows, 1) == 0 or r.micro_rows % r.data.rows_per_rank == 0,
            f"micro_rows {r.micro_rows} must divide or be a multiple of data.rows_per_rank {r.data.rows_per_rank}",
        )
        _check(
            not r.optim.clip_per_rank or r.micro_rows in (0, r.data.rows_per_rank),
            "optim.clip_per_rank clips one rank's whole gradient: leave micro_rows 0",
        )
        uses_gptq = any(rule.scheme.startswith("gptq") for rule in r.quant.rules)
        _check(uses_gptq == (r.quant.gptq_batches > 0), "quant.gptq_batches and a gptq scheme in quant.rules go together")


def to_dict(config: Any) -> Any:
    """A dataclass (nested) as JSON-able data."""
    if is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(v) for v in config]
    return config


def from_dict(cls: Any, data: Any, where: str = "") -> Any:
    """Inverse of `to_dict`. Raises GolfError naming an unknown, missing or mistyped field."""
    where = where or cls.__name__
    if not isinstance(data, dict):
        raise GolfError(f"{where}: expected an object, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in fields(cls)}
    for unknown in set(data) - names:
        raise GolfError(f"{where}: unknown field {unknown!r}; fields are {', '.join(sorted(names))}")
    values = {}
    for f in fields(cls):
        if f.name not in data:
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            _check(not required, f"{where}: field {f.name!r} is missing")
            continue
        values[f.name] = _value(hints[f.name], data[f.name], f"{where}.{f.name}")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is Literal:
        _check(value in args, f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        _check(isinstance(value, list | tuple), f"{where}: expected a list, found {value!r}")
        item = args[0] if args[-1] is Ellipsis else None
        if item is None:
            _check(len(value) == len(args), f"{where}: expected {len(args)} values, found {len(value)}")
        return tuple(_value(item or args[i], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _value(args[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    _check(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{where}: expected {hint.__name__}, found {value!r}",
    )
    _check(hint is not float or math.isfinite(value), f"{where}: {value} is not finite")
    return value


def to_json(config: Any) -> str:
    return json.dumps(to_dict(config), indent=1)


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe of `configs/NAME.py` (shipped in the wheel) or of a Python file given by path."""
    path = Path(name_or_path)
    if path.suffix == ".py":
        _check(path.is_file(), f"{path}: no such recipe file")
        spec = importlib.util.spec_from_file_location(f"golf_recipe_{path.stem}", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        known = recipe_names()
        _check(name_or_path in known, f"no recipe {name_or_path!r}; known: {', '.join(known)} (or give a .py file)")
        module = importlib.import_module(f"configs.{name_or_path}")
    make = getattr(module, "recipe", None)
    _check(callable(make), f"{name_or_path}: a recipe file defines a function recipe() that returns a Recipe")
    result = make()  # type: ignore[misc]
    _check(isinstance(result, Recipe), f"{name_or_path}: recipe() must return a golf_jax.config.Recipe")
    return result


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    import configs

    return sorted(p.stem for p in Path(configs.__path__[0]).glob("*.py") if p.stem != "__init__")
