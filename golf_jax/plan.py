"""Is a recipe possible? Everything that can contradict, before a run directory exists and before anything is compiled."""

import os

from golf_jax.artifact.model import check_packing
from golf_jax.config import GolfError, ModelConfig, Recipe
from golf_jax.data import find_shards, open_shard
from golf_jax.evaluation.packed import streams
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


LOOKING_BACK = {"smear_gate": "smear", "input_smear_gate": "smear", "bigram_buckets": "bigram", "trigram_buckets": "trigram"}


def check_text(recipe: Recipe, val_tokens: int, bos_id: int) -> None:
    """Raises GolfError if `model.boundary_token` does not start a document of this text, or validation fills no packed stream."""
    token, packed = recipe.model.boundary_token, recipe.eval.packed
    if packed.on and not len(streams((val_tokens - 1) // packed.seq_len, packed)):
        raise GolfError(
            f"eval.packed: {val_tokens:,} validation tokens fill no stream of {packed.rows} rows of {packed.seq_len} on any of "
            f"{packed.ranks} ranks: lower --eval.packed.rows, --eval.packed.seq-len or --eval.packed.ranks, or give more text"
        )
    if token not in (-1, bos_id):
        raise GolfError(f"model.boundary_token {token}: documents of this text start with BOS {bos_id}; give that, or -1 for none")


def border(model: ModelConfig, bos_id: int) -> str:
    """What looks over the border between two documents of a packed row, as a line of the log."""
    found = {part for field, part in LOOKING_BACK.items() if getattr(model, field)}
    if not found or model.boundary_token >= 0:
        return "documents: nothing looks over the border between two of them"
    return (
        f"documents: attention stays inside them; {', '.join(sorted(found))} mixes the first token of one with the last of the one "
        f"before, as in the record (--model.boundary-token {bos_id} is the fix)"
    )


def check_data(recipe: Recipe) -> None:
    """Raises GolfError if a file of the validation set is among the training shards, or a step takes more tokens than there are."""
    d = recipe.data
    if d.train == "embedded":
        return
    validation = {os.path.realpath(path) for path in find_shards(d.val)}
    shards = find_shards(d.train)
    for path in shards:
        if os.path.realpath(path) in validation:
            raise GolfError(f"data.train: {path} belongs to the validation set ({d.val}); narrow the glob {d.train}")
    sizes = [len(open_shard(path)) for path in shards]
    there = max(sizes) - d.ranks if d.packed else sum(sizes)  # packed rows are of one shard
    if there < d.batch_tokens:
        raise GolfError(
            f"data.train: a step takes {d.batch_tokens:,} tokens (ranks * rows_per_rank * seq_len) and {d.train} holds {there:,}: lower "
            "--data.rows-per-rank, or give more text"
        )
