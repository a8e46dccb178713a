"""A grid of runs in one folder: what its points are, and running them, several at a time, each in a process of its own.

`python -m golf_jax.sweeping RECIPE.json RUN_DIR DEVICES` is such a process.
"""

import itertools
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from golf_jax import cli
from golf_jax.config import GolfError, Recipe, differences, from_dict, parse_json, to_dict
from golf_jax.files import write_atomic
from golf_jax.interrupt import Interrupted
from golf_jax.progress import SECONDS, Log
from golf_jax.supervise import end_with_parent
from golf_jax.training.resume import located, stored_recipe
from golf_jax.training.rundir import kept
from golf_jax.training.runfiles import read_json, read_stages


@dataclass(frozen=True)
class Point:
    """One run of the grid. name: of its directory."""

    name: str
    recipe: Recipe


def parse_vary(given: Sequence[str]) -> dict[str, list[Any]]:
    """`field=a,b,...` each: field -> values, numbers and booleans as JSON has them. Raises GolfError."""
    found: dict[str, list[Any]] = {}
    for word in given:
        field, mark, values = word.partition("=")
        if not mark or not values or field in found or field == "seed":
            raise GolfError(f"--vary {word}: give FIELD=VALUE,VALUE,... once per field (seeds: --seeds)")
        found[field] = [_value(v) for v in values.split(",")]
    return found


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


def grid(recipe: Recipe, seeds: Sequence[int], vary: dict[str, list[Any]]) -> list[Point]:
    """Every combination of values with every seed, the first values first. Raises GolfError for fields and values that cannot be."""
    points = []
    for values in itertools.product(*vary.values()):
        chosen = dict(zip(vary, values, strict=True))
        for seed in seeds:
            data = to_dict(recipe) | {"seed": seed}
            for field, value in chosen.items():
                _set(data, field, value)
            name = "-".join([f"{field}={value}".replace("/", "_") for field, value in chosen.items()] + [f"seed={seed}"])
            points.append(Point(name, from_dict(Recipe, data, "--vary")))
    if len({p.name for p in points}) < len(points):
        raise GolfError("a seed or a value is given twice")
    return points


def miniature(recipe: Recipe, full_steps: int) -> Recipe:
    """A complete miniature of a run of `full_steps` steps in the recipe's own, fewer `budget.steps`.

    Everything counted in steps keeps its share of the run: warmdown, momentum warm-up, intervals of weight averaging, the horizon
    1 / (1 - decay) of the EMA. A run cut short, without its own warmdown, ranks settings by chance. Raises GolfError where that cannot be.
    """
    steps, s = recipe.budget.steps, recipe.schedule
    if full_steps < 2:
        raise GolfError(f"--miniature-of {full_steps}: give the steps of the full run, more than --budget.steps")
    if not 0 < steps < full_steps:
        raise GolfError(f"--miniature-of {full_steps}: needs --budget.steps between 1 and {full_steps - 1}, found {steps}")
    scale = steps / full_steps
    horizon = scale / (1 - s.ema_decay) if s.ema_decay else 1.0
    if horizon < 1:
        raise GolfError(f"--miniature-of {full_steps}: of {steps} steps the EMA would average over {horizon:.2g}; give more steps")

    def count(n: int) -> int:
        return max(round(n * scale), 1) if n else 0

    schedule = replace(s, warmdown_steps=count(s.warmdown_steps), swa_every=count(s.swa_every))
    schedule = replace(schedule, ema_decay=1 - 1 / horizon if s.ema_decay else 0.0)
    muon = (replace(g, momentum_warmup_steps=count(g.momentum_warmup_steps)) if g.kind == "muon" else g for g in recipe.optim.groups)
    return replace(recipe, schedule=schedule, optim=replace(recipe.optim, groups=tuple(muon)))


def _set(data: Any, field: str, value: Any) -> None:
    *path, last = field.split(".")
    try:
        for name in path:
            data = data[int(name) if isinstance(data, list) else name]
        key: Any = int(last) if isinstance(data, list) else last
        before = data[key]
    except (KeyError, IndexError, ValueError, TypeError):
        raise GolfError(f"--vary {field}: no such field of the recipe (as in config.json: optim.groups.0.lr)") from None
    if isinstance(before, dict | list):
        raise GolfError(f"--vary {field}: is a section, not a value; name one of its fields")
    data[key] = value


