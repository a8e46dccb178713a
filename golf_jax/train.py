"""python -m golf_jax.train: text -> shards -> training -> average -> quantize -> pack -> reload from the bytes -> score."""

from typing import Any

from golf_jax import cli
from golf_jax.options import Options
from golf_jax.supervise import ANEW, several_processes, supervise

DESCRIPTION = """Train, pack and score one model: data -> train -> average -> quantize -> pack -> reload from the bytes -> score.

With no argument: a small model on the text every Python carries, on CPU, in minutes. Any field of a recipe is a flag:

  python -m golf_jax.train pr2005 --model.width 128 --budget.steps 100 --data.train 'shards/train_*.bin' ...
  python -m golf_jax.train --resume runs/pr2005-20261125-101500        go on where that run was interrupted
  python -m golf_jax.train pr2005 --score artifact.golf ...            score an artifact, train nothing

The run directory holds config, log, metrics, checkpoints, tokenizer, code, artifact and result."""


def main(argv: list[str]) -> int:
    recipe, options = cli.parse(argv, Options(), DESCRIPTION, _default(cli.value_of(argv, "--resume")))
    if several_processes() and (status := supervise(lambda: _when_lost(options))) is not None:
        return status
    from golf_jax.pipeline import run, score_artifact  # with jax: not before a mistake in the flags, or --help, has been answered

    if options.score:
        score_artifact(recipe, options)
    else:
        run(recipe, options)
    return 0


def _when_lost(options: Options) -> str:
    """What to do when one of several processes is lost."""
    if options.score:
        return ANEW
    if run := options.resume or options.run_dir:
        from golf_jax.training.rundir import all_again

        return all_again(run)
    return f"{ANEW} with: python -m golf_jax.train --resume RUN, the directory that process 0 has named"


def _default(resume: str) -> Any:
    """The recipe that flags change: that of the run which goes on, else the quickstart."""
    if not resume:
        return "quickstart"
    from golf_jax.training.resume import stored_recipe

    return stored_recipe(resume)


if __name__ == "__main__":
    cli.run(main, computes=True)
