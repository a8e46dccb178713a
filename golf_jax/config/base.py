"""The one error users see, the challenge's limits, and checks that configurations share."""

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

CAP_BYTES = 16_000_000  # artifact cap of the challenge, decimal, code + model
MAX_RANKS = 1 << 12  # that a run or its evaluation reproduces: a line of a file must not cost the memory of the machine
LIMIT_SECONDS = 600.0  # of the challenge, for training, and again for evaluation
MAX_LINE = 1000  # characters of an error


def escape(text: str) -> str:
    """`text` with everything that could steer a terminal or break the line (control characters, lone surrogates) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class GolfError(ValueError):
    """A mistake of the user, or bad input, told in one line that names the place, the field and the fix."""

    def __str__(self) -> str:
        line = escape(super().__str__())  # of a hostile file it may hold anything, of any length
        return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 200]} ... {line[-190:]}"


@contextlib.contextmanager
def named(where: str | Path) -> Iterator[None]:
    """A GolfError from within says in front where it happened."""
    try:
        yield
    except GolfError as error:
        raise type(error)(f"{where}: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """The value in `text`. GolfError (a ValueError) for anything that is not JSON: also NaN, what is nested too deep or not UTF-8, and a
    name that an object has twice, of which readers take the one or the other."""

    def number(literal: str) -> float:
        if not math.isfinite(value := float(literal)):
            raise ValueError(f"{literal[:20]} is no finite number")
        return value

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if again := repeated(pairs):
            raise ValueError(f"{again[0]!r} stands twice in one object")
        return dict(pairs)

    try:
        return json.loads(text, parse_constant=number, parse_float=number, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise GolfError(f"not JSON ({str(error)[:80]})") from None


def repeated(pairs: list[tuple[str, Any]]) -> list[str]:
    """The names that a JSON object has more than once."""
    return [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]


def check(ok: bool, message: str) -> None:
    if not ok:
        raise GolfError(message)


def not_negative(config: Any, section: str, *names: str) -> None:
    for name in names:
        check(getattr(config, name) >= 0, f"{section}.{name} must be >= 0, got {getattr(config, name)}")


def positive(config: Any, section: str, *names: str) -> None:
    for name in names:
        check(getattr(config, name) > 0, f"{section}.{name} must be positive, got {getattr(config, name)}")


def countable(config: Any, section: str, *names: str) -> None:
    for name in names:
        check(getattr(config, name) <= MAX_RANKS, f"{section}.{name} must be at most {MAX_RANKS:,}, got {getattr(config, name)}")


def check_finite(config: Any, path: str = "") -> None:
    """Raises GolfError for a number anywhere in a configuration that is NaN, infinite, or an integer that JSON cannot carry exactly."""
    if isinstance(config, int):
        check(abs(config) < 1 << 53, f"{path}: {config} is too large a number")
    elif isinstance(config, float):
        check(math.isfinite(config), f"{path}: {config} is not a finite number")
    elif is_dataclass(config):
        for f in fields(config):
            check_finite(getattr(config, f.name), f"{path}.{f.name}" if path else f.name)
    elif isinstance(config, tuple):
        for i, value in enumerate(config):
            check_finite(value, f"{path}.{i}")
