"""python -m golf_jax.train: text -> shards -> training -> average -> quantize -> pack -> reload from the bytes -> score."""

from golf_jax import cli
from golf_jax.pipeline import Options, run
from golf_jax.processes import several_processes
from golf_jax.supervise import supervise
from golf_jax.training.resume import stored_recipe

DESCRIPTION = """Train, pack and score one model: data -> train -> average -> quantize -> pack -> reload from the bytes -> score.

With no argument: a small model on the text every Python carries, on CPU, in minutes. Any field of a recipe is a flag:

  python -m golf_jax.train pr2005 --model.width 128 --budget.steps 100 --data.train 'shards/train_*.bin' ...
  python -m golf_jax.train --resume runs/pr2005-20261125-101500        go on where that run was interrupted

The run directory holds config, log, metrics, checkpoints, tokenizer, code, artifact and result."""


def main(argv: list[str]) -> int:
    directory = cli.value_of(argv, "--resume")
    recipe, options = cli.parse(argv, Options(), DESCRIPTION, stored_recipe(directory) if directory else "quickstart")
    if several_processes() and (status := supervise()) is not None:
        return status
    run(recipe, options)
    return 0


if __name__ == "__main__":
    cli.run(main)
