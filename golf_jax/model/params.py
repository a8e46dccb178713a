"""The parameters of a model: one table of leaves that everything else reads.

Parameters are a flat dictionary of arrays. Matrix weights are stacks `[layers, in, out]`, so the optimizer sees a handful of leaves
and Newton-Schulz runs once per stack. Each leaf has a role (which optimizer group owns it) and the name of its tensors in the
challenge's own naming and orientation, one 2-D tensor `(out, in)` per layer: the form in which weights are quantized, packed and
exchanged with PyTorch.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import GolfError, ModelConfig

Params = dict[str, jax.Array]
ROLES = ("matrix", "gate", "proj", "token", "table", "trigram", "vector", "softcap")


@dataclass(frozen=True)
class Leaf:
    """One parameter array.

    role: one of `ROLES`. tensor: name in the challenge's state_dict; `{i}` marks a stack with
    one tensor per leading index. matrix: stored `[..., in, out]` here and `(out, in)` there.
    """

    shape: tuple[int, ...]
    role: str
    init: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    tensor: str
    matrix: bool = False

    @property
    def stacked(self) -> bool:
        return "{i}" in self.tensor

    @property
    def per_layer(self) -> bool:
        return self.tensor.startswith("blocks")

    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in the challenge's orientation."""
        shape = self.shape[1:] if self.stacked else self.shape
        if self.matrix:
            shape = shape[::-1]
        return shape or ((1,) if self.tensor.startswith("ve_layer_scales") else ())


def _constant(value: float) -> Callable:
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def _normal(std: float) -> Callable:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def _resid_mix(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Row 0 (the stream) one, row 1 (the embedding) zero."""
    return jnp.zeros(shape, jnp.float32).at[:, 0].set(1.0)


def _linear(gain: float = 1.0, orthogonal: bool = True) -> Callable:
    """Orthogonal (Haar) where both dimensions are at least 64, else uniform(+-1/sqrt(in)): the records' rule."""

    def one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if orthogonal and min(shape) >= 64:
            return gain * jax.nn.initializers.orthogonal()(key, shape, jnp.float32)
        return jax.random.uniform(key, shape, jnp.float32, -1, 1) / math.sqrt(shape[0])

    def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 2:
            return one(key, shape)
        # One matrix at a time: on a CPU, jax 0.10 spreads a batch of QR factorizations over the very threads that wait for them, and
        # as many batches at once as there are threads (two stacks on two cores) wait forever.
        return jax.lax.map(lambda k: one(k, shape[1:]), jax.random.split(key, shape[0]))

    return init


def leaves(config: ModelConfig) -> dict[str, Leaf]:
    """Every parameter of the model, in a fixed order."""
    c = config
    n, d, h, f = c.num_layers, c.width, c.num_heads, c.mlp_dim
    q_dim, kv_dim = h * c.head_dim, c.num_kv_heads * c.head_dim
    zeros, ones = _constant(0.0), _constant(1.0)
    proj = _linear(1 / math.sqrt(2 * n) if c.hash_proj_init == "orthogonal_scaled" else 1.0)

    out: dict[str, Leaf] = {}
    if c.asym_softcap:
        out |= {name: Leaf((), "softcap", _constant(c.softcap), name) for name in ("softcap_pos", "softcap_neg")}
    if c.num_skips:
        out["skip_weights"] = Leaf((c.num_skips, d), "vector", ones, "skip_weights")
    if c.num_skips and c.skip == "gated":
        out["skip_gates"] = Leaf((c.num_skips, d), "vector", zeros, "skip_gates")
    if c.two_lanes_from >= 0:
        out["lane_post"] = Leaf((n, 2, 2), "vector", ones, "parallel_post_lambdas")
        out["lane_resid"] = Leaf((n, 2), "vector", _constant(1.1), "parallel_resid_lambdas")
    if c.input_smear_gate:
        out["smear_lambda"] = Leaf((1,), "vector", zeros, "smear_lambda")
        out["smear_w"] = Leaf((c.gate_window, 1), "vector", zeros, "smear_gate.weight", True)
    out["tok_emb"] = Leaf((c.vocab_size, d), "token", _normal(c.embed_init_std), "tok_emb.weight")
    if c.bigram_buckets:
        out |= _table("bigram", c.bigram_buckets, c.bigram_dim, d, ("table", "proj", "vector"), zeros, proj, 0.05)
    if c.trigram == "table":
        out |= _table("trigram", c.trigram_buckets, c.trigram_dim, d, ("trigram",) * 3, zeros, proj, 0.05)
    if c.smear_gate:
        out["smear_gate"] = Leaf((d,), "vector", zeros, "smear.gate")
    if c.value_embed_layers:
        roles = ("table", "proj", "vector")
        out |= _table("ve_shared", c.vocab_size, c.value_embed_dim, kv_dim, roles, _normal(0.01), _linear(), 0.1)
        out["ve_layer_scales"] = Leaf((len(c.value_embed_layers),), "vector", ones, "ve_layer_scales.{i}")
    out["attn_scale"] = Leaf((n, d), "vector", ones, "blocks.{i}.attn_scale")
    out["mlp_scale"] = Leaf((n, d), "vector", ones, "blocks.{i}.mlp_scale")
    out["resid_mix"] = Leaf((n, 2, d), "vector", _resid_mix, "blocks.{i}.resid_mix")
    out["q_gain"] = Leaf((n, h), "vector", _constant(c.q_gain_init), "blocks.{i}.attn.q_gain")
    if c.value_residual:
        out["vr_lambda"] = Leaf((n, 2), "vector", _constant(0.5), "blocks.{i}.attn.vr_lambda")
    gate_rows = h if c.head_gate == "query_rows" else 0
    linear = _linear(orthogonal=c.linear_init == "orthogonal")
    out["q"] = Leaf((n, d, q_dim + gate_rows), "matrix", linear, "blocks.{i}.attn.c_q.weight", True)
    out["k"] = Leaf((n, d, kv_dim), "matrix", linear, "blocks.{i}.attn.c_k.weight", True)
    out["v"] = Leaf((n, d, kv_dim), "matrix", linear, "blocks.{i}.attn.c_v.weight", True)
    out["o"] = Leaf((n, q_dim, d), "matrix", zeros, "blocks.{i}.attn.proj.weight", True)
    if c.head_gate == "linear":
        out["gate"] = Leaf((n, d, h), "gate", zeros, "blocks.{i}.attn.attn_gate.weight", True)
        out["gate_bias"] = Leaf((n, h), "vector", _constant(4.0), "blocks.{i}.attn.attn_gate.bias")
    if c.head_gate == "narrow":
        out["narrow_gate"] = Leaf((n, c.gate_window, h), "vector", zeros, "blocks.{i}.attn.attn_gate_w", True)
    out["up"] = Leaf((n, d, f), "matrix", linear, "blocks.{i}.mlp.fc.weight", True)
    out["down"] = Leaf((n, f, d), "matrix", zeros, "blocks.{i}.mlp.proj.weight", True)
    return out


def _table(name: str, rows: int, dim: int, out: int, roles: tuple[str, ...], table: Callable, proj: Callable, scale: float) -> dict:
    """A lookup table, its projection to `out` (left out when the widths agree, as in the records) and a scalar scale."""
    made = {f"{name}_scale": Leaf((), roles[2], _constant(scale), f"{name}.scale")}
    made[f"{name}_table"] = Leaf((rows, dim), roles[0], table, f"{name}.embed.weight")
    if dim != out:
        made[f"{name}_proj"] = Leaf((dim, out), roles[1], proj, f"{name}.proj.weight", True)
    return made


def dead_layers(config: ModelConfig, name: str) -> int:
    """Leading layers of a stack that take no part in the forward pass: they get neither gradient nor decay (PRs 638, 1182)."""
    return int(name == "vr_lambda" and not config.value_residual_first)


def count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in leaves(config).values())


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """Tensor name -> (leaf, index in the stack or None), in the order of the records' state_dict."""
    table = leaves(config)
    flat: dict[str, tuple[str, int | None]] = {leaf.tensor: (name, None) for name, leaf in table.items() if not leaf.stacked}
    for name, leaf in table.items():
        if leaf.stacked and not leaf.per_layer:
            flat |= {leaf.tensor.format(i=i): (name, i) for i in range(leaf.shape[0])}
    for i in range(config.num_layers):
        flat |= {leaf.tensor.format(i=i): (name, i) for name, leaf in table.items() if leaf.per_layer}
    return flat


