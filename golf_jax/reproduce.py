"""Does this implementation compute what a PyTorch script computed? A reference set in, a table of errors out.

    python -m golf_jax.reproduce SET [--json FILE] [--only model,train]
    python -m golf_jax.reproduce --check-format SET

SET: a directory with reference.json and npz files, or one portable npz file (docs/reference-format.md), of any recipe or recipe file,
with any of the format's sections. The set brings its tolerances. What cannot be computed here is named as not checked.
Exit status 0: all within tolerance; 1: a miss, or a set that does not conform; 2: bad input, told in one line.
"""

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from golf_jax import cli
from golf_jax.config import GolfError


@dataclass(frozen=True)
class Arguments:
    """See the module."""

    path: Annotated[Path, tyro.conf.Positional]
    """A reference set: a directory, or one portable npz file."""
    check_format: bool = False
    """Only say whether the set conforms to the format."""
    json: Path | None = None
    """Write the results here as JSON."""
    only: str = ""
    """Only these sections, separated by commas."""
    devices: int = 1
    """Devices for training and evaluation: the results do not depend on it."""


def reproduce(path: Path, only: str = "", devices: int = 1) -> tuple[str, list, dict[str, str]]:
    """(recipe, results of every section of the set, what could not be checked here and why); prints each row as it is there."""
    from golf_jax.interop.checks import CHECKS, Set, run

    if unknown := set(filter(None, only.split(","))) - set(CHECKS):
        raise GolfError(f"--only {', '.join(sorted(unknown))}: no such section; known: {', '.join(CHECKS)}")
    refs = Set(path, devices)
    names = [name for name in CHECKS if name in refs.json["sections"] and (not only or name in only.split(","))]
    if not names:
        raise GolfError(f"{path}: no section to check; it has {', '.join(refs.json['sections'])}")
    print(f"{refs.json['recipe']}: {path}\n{'check':58} {'items':>7} {'max abs':>10} {'max rel':>10} {'tolerance':>18}  ok")
    results, begin = [], time.perf_counter()
    for name in names:
        for r in run(refs, name):
            results.append(r)
            tolerance = "equal" if r.measure == "equal" and not r.tolerance else f"{r.tolerance:.1e} {r.measure}"
            miss = "" if r.ok else f" <- {r.worst}"
            row = f"{r.name:58} {r.compared:7d} {r.max_abs:10.2e} {r.max_rel:10.2e} {tolerance:>18}"
            print(f"{row}  {'ok' if r.ok else 'MISS'}{miss}", flush=True)
    for name, why in refs.not_checked.items():
        print(f"{name:58} not checked: {why}")
    missed, items = sum(not r.ok for r in results), sum(r.compared for r in results)
    print(f"{len(results)} checks of {items} items in {time.perf_counter() - begin:.0f} s, {missed or 'none'} missed")
    return refs.json["recipe"], results, refs.not_checked


def main(argv: list[str]) -> int:
    args = tyro.cli(Arguments, args=argv, prog="python -m golf_jax.reproduce", description=__doc__)
    from golf_jax.processes import split_cpu  # jax reads JAX_PLATFORMS when it is imported: not before the line at the end has set it

    split_cpu(args.devices, sequences=1)
    if args.check_format:
        from golf_jax.interop.checks.conformity import problems

        found = problems(args.path)
        print("\n".join([f"{args.path}: {f'{len(found)} problems' if found else 'conforms'}", *(f"  {line}" for line in found)]))
        return int(bool(found))
    recipe, results, not_checked = reproduce(args.path, args.only, args.devices)
    if args.json:
        document = {"recipe": recipe, "checks": [dataclasses.asdict(r) for r in results], "not_checked": not_checked}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(not results or any(not r.ok for r in results))


if __name__ == "__main__":
    # The references are float32 on a CPU; on an accelerator matrix products would be rounded otherwise.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cli.run(main)
