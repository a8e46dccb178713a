"""The optimizer of a recipe as one optax transformation: average, clip, Muon and AdamW directions, learning rates and decay.

It runs as it stands on one device, and inside `jax.shard_map` on many: then it takes each device's own gradient, and communicates
exactly this: a reduce-scatter of the matrix batches, an all-reduce of the other gradients and of one norm, an all-gather of the
matrix updates.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from golf_jax.config import GolfError, GroupConfig, OptimConfig
from golf_jax.optim.adam import scale_by_adam
from golf_jax.optim.muon import StackLayout, scale_by_muon

Tree = dict[str, jax.Array]


def route(config: OptimConfig, roles: Mapping[str, str]) -> dict[str, GroupConfig]:
    """The group of every leaf. Raises GolfError if a role belongs to no group."""
    by_role = {role: group for group in config.groups for role in group.roles}
    for name, role in roles.items():
        if role not in by_role:
            raise GolfError(f"optim.groups: no group claims role {role!r} (parameter {name})")
    return {name: by_role[role] for name, role in roles.items()}


def norm_clip_factor(squared_norm: jax.Array, limit: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """(global L2 norm, factor min(1, limit / (norm + 1e-6)))."""
    norm = jnp.sqrt(squared_norm)
    return norm, jnp.minimum(1.0, limit / (norm + 1e-6))


def squared_norm(tree: Any) -> jax.Array:
    return sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.float32(0))


def make_optimizer(
    config: OptimConfig,
    params: Mapping[str, jax.ShapeDtypeStruct | jax.Array],
    roles: Mapping[str, str],
    *,
    numerics: str = "fp32",
    live: Mapping[str, jax.Array] | None = None,
    shards: int = 1,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Optimizer over a flat dictionary of leaves.

    params: shapes and storage dtypes. roles: leaf -> role, routed by `config.groups`. numerics `as_run`: Newton-Schulz and the
    gathered updates in bfloat16. live: per leaf a 0/1 mask (broadcastable) of what is trained at all; absent means everything.
    shards, axis_name: number of devices and mesh axis when it runs inside shard_map.

    update(grads, state, params, *, lr_factor, momentum, clip_norm) -> (updates, state): scalars may be traced; `clip_norm` is the
    limit of the global norm after averaging (infinity: none). The state carries the last gradient norm under "grad_norm".
    """
    groups = route(config, roles)
    low = jnp.bfloat16 if numerics == "as_run" else jnp.float32
    muon = [n for n in params if groups[n].kind == "muon"]
    adam = [n for n in params if groups[n].kind == "adamw"]
    momentum_low = config.bf16_momentum and numerics == "as_run"
    dtypes = {n: jnp.dtype(jnp.bfloat16) if momentum_low else params[n].dtype for n in muon}
    layout = StackLayout.of({n: params[n].shape for n in muon}, dtypes, shards)
    muon_rule = scale_by_muon(layout, config.newton_schulz_steps, low, config.row_normalize, axis_name, square_first=config.bf16_momentum)
    rules = {"stacks": muon_rule, "rest": scale_by_adam(*config.betas, config.eps)}

    def split(tree: Tree) -> dict[str, Tree]:
        stacks = layout.pack({n: tree[n].astype(dtypes[n]) for n in muon})
        return {"stacks": stacks, "rest": {n: tree[n] for n in adam}}

    def init(tree: Tree) -> dict[str, Any]:
        parts = split(tree)
        return {part: rule.init(parts[part]) for part, rule in rules.items()} | {"grad_norm": jnp.zeros([], jnp.float32)}

    def average(tree: dict[str, Tree]) -> dict[str, Tree]:
        if axis_name is None:
            return tree
        scatter = lambda x: jax.lax.psum_scatter(x, axis_name, scatter_dimension=0, tiled=True) / shards  # noqa: E731
        return {"stacks": jax.tree.map(scatter, tree["stacks"]), "rest": jax.lax.pmean(tree["rest"], axis_name)}

    def update(grads: Tree, state: dict[str, Any], tree: Tree, *, lr_factor, momentum, clip_norm, **_):
        mean = average(split(grads))
        square = squared_norm(mean["stacks"])
        if axis_name is not None:
            square = jax.lax.psum(square, axis_name)
        norm, factor = norm_clip_factor(square + squared_norm(mean["rest"]), clip_norm)
        mean = jax.tree.map(lambda g: (g * factor).astype(g.dtype), mean)
        out, inner = {}, {}
        for part, rule in rules.items():
            out[part], inner[part] = rule.update(mean[part], state[part], None, momentum=momentum)
        if axis_name is not None:
            out["stacks"] = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), out["stacks"])
        direction = layout.unpack(out["stacks"]) | out["rest"]
        updates = {n: step(n, tree[n], direction[n], lr_factor) if n in direction else jnp.zeros_like(tree[n]) for n in tree}
        return updates, inner | {"grad_norm": norm}

    def step(name: str, p: jax.Array, d: jax.Array, lr_factor) -> jax.Array:
        """-lr * direction and decoupled decay; PR 372 decays the updated weight, the others the weight before."""
        group = groups[name]
        lr = group.lr * lr_factor
        p32, d32 = p.astype(jnp.float32), d.astype(jnp.float32)
        decayed = p32 - lr * d32 if config.decay_last else p32
        u = -lr * d32 - (lr * group.weight_decay) * decayed
        return u if live is None or name not in live else u * live[name]

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
