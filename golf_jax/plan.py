"""Is a recipe possible? Everything that can contradict, before a run directory exists and before anything is compiled."""

import os
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh

from golf_jax.ahead import beside
from golf_jax.artifact.model import check_packing
from golf_jax.config import GolfError, ModelConfig, Recipe
from golf_jax.data import find_shards, open_shard
from golf_jax.data.text import Text, embedded, open_text
from golf_jax.evaluation.methods import methods_of
from golf_jax.evaluation.packed import streams
from golf_jax.mesh import make_mesh, platform
from golf_jax.model import choose, resolve
from golf_jax.model.params import ROLES, leaves
from golf_jax.optim.optimizer import route
from golf_jax.options import Options
from golf_jax.processes import initialize_distributed, keep_compiled_programs, split_cpu
from golf_jax.training.phases import phases
from golf_jax.training.resume import check_alike, devices_of, located
from golf_jax.training.state import begin_state, graph
from golf_jax.training.step import compile_step, micro_rows
from golf_jax.training.trackers import check_tracker


@dataclass(frozen=True)
class Plan:
    """What `check` has found possible: the recipe with every `auto` resolved, the devices, the proved text."""

    asked: Recipe
    """As it was given, its text by absolute places: what config.json and the artifact say."""
    recipe: Recipe
    mesh: Mesh
    text: Text


def check(recipe: Recipe, options: Options) -> Plan:
    """All that can contradict is told here, before a run directory exists and before anything is compiled. Raises GolfError."""
    d = recipe.data
    if options.emulate_devices:
        if (sequences := d.ranks * d.rows_per_rank) % options.emulate_devices:
            raise GolfError(f"--emulate-devices {options.emulate_devices} does not divide the {sequences} sequences of a step")
        d = replace(d, ranks=options.emulate_devices, rows_per_rank=sequences // options.emulate_devices)
        recipe = replace(recipe, data=d)
    check_plan(recipe)
    check_data(recipe)
    check_tracker(options.tracker)
    keep_compiled_programs()
    initialize_distributed()
    before = devices_of(options.resume) if options.resume else 0
    split_cpu(options.devices or before, d.ranks if recipe.optim.clip_per_rank else d.batch_shape[0])
    mesh = make_mesh(options.devices or (min(before, jax.device_count()) if jax.process_count() == 1 else 0))
    # A backend that was asked for by name is used everywhere or refused here; `auto` may be another one where scoring needs the mask.
    masked = d.packed or (recipe.model.attention != "auto" and not {"packed", "documents"}.isdisjoint(methods_of(recipe.eval)))
    chosen = replace(recipe, model=choose(recipe.model, platform(mesh), documents=masked))
    check_devices(chosen, mesh.size)
    if d.train == "embedded" and not options.resume:  # a text that is not refused: no error has to wait for a compiler
        embedded().content_hash(recipe.model.vocab_size)  # before: beside a thread that traces, each file would wait for the interpreter
        begin_state(chosen, mesh)
        beside(_first_program, chosen, mesh)
    text = open_text(d.train, d.val, d.tokenizer, recipe.model.vocab_size, d.seq_len)
    check_text(recipe, len(text.val_tokens), text.tokenizer.bos_id)
    # Only now, as a compiler that it may have to wait for began above.
    resolved = replace(recipe, model=resolve(recipe.model, platform(mesh), documents=masked))
    check_alike(resolved, text.identity, bool(options.resume))
    return Plan(located(recipe), located(resolved), mesh, text)


def _first_program(chosen: Recipe, mesh: Mesh) -> None:
    if chosen.micro_rows != "auto":
        compile_step(graph(chosen), mesh, phases(chosen)[0])


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
