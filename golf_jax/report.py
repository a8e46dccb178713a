"""python -m golf_jax.report: runs as one HTML page that opens from disk."""

import importlib.util
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from golf_jax import cli
from golf_jax.config import GolfError
from golf_jax.config.base import check
from golf_jax.files import check_target, write_atomic

DESCRIPTION = """Show runs in one self-contained HTML file: training, schedule, bytes, quantization, a text sample, what differs.

  python -m golf_jax.report runs/quickstart                          writes runs/quickstart/report.html
  python -m golf_jax.report runs/a runs/b runs/c --out compared.html  what differs, with mean, deviation and p
  python -m golf_jax.report sweeps/lr --score-again 20000            a folder of runs; scored again by position and document

A run that is still going on is shown as far as it has come. Needs Matplotlib: pip install 'golf-jax[report]'."""


@dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run directories, or folders of them."""
    out: str = ""
    """The file to write (default: report.html in the first folder given)."""
    score_again: int = 0
    """Score about the first N validation targets through the artifact, for bits per byte by position and by document (0: leave it out)."""
    sample: int = 100
    """Tokens that each model writes after a document start, the same ones every time (0: none)."""
    figures: str = ""
    """Write every figure as SVG and PNG into this folder, too."""
    open: bool = False
    """Open the page in the browser."""

    def __post_init__(self) -> None:
        check(self.sample >= 0, f"--sample must not be negative, got {self.sample}")
        check(self.score_again >= 0, f"--score-again must not be negative, got {self.score_again}")


def main(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, prog="python -m golf_jax.report", description=DESCRIPTION, args=argv)
    if importlib.util.find_spec("matplotlib") is None:
        raise GolfError("a report needs Matplotlib: pip install 'golf-jax[report]'")
    from golf_jax.reporting import contents, figures, measure, page, record

    if not options.runs:
        raise GolfError("nothing to show: give a run directory, or a folder of them")
    found = record.find_runs([Path(run) for run in options.runs])
    out = Path(options.out or Path(options.runs[0]) / "report.html")
    check_target(out)
    records = record.read_records(found)
    measure.start()
    again = measure.everything(records, options.score_again, options.sample)
    drawn = contents.draw(records, again)
    title = f"{records[0].recipe.name}: {records[0].name}" if len(records) == 1 else f"{len(records)} runs"
    html = page.page(title, contents.sections(records, drawn, again))
    try:
        write_atomic(out, html)
        if options.figures:
            Path(options.figures).mkdir(parents=True, exist_ok=True)
            for name, (_, figure) in drawn.items():
                figures.export(figure, Path(options.figures) / name)
    except OSError as error:
        raise GolfError(f"{error.filename or out}: cannot write: {error.strerror}") from None
    print(f"{out}: {len(records)} run{'s' * (len(records) > 1)}, {len(drawn)} figures, {out.stat().st_size / 1000:,.0f} kB")
    for sentence in [s for sentences in again.missing.values() for s in sentences]:
        print(f"left out: {sentence}")
    if options.open:
        webbrowser.open(out.resolve().as_uri())
    return 0


if __name__ == "__main__":
    cli.run(main)
