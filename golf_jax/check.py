"""python -m golf_jax.check: the mechanical checks of a run, this project's or another program's, from what it left behind."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from golf_jax import cli
from golf_jax.config import GolfError

DESCRIPTION = """Check runs against the rules of the challenge.

  python -m golf_jax.check runs/quickstart                       a run directory: measured again from its files
  python -m golf_jax.check records/.../2026-05-01_name           a records folder: README, submission.json, logs, train_gpt.py
  python -m golf_jax.check train_seed42.log                      a log alone
  python -m golf_jax.check FOLDER --baseline OTHER               with the t-test against another submission

Every line is pass, fail, warning or not checkable, with the figures, the line they stand on, and the rule. Exit status: 1 if a check
fails, 2 if there is nothing to check."""


@dataclass(frozen=True)
class Options:
    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run directories, records folders (or a folder of them), logs."""
    baseline: str = ""
    """A log or folder that every path is tested against: better by 0.005 nats per token at p < 0.01?"""
    no_rerun: bool = False
    """Do not score the artifact of a run directory again in a fresh process."""
    json: bool = False
    """Print the findings as JSON."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, prog="python -m golf_jax.check", description=DESCRIPTION, args=argv)
    if not options.paths:
        raise GolfError("nothing to check: give a log, a records folder or a run directory")
    from golf_jax.proof.checking import check, expand  # with jax: --help must not wait for it
    from golf_jax.proof.finding import table

    paths = list(dict.fromkeys(p for given in options.paths for p in expand(Path(given))))
    baseline = expand(Path(options.baseline)) if options.baseline else []
    report = check(paths, baseline, not options.no_rerun)
    if options.json:
        print(json.dumps({path: [f.to_dict() for f in findings] for path, findings in report.items()}, indent=1))
    else:
        print("\n".join(table(path, findings) for path, findings in report.items()))
    return int(any(f.status == "fail" for findings in report.values() for f in findings))


if __name__ == "__main__":
    cli.run(main)
