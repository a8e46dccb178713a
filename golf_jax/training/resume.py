"""What a run directory says about its run, and what may be changed when it goes on."""

import contextlib
import glob
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from golf_jax.config import GolfError, Recipe, differences, from_dict, to_dict
from golf_jax.data.identity import difference
from golf_jax.processes import from_all
from golf_jax.training.runfiles import by_other_code, newest_meta, read_config, read_environment, read_stages

# What cannot change what has been trained; the text is compared by content (`golf_jax.data.identity`), wherever it lies.
PLACES = ("data.train", "data.val", "data.tokenizer")
FREE = ("log_every", "checkpoint_every", "micro_rows", "model.attention", "model.mlp", "quant", "eval", *PLACES)
REPACKED = ("quant", "eval")  # the artifact holds both


def located(recipe: Recipe) -> Recipe:
    """`recipe` with the places of its text as absolute ones, as a run keeps it: it means the same text from every folder."""
    data = recipe.data
    if data.train == "embedded":
        return recipe

    def absolute(place: str, folder: Callable[[], str]) -> str:
        return place if os.path.isabs(place) else os.path.join(folder(), place)

    train, val = (absolute(pattern, lambda: glob.escape(os.getcwd())) for pattern in (data.train, data.val))
    return replace(recipe, data=replace(data, train=train, val=val, tokenizer=absolute(data.tokenizer, os.getcwd)))


def stored_recipe(path: str | Path) -> Recipe:
    """The recipe of the run in `path`. Raises GolfError, also if config.json is not what the run wrote: `stages.json` has it, sealed, and
    where that was removed the newest checkpoint, up to what cannot change what has been trained."""
    stored, written, free = read_config(Path(path)), read_stages(Path(path)).get("recipe"), ()
    if not written:
        written, free = newest_meta(Path(path)).get("recipe"), FREE
    places = to_dict(located(stored).data)  # of a run that began with relative ones, killed between stages.json and config.json
    for field, before, now in differences(_of_now(written), to_dict(stored)) if written else ():
        if not _within(field, free) and not (field in PLACES and places[field.removeprefix("data.")] == before):
            was = f"{field} is {now!r} and was {before!r} when the run wrote it; put that back, and give what is to change as a flag"
            raise GolfError(f"{Path(path) / 'config.json'}: {was}{by_other_code(Path(path))}")
    return stored


def _of_now(recipe: dict[str, Any]) -> dict[str, Any]:
    """`recipe`, as JSON data, with the fields that it had not when another version wrote it; as it is where this version cannot read it."""
    with contextlib.suppress(GolfError):
        return to_dict(from_dict(Recipe, recipe))
    return recipe


def devices_of(path: str | Path) -> int:
    """How many devices the run in `path` used; 0 where it does not say."""
    return (read_environment(Path(path)) or {}).get("devices_used", 0)


def elsewhere(path: str | Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run is computed by `here` (fields of environment.json) and was by something else, as JSON data {field, before, after}; what it
    does not say is left out."""
    there: dict[str, Any] = dict(read_environment(Path(path)) or {})
    return [{"field": name, "before": there[name], "after": now} for name, now in here.items() if there.get(name, now) != now]


def _within(field: str, names: tuple[str, ...]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)


def changed(stored: Recipe, recipe: Recipe, accept: tuple[str, ...], path: str | Path) -> list[dict[str, Any]]:
    """What differs from the recipe of the run in `path`, as JSON data {field, before, after}.

    Raises GolfError for a field that would change what has been trained, unless `accept` names it, and for a name in `accept` that
    differs in nothing.
    """
    found = differences(to_dict(stored), to_dict(recipe))
    for field, before, after in found:
        if not _within(field, FREE + accept):
            raise GolfError(
                f"--resume {path}: {field} is {before!r} there and {after!r} here; that changes what has been trained: start a new run, "
                f"or go on all the same with --accept {field}"
            )
    for name in accept:
        if not any(_within(field, (name,)) for field, _, _ in found):
            raise GolfError(f"--accept {name}: nothing of that name differs from the run in {path}")
    return [{"field": field, "before": before, "after": after} for field, before, after in found]


def check_same_recipe(path: Path, meta: dict[str, Any], recipe: dict[str, Any], changes: list[dict[str, Any]]) -> None:
    """GolfError if a checkpoint was made by a recipe that differs from the run's in what no resume of it has changed: another run's."""
    known = FREE + tuple(change["field"] for change in changes)
    for field, there, here in differences(_of_now(meta["recipe"]), recipe):
        if not _within(field, known):
            raise GolfError(
                f"checkpoint {meta['step']} is another run's: {field} is {there!r} there and {here!r} in config.json; remove it"
            )


def check_alike(recipe: Recipe, identity: dict[str, Any], resumed: bool) -> None:
    """GolfError, on all processes, if one was started with other flags or reads another text than process 0: they would wait for each
    other for ever, or train on what nobody meant. Where the text lies may differ."""
    mine = {"recipe": to_dict(recipe), "text": identity, "resume": resumed}
    first, *others = map(json.loads, from_all(json.dumps(mine)))
    for number, other in enumerate(others, 1):
        found = [one for one in differences(first["recipe"], other["recipe"]) if not _within(one[0], PLACES)]
        found += [("--resume", first["resume"], other["resume"])] * (first["resume"] != other["resume"])
        what = difference(first["text"], other["text"])
        what = f"the text of process {number} is not that of process 0: {what}" if what else ""
        if found:
            what = f"{found[0][0]} is {found[0][1]!r} in process 0 and {found[0][2]!r} in process {number}"
        if what:
            or_else = ", or with --model.attention xla where a compiler is not everywhere" * what.startswith("model.attention ")
            raise GolfError(f"{what}; start all processes with the same command and the same files{or_else}")


def stages_to_repeat(changes: list[dict[str, Any]]) -> tuple[str, ...]:
    """The finished stages that `changes` make void."""
    if any(not _within(c["field"], FREE) for c in changes):
        return ("train", "pack", "evaluations")
    return ("pack", "evaluations") if any(_within(c["field"], REPACKED) for c in changes) else ()
