"""python -m golf_jax.sweep: a recipe over seeds and settings, and whether the differences are more than noise."""

import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

from golf_jax import cli
from golf_jax.config import GolfError
from golf_jax.files import write_atomic

DESCRIPTION = """Run a recipe over seeds and settings, and say which differences are more than noise.

  python -m golf_jax.sweep quickstart --seeds 42,1337,2025 --vary optim.groups.0.lr=0.02,0.03
  python -m golf_jax.sweep quickstart --seeds 42,1337 --vary model.smear_gate=true,false optim.clip_norm=0.3,1 --jobs 2

Every combination with every seed is a run directory of its own; the same command again, with the same --sweep-dir, goes on where it was
interrupted. Gains are against the first value of every field, over runs with the same seed. Writes runs.csv and sweep.md beside the
runs; python -m golf_jax.report SWEEP_DIR shows them."""


@dataclass(frozen=True)
class Options:
    seeds: str = "42,1337,2025"
    """Seeds of every setting."""
    vary: tuple[str, ...] = ()
    """FIELD=VALUE,VALUE,...: fields as config.json has them, the reference value first."""
    sweep_dir: str = ""
    """Folder of the runs; default sweeps/<recipe>-<time>. An existing one is gone on with."""
    miniature_of: int = 0
    """Every run is a complete miniature of a run of this many steps: what the recipe counts in steps (warmdown, momentum warm-up, horizon
    of the EMA) keeps its share of --budget.steps. 0: as the recipe has it."""
    jobs: int = 1
    """Runs at a time, each with its share of the cores, or of the GPUs that CUDA_VISIBLE_DEVICES names."""


def main(argv: list[str]) -> int:
    recipe, options = cli.parse(argv, Options(), DESCRIPTION)
    from golf_jax.reporting import compare  # with jax: --help must not wait for it
    from golf_jax.reporting.record import read_record
    from golf_jax.sweeping import grid, miniature, parse_vary, run_grid

    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise GolfError(f"--seeds {options.seeds}: give integers, as in 42,1337,2025") from None
    if options.jobs < 1:
        raise GolfError(f"--jobs {options.jobs}: at least 1")
    points = grid(recipe, seeds, parse_vary(options.vary))
    if options.miniature_of:
        points = [replace(p, recipe=miniature(p.recipe, options.miniature_of)) for p in points]
    folder = Path(options.sweep_dir or f"sweeps/{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.mkdir(parents=True, exist_ok=True)
    problems = run_grid(points, folder, options.jobs, lambda line: print(line, flush=True))
    records = [r for p in points if p.name not in problems and (r := read_record(folder / p.name)).evaluations]
    if not records:
        raise GolfError(f"{folder}: no run has finished; the first said: {next(iter(problems.values()), 'nothing')}")
    groups, method = compare.groups(records), compare.common_method(records)
    rows = compare.compare(groups, method)
    write_atomic(folder / "runs.csv", compare.runs_csv(groups))
    closing = compare.conclusion(rows)
    if len({file.read_bytes() for r in records if (file := r.path / "code.pyz").is_file()}) > 1:
        closing += "\n\nWARNING: the runs did not run the same code (code.pyz differs): a difference may be the code's"
    text = f"`{recipe.name}`, scored by the {method} evaluation.\n\n{compare.markdown(rows)}\n\n{closing}\n"
    write_atomic(folder / "sweep.md", text)
    print(f"\nscored by the {method} evaluation; gains against the first line, p of a paired t-test\n{compare.table(rows)}\n\n{closing}")
    print(f"runs.csv and sweep.md are in {folder}; figures: python -m golf_jax.report {shlex.quote(str(folder))}")
    return int(bool(problems))


if __name__ == "__main__":
    cli.run(main, computes=True)
