"""What training carries from step to step, and how it lies on the mesh."""

from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from golf_jax.ahead import beside, kept
from golf_jax.config import DataConfig, EvalConfig, GroupConfig, Recipe, ScheduleConfig, SlidingConfig
from golf_jax.mesh import AXIS, REPLICATED, ROWS, platform, run_rarely
from golf_jax.model.module import GPT
from golf_jax.model.params import dead_layers, leaves
from golf_jax.optim.averaging import ema_init, swa_init
from golf_jax.optim.optimizer import Optimizer, make_optimizer


class TrainState(NamedTuple):
    """Donated to every step. `ema`, `swa` and `stale` are None where the recipe has none."""

    params: dict[str, jax.Array]
    opt: Any
    ema: dict[str, jax.Array] | None
    swa: Any
    stale: dict[str, jax.Array] | None
    """PR 1182: per rank, the never-cleared gradients of frozen parameters, [ranks, ...]."""


def optimizer(recipe: Recipe, params: Any, shards: int, axis_name: str | None) -> Optimizer:
    """The recipe's optimizer for parameters of these shapes and dtypes."""
    table = leaves(recipe.model)
    live = {}
    for name, leaf in table.items():
        if dead := dead_layers(recipe.model, name):
            mask = (np.arange(leaf.shape[0]) >= dead).astype(np.float32)
            live[name] = mask.reshape(-1, *[1] * (len(leaf.shape) - 1))
    return make_optimizer(
        recipe.optim,
        params,
        {name: leaf.role for name, leaf in table.items()},
        numerics=recipe.numerics,
        live=live,
        shards=shards,
        axis_name=axis_name,
        backend=recipe.model.attention,
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


def state_specs(recipe: Recipe) -> TrainState:
    """Partition of every part, as a prefix of the state's tree: the optimizer's rules say theirs, stale gradients lie with their rank."""
    whole: Any = REPLICATED
    by_rank: Any = ROWS
    return TrainState(whole, optimizer(recipe, {}, 1, None).spec, whole, whole, by_rank)


def state_shardings(recipe: Recipe, mesh: Mesh) -> TrainState:
    """`state_specs` on a mesh, likewise a prefix."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(recipe))


def graph(recipe: Recipe) -> Recipe:
    """What of a recipe shapes its compiled programs; all that enters as a scalar, or not at all, at fixed values. The key of what is kept
    compiled: runs that agree in it compile once."""
    settings = ("lr", "weight_decay", "betas", "eps", "momentum", "momentum_start", "momentum_warmup_steps")
    plain = {f.name: f.default for f in fields(GroupConfig) if f.name in settings}
    o, s, d = recipe.optim, recipe.schedule, recipe.data
    return Recipe(
        "",
        recipe.model,
        DataConfig(seq_len=d.seq_len, ranks=d.ranks, rows_per_rank=d.rows_per_rank, order="documents" if d.packed else "stream"),
        replace(o, groups=tuple(replace(g, **plain) for g in o.groups), clip_norm=1.0),
        schedule=ScheduleConfig(
            ema_decay=0.5 if s.ema_decay else 0.0,
            swa_every=int(s.swa_every > 0),
            export="raw",
            fake_quant_below=float(s.fake_quant_below > 0),
        ),
        eval=EvalConfig(sliding=SlidingConfig(stride=0)),
        numerics=recipe.numerics,
        micro_rows=recipe.micro_rows,
    )


@lru_cache(maxsize=8)
def _maker(graph: Recipe, mesh: Mesh) -> Any:
    """Compiled-on-first-use function of a key and given parameters (or None) to the state on the mesh."""

    def make(key: jax.Array, given: dict[str, jax.Array] | None) -> TrainState:
        params = GPT(graph.model, graph.numerics).init(key)["params"] if given is None else given
        return make_state(graph, params, mesh.shape[AXIS])

    return jax.jit(make, out_shardings=state_shardings(graph, mesh), compiler_options=run_rarely(platform(mesh)))


def state_shapes(recipe: Recipe, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on the mesh, for reading a checkpoint into it."""
    return jax.eval_shape(_maker(graph(recipe), mesh), jax.random.key(0), None)


def init_state(recipe: Recipe, mesh: Mesh, seed: int, params: dict[str, Any] | None = None) -> TrainState:
    """State on the mesh, from the recipe's initialisation or from given parameters (any device, any host)."""
    if params is not None:
        return _maker(graph(recipe), mesh)(jax.random.key(seed), params)
    return _initial.take(graph(recipe), mesh, seed)


@kept(1)
def _initial(graph: Recipe, mesh: Mesh, seed: int) -> TrainState:
    return _maker(graph, mesh)(jax.random.key(seed), None)


def begin_state(recipe: Recipe, mesh: Mesh) -> None:
    """Begin what `init_state` will be asked for: its program and, where the devices have nothing else to do yet, the state itself."""
    beside(_initial, graph(recipe), mesh, recipe.seed)
