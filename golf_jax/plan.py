"""Is a recipe possible? Everything that can contradict, before a run directory exists and before anything is compiled."""

import os

from golf_jax.artifact.model import check_packing
from golf_jax.config import GolfError, Recipe
from golf_jax.data import find_shards, open_shard
from golf_jax.data.text import Text
from golf_jax.model.params import ROLES, leaves
from golf_jax.optim.optimizer import route
from golf_jax.training.step import micro_rows


def check_plan(recipe: Recipe) -> None:
    """What the parts of a recipe must agree on, beyond what each configuration checks by itself. Raises GolfError."""
    table = leaves(recipe.model)
    for name in recipe.model.bf16_params:
        if name not in table:
            raise GolfError(f"model.bf16_params: this model has no parameter {name!r}; it has {', '.join(table)}")
    for group in recipe.optim.groups:
        for role in group.roles:
            if role not in ROLES:
                raise GolfError(f"optim.groups: no parameter has the role {role!r}; roles are {', '.join(ROLES)}")
    route(recipe.optim, {name: leaf.role for name, leaf in table.items()})
    check_packing(recipe)


def check_devices(recipe: Recipe, devices: int) -> None:
    """Raises GolfError if the batch does not divide over the devices."""
    micro_rows(recipe, devices)


def check_text(recipe: Recipe, text: Text) -> None:
    """Raises GolfError if a step takes more tokens than there are, or a file of the validation set is among the training shards."""
    shards = find_shards(text.train)
    there, needed = sum(len(open_shard(path)) for path in shards), recipe.data.batch_tokens
    if there < needed:
        raise GolfError(
            f"data.train: a step takes {needed:,} tokens (ranks * rows_per_rank * seq_len) and {text.train} holds {there:,}: lower "
            "--data.rows-per-rank, or give more text"
        )
    validation = {os.path.realpath(path) for path in find_shards(text.val)}
    for path in shards:
        if os.path.realpath(path) in validation:
            raise GolfError(f"data.train: {path} belongs to the validation set ({text.val}); narrow the glob {text.train}")
