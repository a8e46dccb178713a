"""The checks of everything that was given: which runs and submissions lie there, and the findings of each."""

from collections.abc import Sequence
from pathlib import Path

from golf_jax.config import GolfError
from golf_jax.proof.compare import check_significance, select
from golf_jax.proof.finding import Finding
from golf_jax.proof.folder import check_shared_logs, check_submission, is_submission, read_submission, submissions
from golf_jax.proof.logs import Run
from golf_jax.proof.own import check_own, check_together, is_run, read_run


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
