"""python -m golf_jax.check: the mechanical checks of a run, this project's or another program's, from what it left behind."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from golf_jax import cli
from golf_jax.config import GolfError
<<<<<<< HEAD
from golf_jax.proof.compare import check_significance, select
from golf_jax.proof.finding import Finding, table
from golf_jax.proof.folder import check_shared_logs, check_submission, is_submission, read_submission, submissions
from golf_jax.proof.logs import Run
from golf_jax.proof.own import check_own, check_together, is_run, read_run
=======
>>>>>>> speed

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


<<<<<<< HEAD
def expand(path: Path) -> list[Path]:
    """The path itself, or the runs and submissions in a folder that is none. Raises GolfError if there are none."""
    if not path.exists():
        raise GolfError(f"{path}: does not exist")
    if path.is_file() or is_run(path) or is_submission(path):
        return [path]
    own = {p.parent for p in path.rglob("config.json") if is_run(p.parent)}
    inside = own | {p for p in submissions(path) if not own & {p, *p.parents}}
    if not inside:
        raise GolfError(f"{path}: no log, submission.json or run in it; give a log, a records folder or a run directory")
    return sorted(inside)


def runs_of(path: Path) -> list[Run]:
    """The runs that a path stands for in a comparison: of a submission, those that its claims are about."""
    if is_run(path):
        return [run for run in [read_run(path)] if run]
    submission = read_submission(path)
    return select(submission.runs, submission.claims)


def check(paths: Sequence[Path], baseline: Sequence[Path], rerun: bool = True) -> dict[str, list[Finding]]:
    """Findings by path; run directories are compared with the baseline together, every other path by itself."""
    name, base = ", ".join(map(str, baseline)), [run for path in baseline for run in runs_of(path)]
    own = [path for path in paths if is_run(path)]
    foreign = [read_submission(path) for path in paths if path not in own]
    report = {str(path): check_own(path, rerun) for path in own}
    report |= {str(s.path): check_submission(s) + check_shared_logs(s, foreign) for s in foreign}
    groups = [(str(path), [path]) for path in paths if path not in own]
    if own:
        together = str(own[0]) if len(own) == 1 else f"{len(own)} run directories together"
        report.setdefault(together, []).extend(check_together(own))
        groups.append((together, own))
    for group, members in groups:
        runs = [run for path in members for run in runs_of(path)]
        found = (
            check_significance(runs, base, name) if base else [Finding("not checkable", "significance", "no --baseline to test against")]
        )
        report[group] += found if runs else []
    return report


=======
>>>>>>> speed
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
