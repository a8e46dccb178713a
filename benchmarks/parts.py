"""The parts of a training step as programs of their own, each forward and backward at the step's shapes, with its FLOPs and bytes.

FLOPs count matrix products only (causal attention: half the square; backward 2x, attention 2.5x). Bytes are what a part cannot
avoid: its arguments and results once each. A part timed alone may be slower than inside the step, where XLA fuses across parts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from golf_jax.config import GroupConfig, ModelConfig, Recipe
from golf_jax.kernels.attention import xsa_attention
from golf_jax.kernels.cross_entropy import softcap_cross_entropy
from golf_jax.mesh import AXIS, REPLICATED
from golf_jax.model.layers import linears
from golf_jax.optim.averaging import EMAScalars, ema_update
from golf_jax.optim.optimizer import group_scalars
from golf_jax.training.state import TrainState, optimizer, state_specs


class Part(NamedTuple):
    name: str
    run: Callable[..., Any]
    args: tuple
    times: int
    """How often one step runs it."""
    flops: float
    """Of one run."""

    @property
    def bytes(self) -> int:
        """Arguments and results of one run, once each."""
        arrays = jax.tree.leaves((self.args, jax.eval_shape(self.run, *self.args)))
        return sum(a.size * a.dtype.itemsize for a in arrays)


def _forward_backward(fn: Callable) -> Callable:
    """(cotangent, *args) -> (result, gradients of all args)."""

    def run(cotangent, *args):
        out, pull = jax.vjp(fn, *args)
        return out, pull(cotangent)

    return jax.jit(run)


def model_parts(config: ModelConfig, rows: int, seq_len: int, micros: int, looping: bool) -> list[Part]:
    """Attention, projections, MLP and head of one device, at `rows` sequences per forward pass."""
    c, dtype, n = config, jnp.dtype(config.dtype), rows * seq_len
    keys = iter(jax.random.split(jax.random.key(0), 32))

    def array(*shape: int, scale: float = 1.0, dtype=dtype) -> jax.Array:
        return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

    def weight(*shape: int) -> jax.Array:
        return array(*shape, scale=shape[0] ** -0.5, dtype=jnp.float32)

    layers = [i for half in c.layer_order(looping) for i in half]
    with_xsa = sum(i >= c.num_layers - c.xsa_last_n for i in layers)
    q_dim, kv_dim = c.width + (c.num_heads if c.head_gate == "query_rows" else 0), c.num_kv_heads * c.head_dim
    q = array(rows, seq_len, c.num_heads, c.head_dim)
    k, v = (array(rows, seq_len, c.num_kv_heads, c.head_dim) for _ in range(2))
    attention_flops = 3.5 * 2 * rows * c.num_heads * seq_len**2 * c.head_dim
    parts = [
        Part(
            f"attention{' + XSA' if xsa else ''}",
            _forward_backward(lambda q, k, v, xsa=xsa: xsa_attention(q, k, v, xsa=xsa, backend=c.attention)),
            (array(*q.shape), q, k, v),
            count * micros,
            attention_flops,
        )
        for xsa, count in ((False, len(layers) - with_xsa), (True, with_xsa))
        if count
    ]

    def projections(z_ND, y_ND, *weights):
        wq, wk, wv, wo = (w.astype(dtype) for w in weights)
        return *linears(z_ND, wq, wk, wv), y_ND @ wo

    shapes = [(c.width, q_dim), (c.width, kv_dim), (c.width, kv_dim), (c.width, c.width)]
    args = (array(n, c.width), array(n, c.width), *(weight(*s) for s in shapes))
    cotangents = tuple(array(n, s[1]) for s in shapes)
    flops = sum(6 * n * a * b for a, b in shapes)
    parts.append(Part("projections", _forward_backward(projections), (cotangents, *args), len(layers) * micros, flops))

    def mlp(z_ND, up, down):
        u = z_ND @ up.astype(dtype)
        return jnp.square(jnp.where(u > 0, u, c.mlp_slope * u)) @ down.astype(dtype)

    args = (array(n, c.width), array(n, c.width), weight(c.width, c.mlp_dim), weight(c.mlp_dim, c.width))
    parts.append(Part("MLP", _forward_backward(mlp), args, len(layers) * micros, 12 * n * c.width * c.mlp_dim))

    targets = jax.random.randint(next(keys), (n,), 0, c.vocab_size)

    def head(x_ND, table):
        return jnp.mean(softcap_cross_entropy(x_ND, table.astype(dtype), targets, softcap=c.softcap))

    args = (jnp.float32(1), array(n, c.width), array(c.vocab_size, c.width, scale=0.05, dtype=jnp.float32))
    parts.append(Part("head + CE", _forward_backward(head), args, micros, 6 * n * c.width * c.vocab_size))
    return parts


def newton_schulz_flops(recipe: Recipe, state: TrainState, shards: int) -> float:
    """Of one device: X X^T, its square, and their product with X, for every matrix and step of the Muon groups."""
    shapes = [(group.newton_schulz_steps, x.shape) for group in muon_groups(recipe) for x in jax.tree.leaves(state.opt[group.name])]
    return sum(steps * g * (4 * m * m * n + 2 * m**3) for steps, (g, m, n) in shapes) / shards


def muon_groups(recipe: Recipe) -> list[GroupConfig]:
    return [group for group in recipe.optim.groups if group.kind == "muon"]


def optimizer_parts(recipe: Recipe, mesh: Mesh, state: TrainState) -> list[Part]:
    """Optimizer with weight averages, and on several devices also its collectives alone (the first part includes them)."""
    devices = mesh.shape[AXIS]
    opt = optimizer(recipe, state.params, devices, AXIS if devices > 1 else None)

    def update(grads, state):
        scalars = dict(lr_factor=jnp.float32(1), groups=group_scalars(recipe.optim, 0), clip_norm=jnp.float32(1))
        updates, opt_state, _ = opt.update(grads, state.opt, state.params, **scalars)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else ema_update(state.ema, params, EMAScalars.of(recipe.schedule.ema_decay))  # type: ignore[arg-type]
        return state._replace(params=params, opt=opt_state, ema=ema)

    def communicate(grads, stacks):
        shares = jax.tree.map(lambda s: jax.lax.psum_scatter(s, AXIS, scatter_dimension=0, tiled=True), stacks)
        gathered = jax.tree.map(lambda s: jax.lax.all_gather(s.astype(low), AXIS, tiled=True), shares)
        rest = {n: g for n, g in grads.items() if n not in matrices}
        return gathered, jax.lax.pmean(rest, AXIS)

    low = jnp.bfloat16 if recipe.numerics == "as_run" else jnp.float32
    matrices = {"q", "k", "v", "o", "up", "down"}
    grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), state.params)
    state = state._replace(stale=None)
    specs = state_specs(recipe)

    def sharded(fn, in_specs, out_specs):
        return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))

    flops = newton_schulz_flops(recipe, state, devices)
    parts = [Part("Newton-Schulz + optimizer", sharded(update, (REPLICATED, specs), specs), (grads, state), 1, flops)]
    if devices > 1:
        stacks = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), [state.opt[group.name] for group in muon_groups(recipe)])
        parts.append(Part("collectives", sharded(communicate, PartitionSpec(), PartitionSpec()), (grads, stacks), 1, 0.0))
    return parts
