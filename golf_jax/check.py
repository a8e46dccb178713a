"""python -m golf_jax.check: the mechanical checks of a run, this project's or another program's, from what it left behind."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from golf_jax import cli
from golf_jax.config import GolfError
from golf_jax.proof.compare import check_significance, select
from golf_jax.proof.finding import Finding, table
from golf_jax.proof.folder import Submission, check_submission, is_submission, read_submission

DESCRIPTION = """Check runs against the rules of the challenge.

  python -m golf_jax.check runs/quickstart                       a run directory: measured again from its files
  python -m golf_jax.check records/.../2026-05-01_name           a records folder: README, submission.json, logs, train_gpt.py
  python -m golf_jax.check train_seed42.log                      a log alone
  python -m golf_jax.check FOLDER --baseline OTHER               with the t-test against another submission

Every line is pass, fail, warning or not checkable, with the figures, the line they stand on, and the rule. Exit status: 1 if a check
fails, 2 if there is nothing to check."""


@dataclass(frozen=True)
class Options:
    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories, records folders (or a folder of them), logs."""
    baseline: str = ""
    """A log or folder that every path is tested against: better by 0.005 nats per token at p < 0.01?"""
    json: bool = False
    """Print the findings as JSON."""


def expand(path: Path) -> list[Path]:
    """The path itself, or the submissions in a folder that is none. Raises GolfError if there are none."""
    if not path.exists():
        raise GolfError(f"{path}: does not exist")
    if path.is_file() or is_submission(path):
        return [path]
    inside = sorted({p.parent for p in path.rglob("submission.json")})
    if not inside:
        raise GolfError(f"{path}: no log, submission.json or run in it; give a log, a records folder or a run directory")
    return inside


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, prog="python -m golf_jax.check", description=DESCRIPTION, args=argv)
    baseline = read_submission(Path(options.baseline)) if options.baseline else None
    report: dict[str, list[Finding]] = {}
    for path in (p for given in options.paths for p in expand(Path(given))):
        submission = read_submission(path)
        report[str(path)] = check_submission(submission) + significance(submission, baseline)
    if options.json:
        print(json.dumps({path: [f.to_dict() for f in findings] for path, findings in report.items()}, indent=1))
    else:
        for path, findings in report.items():
            count = {status: sum(f.status == status for f in findings) for status in ("pass", "fail", "warning", "not checkable")}
            print(f"{path}: {', '.join(f'{n} {status}' for status, n in count.items() if n)}\n{table(findings)}\n")
    return int(any(f.status == "fail" for findings in report.values() for f in findings))


def significance(submission: Submission, baseline: Submission | None) -> list[Finding]:
    if baseline is None:
        return [Finding("not checkable", "significance", "no --baseline to test against")] * bool(submission.runs)
    runs, base = select(submission.runs, submission.claims), select(baseline.runs, baseline.claims)
    return check_significance(runs, base, str(baseline.path))


if __name__ == "__main__":
    cli.run(main)
