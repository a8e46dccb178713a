"""Shape and parts of the network."""

from dataclasses import dataclass
from typing import Literal

from golf_jax.config.base import check, check_finite, not_negative, positive

MAX_SOFTCAP = 80.0  # exp(80) * vocabulary still fits in fp32
MAX_LAYERS = 1024  # executed ones; of artifacts from elsewhere, too

Attention = Literal["auto", "xla", "native", "pallas", "cudnn"]  # backends of kernels/attention
Mlp = Literal["auto", "xla", "pallas"]  # of kernels/mlp


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
    """The key matrices of the last N layers stay exempt, and are stored as float16 (PR 372: 1)."""
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
    asym_softcap: bool = False
    """Evaluation caps logits >= 0 and < 0 by a scalar each; the training loss keeps `softcap` (PR 2135)."""
    smear_gate: bool = False
    """Each channel mixes with the previous token's by a gate of its own, after the embedding's norm (PRs 372, 562, 638, 1182)."""
    input_smear_gate: bool = False
    """Adds the previous token's embedding times lambda * sigmoid(first `gate_window` channels), before the norm (PR 2135)."""
    boundary_token: int = -1
    """Token that starts a document: smear gates and hash embeddings treat it as the start of a row. -1: they look over the
    border of documents in one row, as all records did (PR 2135's SMEAR_GATE_BOS_FIX was off)."""
    gate_window: int = 12
    """Leading channels that the input-gated smear and the narrow head gate read."""
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
    head_gate: Literal["off", "linear", "query_rows", "narrow"] = "off"
    """Sigmoid gate per head: a linear map with bias (PRs 562, 638), extra rows of the query projection (PR 2005), or a map of the
    first `gate_window` channels of the attention input (PR 2135)."""
    head_gate_scale: float = 1.0
    """Multiplies the narrow gate's logits inside the sigmoid (PR 2135: 0.5)."""
    layer_scale: bool = False
    """Multiply the normalised branch inputs by 1/sqrt(layer + 1)."""
    value_embed_layers: tuple[int, ...] = ()
    """Layers that add a shared token value embedding (PR 1182: 5, 9, 10)."""
    value_embed_dim: int = 128
    skip: Literal["add", "gated"] = "add"
    """U-Net skips: x + w*s, or the sigmoid lerp g*x + (1-g)*w*s of PR 2005."""
    parallel_from: int = -1
    """Attention and MLP read the same input from this layer on; -1: nowhere."""
    two_lanes_from: int = -1
    """From this layer on attention reads one copy of the stream and the MLP another, and both write to both (PR 2135: 8); their mean
    goes on. -1: nowhere."""
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
    attention: Attention = "auto"
    """Attention backend; `auto` picks by platform (x86 CPU with a C++ compiler: `native`, if float32 and head_dim allow it; else
    `xla`). What is named is what runs, or an error. Forward-mode and second derivatives (`jax.jvp`, `jax.hessian`): `xla` only."""
    mlp: Mlp = "auto"
    """`pallas`: the activation inside matrix products of our own, on a Hopper GPU beside attention `pallas`; `auto` is `xla`, as no GPU
    has timed them. Where the hidden state is asked for (calibration, adapters), and in generation, it is computed the plain way."""

    def __post_init__(self) -> None:
        c = self
        check_finite(c, "model")
        positive(c, "model", "vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "rope_base", "softcap")
        check(c.softcap <= MAX_SOFTCAP, f"model.softcap must be at most {MAX_SOFTCAP:g}, got {c.softcap}")
        not_negative(c, "model", "embed_init_std", "bigram_dim", "trigram_dim", "value_embed_dim", "rope_train_len", "xsa_last_n")
        layers = c.num_layers * (1 + max(c.loop_repeats, 0))
        check(layers <= MAX_LAYERS, f"model.num_layers {c.num_layers}: with its loops up to {layers} layers; at most {MAX_LAYERS}")
        check(c.width % c.num_heads == 0, f"model.width {c.width} is not divisible by model.num_heads {c.num_heads}")
        check(
            c.num_heads % c.num_kv_heads == 0,
            f"model.num_heads {c.num_heads} is not divisible by model.num_kv_heads {c.num_kv_heads}",
        )
        check(c.head_dim % 2 == 0, f"model.width / model.num_heads = {c.head_dim} must be even for RoPE")
        check(abs(c.mlp_ratio * c.width) < 1 << 31, f"model.mlp_ratio {c.mlp_ratio} is too large a number at width {c.width}")
        check(c.mlp_dim > 0, f"model.mlp_ratio {c.mlp_ratio} gives no hidden unit at width {c.width}")
        check(
            c.rope_dims % 2 == 0 and 0 <= c.rope_dims <= c.head_dim,
            f"model.rope_dims {c.rope_dims} must be even and at most the head dimension {c.head_dim}",
        )
        check(c.bigram_buckets == 0 or c.bigram_buckets > 1, "model.bigram_buckets must be 0 (off) or at least 2")
        check(c.trigram != "shared" or c.bigram_buckets > 0, "model.trigram 'shared' needs model.bigram_buckets > 0")
        check((c.trigram == "table") == (c.trigram_buckets > 1), "model.trigram 'table' and model.trigram_buckets >= 2 go together")
        check(
            all(0 <= i < c.num_layers for i in c.value_embed_layers),
            f"model.value_embed_layers {c.value_embed_layers} must lie in 0..{c.num_layers - 1}",
        )
        check(
            not (c.input_smear_gate or c.head_gate == "narrow") or 1 <= c.gate_window <= c.width,
            f"model.gate_window {c.gate_window} must lie in 1..{c.width} (model.width)",
        )
        check(c.boundary_token < c.vocab_size, f"model.boundary_token {c.boundary_token} must be below {c.vocab_size}")
        check(c.parallel_from < c.num_layers, f"model.parallel_from {c.parallel_from} must be below {c.num_layers}")
        first = max(c.num_layers // 2, c.loop_end + 1)  # of the decoder layers that run once
        check(
            c.two_lanes_from == -1 or first <= c.two_lanes_from < c.num_layers,
            f"model.two_lanes_from {c.two_lanes_from} must be -1 or in {first}..{c.num_layers - 1}: decoder layers after the recurrence",
        )
        check(
            c.two_lanes_from == -1 or c.parallel_from == -1,
            "model.parallel_from and model.two_lanes_from both say what the MLP reads: set one of them to -1",
        )
        check(
            (c.loop_repeats > 0) == (c.loop_start >= 0),
            "model.loop_start and model.loop_repeats go together (-1 and 0 switch depth recurrence off)",
        )
        if c.loop_repeats:
            check(
                0 <= c.loop_start <= c.loop_end < c.num_layers,
                f"model.loop_start..loop_end {c.loop_start}..{c.loop_end} must lie in 0..{c.num_layers - 1}",
            )
        check(
            0 <= c.fake_quant.late_k_layers <= c.num_layers,
            f"model.fake_quant.late_k_layers {c.fake_quant.late_k_layers} must lie in 0..{c.num_layers}",
        )
        check(c.value_residual or not c.value_residual_first, "model.value_residual_first needs model.value_residual")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_ratio * self.width)

    def layer_order(self, looping: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Physical layer of every virtual layer, as (encoder, decoder) halves of the U-Net (docs/recipes/pr2005.md, section 2.3)."""
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
