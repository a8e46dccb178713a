"""python -m golf_jax COMMAND ..., installed also as golf-jax COMMAND ...: the commands in one place."""

import difflib
import runpy
import sys

from golf_jax import cli
from golf_jax.config import GolfError

COMMANDS = {
    "data": "make, download or verify training data",
    "train": "train, pack and score a model",
    "evaluate": "score a packed model, a run or a PyTorch checkpoint",
    "artifact": "what is inside an artifact, and how many bytes are left",
    "reproduce": "compare with the reference tensors of a record",
}
USAGE = "usage: golf-jax COMMAND ... (or python -m golf_jax COMMAND ...)\n\n{}\n\nEvery command answers --help."


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format("\n".join(f"  {name:<11}{line}" for name, line in COMMANDS.items())))
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise GolfError(f"no command {name!r}; {meant}")
    sys.argv[1:] = rest
    runpy.run_module(f"golf_jax.{name}", run_name="__main__", alter_sys=True)
    return 0


def main() -> None:
    cli.run(_dispatch)


if __name__ == "__main__":
    main()