def run_grid(points: Sequence[Point], folder: Path, jobs: int, say: Log) -> dict[str, str]:
    """Run, or go on with, every point in `folder`/`point.name`, `jobs` at a time. Returns what went wrong, by point.

    Of a CPU each job gets its share of the cores; of CUDA_VISIBLE_DEVICES, where that is set, its share of the GPUs. Raises GolfError if a
    directory holds another run.
    """
    for point in points:
        _check_same(point, folder / point.name)
    devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    if devices and len(devices) < jobs:
        raise GolfError(f"--jobs {jobs}: CUDA_VISIBLE_DEVICES names {len(devices)} GPU(s)")
    free: queue.Queue[int] = queue.Queue()
    for job in range(jobs):
        free.put(job)

    def one(point: Point) -> str:
        job = free.get()
        try:
            mine = {"CUDA_VISIBLE_DEVICES": ",".join(devices[job::jobs])} if devices else {}
            share = 0 if devices or jobs == 1 else max((os.cpu_count() or 1) // jobs, 1)
            return _run_point(point, folder / point.name, share, mine, running, say)
        finally:
            free.put(job)

    problems: dict[str, str] = {}
    running: set[subprocess.Popen[str]] = set()
    todo = [p for p in points if not _finished(folder / p.name)]
    for point in points:
        if point not in todo:
            _order(folder / point.name).unlink(missing_ok=True)  # of a sweep that was killed in the moment before
    say(f"{len(points)} runs in {folder}, {len(points) - len(todo)} of them finished before, {jobs} at a time")
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for point, problem in zip(todo, pool.map(one, todo), strict=True):
                say(f"  {point.name}: {problem or 'done'}")
                if problem:
                    problems[point.name] = problem
        except Interrupted as stop:  # the pool starts no more, and waits for those that save now
            for child in list(running):
                child.send_signal(stop.status - 128)
            raise Interrupted(stop.status - 128, f"go on with the same command and --sweep-dir {shlex.quote(str(folder))}") from None
    return problems


def _finished(directory: Path) -> bool:
    """Also whether the scores are there that the table is made of; result.json alone would leave the run out of it in silence."""
    return (directory / "result.json").is_file() and bool(read_stages(directory).get("evaluations"))


def _check_same(point: Point, directory: Path) -> None:
    if (directory / "config.json").is_file():
        for field, there, here in differences(to_dict(located(stored_recipe(directory))), to_dict(located(point.recipe))):
            raise GolfError(f"{directory}: holds another run ({field} is {there!r} there, {here!r} here); give another --sweep-dir")


def _order(directory: Path) -> Path:
    """The file, beside the run's directory, that says to its process which recipe to run."""
    return directory.with_name(f"{directory.name}.json")


def _run_point(
    point: Point, directory: Path, devices: int, environment: dict[str, str], running: set[subprocess.Popen[str]], say: Log
) -> str:
    """Runs it in a process of its own, which is `running` meanwhile; returns its last line of complaint, or nothing.

    say: hears every 5 s what the run says of itself.
    """
    file = _order(directory)
    write_atomic(file, (json.dumps(to_dict(point.recipe), indent=1) + "\n").encode())
    command = [sys.executable, "-m", "golf_jax.sweeping", str(file), str(directory), str(devices)]
    pipe, surroundings = subprocess.PIPE, os.environ | environment
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=pipe, text=True, errors="replace", env=surroundings)
    running.add(child)
    while True:
        try:
            lines = child.communicate(timeout=SECONDS)[1].strip().splitlines()
            break
        except subprocess.TimeoutExpired:
            log = directory / "log.txt"
            said = log.read_text(encoding="utf8", errors="replace").splitlines() if log.is_file() else []
            say(f"  {point.name}: {said[-1] if said else 'starting'}")
    running.discard(child)
    if child.returncode == 0:
        file.unlink()
        return ""
    return lines[-1] if lines else f"ended with status {child.returncode}"


def main(argv: list[str]) -> int:
    """One point: RECIPE.json, run directory, devices (0: all; of a run that goes on: those it had)."""
    from golf_jax.pipeline import Options, run

    end_with_parent(signal.SIGTERM)  # saves; else the run of a sweep that was killed goes on beside the next sweep's
    file, directory, devices = argv
    recipe = from_dict(Recipe, read_json(Path(file)))
    run(recipe, Options(resume=directory) if kept(directory) else Options(run_dir=directory, devices=int(devices)))
    return 0


if __name__ == "__main__":
    cli.run(main)
