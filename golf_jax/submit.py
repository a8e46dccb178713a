"""python -m golf_jax.submit RUN...: the submission folder of a run, or of the same run with several seeds."""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from golf_jax import cli
from golf_jax.config import GolfError
from golf_jax.options import Author

DESCRIPTION = """Make the submission folder of finished runs: README.md, submission.json, a log and an artifact per seed, requirements.txt,
tokenizer, recipe, and train_gpt.py, which is the code that ran.

  python -m golf_jax.submit runs/pr2005-seed42 runs/pr2005-seed1337 runs/pr2005-seed2025 --author 'A. Name' --github-id aname

The runs are checked first (python -m golf_jax.check). A run that fails, or that is not on the official text and hardware, is refused
for the record track; --non-record writes the folder all the same, with the findings in its README, unless the run's files contradict each
other."""


@dataclass(frozen=True)
class Options:
    about: Annotated[Author, tyro.conf.arg(name="")]
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run directories, one per seed."""
    out: str = ""
    """Folder to write; default: records/track_<track>/<date>_<name>."""
    non_record: bool = False
    """For the non-record track."""
    no_rerun: bool = False
    """Do not score the artifacts again in a fresh process."""


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, prog="python -m golf_jax.submit", description=DESCRIPTION, args=argv)
    if not options.runs:
        raise GolfError("nothing to submit: give the run directories, one per seed")
    from golf_jax.proof.finding import table  # and what follows brings jax in: --help must not wait for it
    from golf_jax.proof.folder import check_submission, read_submission
    from golf_jax.proof.own import check_own, check_together
    from golf_jax.proof.submission import Finished, obstacles, write_submission

    runs, record = [Finished.read(Path(path)) for path in dict.fromkeys(options.runs)], not options.non_record
    if len({run.recipe.seed for run in runs}) < len(runs):
        raise GolfError(f"runs with the same seed: {', '.join(str(run.recipe.seed) for run in runs)}; a submission has one run per seed")
    report = {str(run.path): check_own(run.path, not options.no_rerun) for run in runs}
    report["together"] = check_together([run.path for run in runs])
    print("\n".join(table(path, findings) for path, findings in report.items()))
    if found := obstacles([f for findings in report.values() for f in findings], record):
        listed = "; ".join(f"{rule}: {text}" for rule, text in {f.rule: f.text for f in found}.items())
        raise GolfError(f"no record: {listed}. Mend it, or submit with --non-record" if record else f"no submission: {listed}")
    date = datetime.date.today().isoformat()
    name = re.sub(r"\W+", "_", options.about.name or runs[0].recipe.name).strip("_")
    track = "10min_16mb" if record else "non_record_16mb"
    folder = Path(options.out or f"records/track_{track}/{date}_{name}")
    facts = write_submission(runs, report, options.about, record, folder, date)
    print(table(str(folder), check_submission(read_submission(folder))))
    print(f"{folder}: val_bpb {facts['val_bpb']:.8f} over {len(runs)} seed(s), {facts['bytes_total']:,} bytes")
    return 0


if __name__ == "__main__":
    cli.run(main)