def to_tensors(config: ModelConfig, params: Mapping[str, jax.Array | np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters as the challenge's tensors on the host: one `(out, in)` matrix per layer, dtypes kept."""
    table = leaves(config)
    host = {name: np.asarray(jax.device_get(params[name])) for name in table}
    tensors = {}
    for tensor, (name, i) in tensor_names(config).items():
        x = host[name] if i is None else host[name][i]
        tensors[tensor] = np.ascontiguousarray(x.T if table[name].matrix else x).reshape(table[name].tensor_shape())
    return tensors


def from_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `to_tensors`, as host arrays. Every tensor is used exactly once.

    Raises GolfError naming the missing, extra or mis-shaped tensor.
    """
    table, names = leaves(config), tensor_names(config)
    missing, extra = [n for n in names if n not in tensors], [n for n in tensors if n not in names]
    if missing or extra:
        what = "; ".join(
            f"{label} {', '.join(n[:60] for n in found[:5])}" for label, found in (("missing", missing), ("unknown", extra)) if found
        )
        raise GolfError(f"the tensors do not fit the model configuration: {what}")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in table}
    for tensor, (name, _) in names.items():
        x, want = np.asarray(tensors[tensor]), table[name].tensor_shape()
        if x.shape != want:
            raise GolfError(f"tensor {tensor} has shape {x.shape}, the model configuration needs {want}")
        parts[name].append(x.T if table[name].matrix else x)
    return {
        name: np.stack([p.reshape(leaf.shape[1:]) for p in parts[name]]) if leaf.stacked else parts[name][0].reshape(leaf.shape)
        for name, leaf in table.items()
    }


def storage_dtypes(config: ModelConfig, numerics: str) -> dict[str, jnp.dtype]:
    """Dtype in which each leaf is kept during training (`as_run`: `config.bf16_params` in bfloat16, the rest float32)."""
    low = config.bf16_params if numerics == "as_run" else ()
    return {name: jnp.dtype(jnp.bfloat16 if name in low else jnp.float32) for name in leaves(config)}


@functools.partial(jax.jit, static_argnums=(0, 2))
def init_params(config: ModelConfig, key: jax.Array, numerics: str = "fp32") -> Params:
    """Fresh parameters. `as_run`: every value rounded to bfloat16 once, then kept in `storage_dtypes` (docs/recipes, section 3)."""
    table = leaves(config)
    keys = jax.random.split(key, len(table))
    dtypes = storage_dtypes(config, numerics)
    params = {}
    for k, (name, leaf) in zip(keys, table.items(), strict=True):
        x = leaf.init(k, leaf.shape)
        params[name] = (x.astype(jnp.bfloat16) if numerics == "as_run" else x).astype(dtypes[name])
    return params
