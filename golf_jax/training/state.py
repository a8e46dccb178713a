"""What training carries from step to step, and how it lies on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from golf_jax.config import Recipe
from golf_jax.mesh import AXIS, REPLICATED, ROWS
from golf_jax.model.params import dead_layers, init_params, leaves
from golf_jax.optim.averaging import ema_init, swa_init
from golf_jax.optim.optimizer import make_optimizer


class TrainState(NamedTuple):
    """Donated to every step. `ema`, `swa` and `stale` are None where the recipe has none."""

    params: dict[str, jax.Array]
    opt: Any
    ema: dict[str, jax.Array] | None
    swa: Any
    stale: dict[str, jax.Array] | None
    """PR 1182: per rank, the never-cleared gradients of frozen parameters, [ranks, ...]."""


def optimizer(recipe: Recipe, params: Any, shards: int, axis_name: str | None) -> optax.GradientTransformationExtraArgs:
    """The recipe's optimizer for parameters of these shapes and dtypes."""
    table = leaves(recipe.model)
    live = {}
    for name, leaf in table.items():
        if dead := dead_layers(recipe.model, name):
            mask = (np.arange(leaf.shape[0]) >= dead).astype(np.float32)
            live[name] = jnp.asarray(mask).reshape(-1, *[1] * (len(leaf.shape) - 1))
    return make_optimizer(
        recipe.optim,
        params,
        {name: leaf.role for name, leaf in table.items()},
        numerics=recipe.numerics,
        live=live,
        shards=shards,
        axis_name=axis_name,
    )


def frozen_names(recipe: Recipe) -> list[str]:
    """Parameters that no optimizer owns."""
    frozen = {role for g in recipe.optim.groups if g.kind == "frozen" for role in g.roles}
    return [name for name, leaf in leaves(recipe.model).items() if leaf.role in frozen]


def make_state(recipe: Recipe, params: dict[str, jax.Array], shards: int) -> TrainState:
    """Fresh state around `params`: shapes depend on the number of devices only through the padding of Muon's batches."""
    stale = None
    if recipe.optim.leaks_frozen_gradients:
        stale = {n: jnp.zeros((recipe.data.ranks, *params[n].shape), jnp.float32) for n in frozen_names(recipe)}
    return TrainState(
        params,
        optimizer(recipe, params, shards, None).init(params),
        ema_init(params) if recipe.schedule.ema_decay else None,
        swa_init(params) if recipe.schedule.swa_every else None,
        stale,
    )


def state_specs(state: TrainState) -> TrainState:
    """Partition of every array: Muon's momentum and the stale gradients split over devices, the rest replicated."""

    def spec(path: tuple, _: Any) -> PartitionSpec:
        keys = [getattr(k, "key", getattr(k, "name", None)) for k in path]
        return ROWS if "stale" in keys or ("opt" in keys and "stacks" in keys) else REPLICATED

    return jax.tree_util.tree_map_with_path(spec, state)


def _maker(recipe: Recipe, mesh: Mesh, params: dict[str, Any] | None) -> tuple[Any, TrainState]:
    """(function of a key and given parameters to the state, its shapes with their shardings)."""
    shards = mesh.shape[AXIS]

    def make(key: jax.Array, given: dict[str, jax.Array] | None) -> TrainState:
        return make_state(recipe, init_params(recipe.model, key, recipe.numerics) if given is None else given, shards)

    shapes = jax.eval_shape(make, jax.random.key(0), params)
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    return make, jax.tree.map(place, shapes, state_specs(shapes))


def state_shapes(recipe: Recipe, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on the mesh, for reading a checkpoint into it."""
    return _maker(recipe, mesh, None)[1]


def init_state(recipe: Recipe, mesh: Mesh, seed: int, params: dict[str, Any] | None = None) -> TrainState:
    """State on the mesh, from the recipe's initialisation or from given parameters (any device, any host)."""
    make, shapes = _maker(recipe, mesh, params)
    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(jax.random.key(seed), params)
