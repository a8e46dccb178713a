"""What the command lines share: recipe overrides, and errors told in one line instead of a traceback."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from golf_jax.config import GolfError, Recipe, load_recipe, recipe_names
from golf_jax.interrupt import Interrupted


def parse(argv: Sequence[str], options: Any, description: str, default: str | Recipe = "quickstart") -> tuple[Recipe, Any]:
    """(recipe, options) from `[CONFIG] [--section.field value ...] [--option value ...]`.

    CONFIG: a shipped recipe's name or a Python file, first on the line. options: a dataclass instance whose fields become further
    flags. Raises GolfError for a recipe that contradicts itself; exits with tyro's message for an unknown flag.
    """
    argv = list(argv)
    chosen = argv.pop(0) if argv and not argv[0].startswith("-") else default
    recipe = load_recipe(chosen) if isinstance(chosen, str) else chosen
    name = chosen if isinstance(chosen, str) else chosen.name
    everything = dataclasses.make_dataclass(
        "Arguments",
        [
            ("options", Annotated[type(options), tyro.conf.arg(name="")], dataclasses.field(default=options)),
            ("recipe", Annotated[Recipe, tyro.conf.arg(name="")], dataclasses.field(default=recipe)),
        ],
        frozen=True,
    )
    text = f"{description}\n\nFirst argument: the recipe, one of {', '.join(recipe_names())}, or a .py file (here: {name})."
    prog = f"python -m golf_jax.{Path(sys.argv[0]).stem} {name}"
    parsed = tyro.cli(everything, args=argv, prog=prog, description=text, config=(tyro.conf.AvoidSubcommands,))
    return parsed.recipe, parsed.options


def value_of(argv: Sequence[str], flag: str) -> str:
    """What `flag` is given on the line, before it is parsed; empty where it is not there."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return ""


def run(main: Callable[[list[str]], int]) -> None:
    """Run a command's main and exit: a GolfError becomes one line on stderr and status 2, Ctrl-C status 130."""
    try:
        sys.exit(main(sys.argv[1:]))
    except GolfError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except Interrupted as stop:
        sys.exit(stop.status)
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
