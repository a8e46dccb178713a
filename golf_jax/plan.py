"""Is a recipe possible? Everything that can contradict, before a run directory exists and before anything is compiled."""

from golf_jax.config import GolfError, Recipe
from golf_jax.model.params import leaves
from golf_jax.optim.optimizer import route
from golf_jax.training.step import micro_rows


def check_plan(recipe: Recipe) -> None:
    """What the parts of a recipe must agree on, beyond what each configuration checks by itself. Raises GolfError."""
    table = leaves(recipe.model)
    if unknown := [name for name in recipe.model.bf16_params if name not in table]:
        raise GolfError(f"model.bf16_params: this model has no parameter {unknown[0]!r}; it has {', '.join(table)}")
    roles = {leaf.role for leaf in table.values()}
    route(recipe.optim, {name: leaf.role for name, leaf in table.items()})
    known = {"matrix", "gate", "proj", "token", "table", "trigram", "vector"}
    for group in recipe.optim.groups:
        for role in group.roles:
            if role not in known:
                raise GolfError(f"optim.groups: no parameter ever has the role {role!r}; roles are {', '.join(sorted(known))}")
    del roles


def check_devices(recipe: Recipe, devices: int) -> None:
    """Raises GolfError if the batch does not divide over the devices."""
    micro_rows(recipe, devices)
