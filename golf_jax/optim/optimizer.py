"""The optimizer of a recipe: average, clip, Muon and AdamW directions, learning rates and decay.

It runs as it stands on one device, and inside `jax.shard_map` on many: then it takes each device's own gradient, and communicates
exactly this: a reduce-scatter of the matrix batches, an all-reduce of the other gradients and of one norm, an all-gather of the
matrix updates.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from golf_jax.config import GolfError, GroupConfig, OptimConfig
from golf_jax.mesh import ROWS
from golf_jax.optim.adam import AdamScalars, adam
from golf_jax.optim.muon import muon
from golf_jax.optim.rule import Rule, Tree
from golf_jax.optim.schedules import muon_momentum


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


class GroupScalars(NamedTuple):
    """What one group reads in a step, as traced float32 scalars: none of it is compiled in."""

    lr: Any
    weight_decay: Any
    rule: Any
    """Of Muon the momentum, of AdamW its `AdamScalars`."""


class Optimizer(NamedTuple):
    """One optimizer over a flat dictionary of leaves; its state is group -> state of the group's rule."""

    spec: dict[str, PartitionSpec]
    """How the state lies on the mesh, per group."""
    init: Callable[[Tree], dict[str, Any]]
    update: Callable[..., tuple[Tree, dict[str, Any], jax.Array]]
    """(grads, state, params, *, lr_factor, groups, clip_norm) -> (updates, state, global gradient norm). groups: `group_scalars`;
    clip_norm: limit of the norm after averaging (infinity: none)."""


# kind -> (rule of a group over the shapes of its leaves, host values of the rule's float32 scalars at a step: one, or a tree of them)
RULES: dict[str, tuple[Callable[..., Rule], Callable[[GroupConfig, int], Any]]] = {
    "muon": (muon, lambda group, step: np.float32(muon_momentum(group, step))),
    "adamw": (lambda *_: adam(), lambda group, step: AdamScalars.of(*group.betas, group.eps)),
}


def group_scalars(config: OptimConfig, step: int) -> dict[str, GroupScalars]:
    """Host values of every group's scalars in a step."""
    return {
        g.name: GroupScalars(np.float32(g.lr), np.float32(g.weight_decay), RULES[g.kind][1](g, step))
        for g in config.groups
        if g.kind in RULES
    }


def make_optimizer(
    config: OptimConfig,
    params: Mapping[str, jax.ShapeDtypeStruct | jax.Array],
    roles: Mapping[str, str],
    *,
    numerics: str = "fp32",
    live: Mapping[str, jax.Array] | None = None,
    shards: int = 1,
    axis_name: str | None = None,
    backend: str = "xla",
) -> Optimizer:
    """Optimizer over a flat dictionary of leaves.

    params: shapes and storage dtypes. roles: leaf -> role, routed by `config.groups`. numerics `as_run`: Newton-Schulz and the
    gathered updates in bfloat16. live: per leaf a 0/1 mask (broadcastable) of what is trained at all; absent means everything.
    shards, axis_name: number of devices and mesh axis when it runs inside shard_map.
    backend: of attention, which Newton-Schulz shares.
    """
    groups = route(config, roles)
    owned = {g.name: [n for n in params if groups[n] == g] for g in config.groups if g.kind in RULES}
    rules = {
        g.name: RULES[g.kind][0](g, {n: params[n] for n in owned[g.name]}, numerics, shards, axis_name, backend)
        for g in config.groups
        if g.kind in RULES
    }
    shared = [name for name, rule in rules.items() if rule.spec == ROWS]

    def split(tree: Tree) -> dict[str, Tree]:
        return {name: rule.pack({n: tree[n] for n in owned[name]}) for name, rule in rules.items()}

    def init(tree: Tree) -> dict[str, Any]:
        parts = split(tree)
        return {name: rule.init(parts[name]) for name, rule in rules.items()}

    def average(parts: dict[str, Tree]) -> dict[str, Tree]:
        if axis_name is None:
            return parts
        scatter = lambda x: jax.lax.psum_scatter(x, axis_name, scatter_dimension=0, tiled=True) / shards  # noqa: E731
        whole = jax.lax.pmean({name: part for name, part in parts.items() if name not in shared}, axis_name)
        return whole | {name: jax.tree.map(scatter, parts[name]) for name in shared}

    def norm_of(mean: dict[str, Tree]) -> jax.Array:
        square = squared_norm([mean[name] for name in shared])
        if axis_name is not None:
            square = jax.lax.psum(square, axis_name)
        return square + squared_norm({n: g for name, part in mean.items() if name not in shared for n, g in part.items()})

    def update(grads: Tree, state: dict[str, Any], tree: Tree, *, lr_factor, groups: dict[str, GroupScalars], clip_norm):
        mean = average(split(grads))
        norm, factor = norm_clip_factor(norm_of(mean), clip_norm)
        mean = jax.tree.map(lambda g: (g * factor).astype(g.dtype), mean)
        updates, new = {n: jnp.zeros_like(p) for n, p in tree.items()}, {}
        for name, rule in rules.items():
            out, new[name] = rule.update(mean[name], state[name], groups[name].rule)
            if axis_name is not None and name in shared:
                out = jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), out)
            lr, decay = groups[name].lr * lr_factor, groups[name].weight_decay
            updates |= {n: step(n, tree[n], d, lr, decay) for n, d in rule.unpack(out).items()}
        return updates, new, norm

    def step(name: str, p: jax.Array, d: jax.Array, lr: jax.Array, weight_decay: jax.Array) -> jax.Array:
        """-lr * direction and decoupled decay; PR 372 decays the updated weight, the others the weight before."""
        p32, d32 = p.astype(jnp.float32), d.astype(jnp.float32)
        decayed = p32 - lr * d32 if config.decay_last else p32
        u = -lr * d32 - (lr * weight_decay) * decayed
        return u if live is None or name not in live else u * live[name]

    return Optimizer({name: rule.spec for name, rule in rules.items()}, init, update)
