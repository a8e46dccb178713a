"""Runs in processes of their own that end themselves at a chosen file-system call: fork and die, so that many fit into minutes."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from golf_jax import pipeline
from golf_jax.config import GolfError, Recipe
from golf_jax.interrupt import Interrupted
from golf_jax.pipeline import Options

CALLS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
NOTHING_KEPT = 9


def _job(recipe: Recipe, options: Options, at: int, number: int, delay: float, calls: Any) -> None:
    """The run; sends itself `number` `delay` seconds after its `at`-th file-system call below the run directory (0: never)."""
    folder = options.run_dir or options.resume
    output = open(Path(folder).with_suffix(".txt"), "a")
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CALLS and arguments and folder in str(arguments[0]):
            calls.value += 1
            if calls.value == at:
                end = lambda: os.kill(os.getpid(), number)  # noqa: E731
                threading.Timer(delay, end).start() if delay else end()

    sys.addaudithook(hook)
    try:
        pipeline.run(recipe, options)
    except Interrupted as stop:
        sys.exit(stop.status)
    except GolfError as error:
        print(error, flush=True)
        sys.exit(NOTHING_KEPT if "no checkpoint: nothing to go on from" in str(error) or "no run is there" in str(error) else 2)


class Runs:
    """Starts runs of one recipe from a process that has imported everything and touched no device."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["killed_runs"])

    def run(self, options: Options, at: int = 0, number: int = signal.SIGKILL, delay: float = 0.0) -> tuple[int, int]:
        """(exit status, negative where a signal ended it; file-system calls below the run directory)."""
        calls = self._context.Value("i", 0, lock=False)
        child = self._context.Process(target=_job, args=(self.recipe, options, at, number, delay, calls))
        child.start()
        child.join(240)
        assert child.exitcode is not None, "the run hangs"
        return child.exitcode, calls.value
