"""Recipes as JSON and back, and recipes by name."""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import math
import re
import traceback
import types
import typing
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from golf_jax.config import model, recipe
from golf_jax.config.base import GolfError, check, parse_json
from golf_jax.config.recipe import Recipe


def to_dict(config: Any) -> Any:
    """A dataclass (nested) as JSON-able data."""
    if is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(v) for v in config]
    return config


def from_dict(cls: Any, data: Any, where: str = "") -> Any:
    """Inverse of `to_dict`. Raises GolfError naming an unknown, missing or mistyped field."""
    where = where or cls.__name__
    if not isinstance(data, dict):
        raise GolfError(f"{where}: expected an object, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in fields(cls)}
    for unknown in sorted(set(data) - names):
        raise GolfError(f"{where}: unknown field {unknown!r}; {_meant(unknown, names)}")
    values = {}
    for f in fields(cls):
        if f.name not in data:
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            check(not required, f"{where}: field {f.name!r} is missing")
            continue
        values[f.name] = _value(hints[f.name], data[f.name], f"{where}.{f.name}")
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is Literal:
        check(value in args, f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        check(isinstance(value, list | tuple), f"{where}: expected a list, found {value!r}")
        item = args[0] if args[-1] is Ellipsis else None
        if item is None:
            check(len(value) == len(args), f"{where}: expected {len(args)} values, found {len(value)}")
        return tuple(_value(item or args[i], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        named = [name for a in args if typing.get_origin(a) is Literal for name in typing.get_args(a)]
        other = (value is None and type(None) in args) or (isinstance(value, str) and value in named)
        return value if other else _value(args[0], value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf  # the finite check below names the field
    check(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{where}: expected {hint.__name__}, found {value!r}",
    )
    check(hint is not float or math.isfinite(value), f"{where}: {value} is not finite")
    return value


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe of `configs/NAME.py` (shipped in the wheel), of a Python file, or of a JSON file (a run's config.json).

    Raises GolfError naming file, line and cause, whatever the file does.
    """
    path = Path(name_or_path)
    if path.suffix == ".json":
        check(path.is_file(), f"{path}: no such recipe file")
        check(path.stat().st_size < 1 << 24, f"{path}: {path.stat().st_size:,} bytes; no recipe is larger than {1 << 24:,}")
        with _told(path):
            return from_dict(Recipe, parse_json(path.read_bytes()))
    if path.suffix == ".py":
        check(path.is_file(), f"{path}: no such recipe file")
        spec = importlib.util.spec_from_file_location(f"golf_recipe_{path.stem}", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        with _told(path):
            spec.loader.exec_module(module)
    else:
        known = recipe_names()
        check(name_or_path in known, f"no recipe {name_or_path!r}; known: {', '.join(known)} (or give a .py or .json file)")
        module = importlib.import_module(f"golf_jax.configs.{name_or_path}")
    make = getattr(module, "recipe", None)
    check(callable(make), f"{name_or_path}: a recipe file defines a function recipe() that returns a Recipe")
    with _told(Path(module.__file__ or name_or_path)):
        result = make()  # type: ignore[misc]
    check(isinstance(result, Recipe), f"{name_or_path}: recipe() must return a golf_jax.config.Recipe")
    with _told(path):
        return from_dict(Recipe, to_dict(result))  # a field of another type would be found in its config.json only, on --resume


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What goes wrong in the recipe file `path`, as one line with the place in the file and the cause."""
    try:
        yield
    except SyntaxError as error:
        raise GolfError(f"{error.filename or path}{f', line {error.lineno}' if error.lineno else ''}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        cause = str(error) if isinstance(error, GolfError) else f"{type(error).__name__}: {error}"
        if misspelt := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)):
            cls, field = misspelt.groups()
            known = [f.name for module in (model, recipe) if hasattr(module, cls) for f in fields(getattr(module, cls))]
            cause = f"{cls} has no field {field!r}" + (f"; {_meant(field, known)}" if known else "")
        raise GolfError(f"{path}{f', line {lines[-1]}' if lines else ''}: {cause}") from None


def _meant(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"fields are {', '.join(sorted(known))}"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    configs = importlib.import_module("golf_jax.configs")
    return sorted(p.stem for p in Path(configs.__path__[0]).glob("*.py") if p.stem != "__init__")


def differences(there: Any, here: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted field, value there, value here) wherever two configurations as JSON data differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(str(k), there.get(k), here.get(k)) for k in here | there]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(there, here, strict=True))]
    else:
        return [] if there == here else [(path, there, here)]
    return [d for name, a, b in pairs for d in differences(a, b, f"{path}.{name}" if path else name)]
