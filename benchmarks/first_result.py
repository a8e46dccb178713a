"""Time to the first result: `python -m golf_jax.train` with nothing cached and again, by the times at which its lines come.

    python benchmarks/first_result.py [--rounds 3] [--python PYTHON ...] [--json FILE] [-- ARGUMENTS OF TRAIN]

Several interpreters, each with a golf_jax of its own, take turns. Caches and runs lie in a temporary folder. Prints, per start, the seconds
until step 1 was told and until the end, and those of the packed scorings as they say themselves; then the medians.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from step_time import cpu_name


def start(python: str, cache: Path, arguments: list[str]) -> dict[str, float]:
    """Seconds of one run, with GOLF_JAX_CACHE (and the caches of versions that do not know it) in `cache`."""
    unusual = ("GLIBC_TUNABLES", "PYTHONDONTWRITEBYTECODE")  # without bytecode every start compiles this package's sources
    surroundings = {name: value for name, value in os.environ.items() if name not in unusual}
    surroundings |= {"GOLF_JAX_CACHE": str(cache), "HOME": str(cache), "XDG_CACHE_HOME": str(cache)}
    begin, first, scoring, last = time.perf_counter(), 0.0, 0, ""
    with tempfile.TemporaryDirectory() as folder:
        command = [os.path.abspath(shutil.which(python) or python), "-u", "-m", "golf_jax.train", *arguments, "--run-dir", f"{folder}/run"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=surroundings, cwd=folder) as run:
            for line in run.stdout or ():
                last = line
                if line.startswith("step:1/") and not first:
                    first = time.perf_counter() - begin
                if told := re.match(r"final_.* eval_time:(\d+)ms", line):
                    scoring += int(told[1])
    if run.returncode:
        raise SystemExit(f"{shlex.join(command)}: status {run.returncode}: {last.strip()}")
    return {"first_step": round(first, 2), "scoring": scoring / 1000, "all": round(time.perf_counter() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", nargs="+", default=[sys.executable])
    parser.add_argument("--json", type=Path)
    parser.add_argument("train", nargs="*", default=["--budget.steps", "60"], help="after --; default: --budget.steps 60")
    options = parser.parse_args()
    rows = []
    for _ in range(options.rounds):
        for python in options.python:
            with tempfile.TemporaryDirectory() as cache:
                for cached in (False, True):
                    rows.append({"python": python, "cached": cached, **start(python, Path(cache), options.train)})
                    print(rows[-1], flush=True)
    for python in options.python:
        for cached in (False, True):
            mine = [row for row in rows if (row["python"], row["cached"]) == (python, cached)]
            medians = {what: statistics.median(row[what] for row in mine) for what in ("first_step", "scoring", "all")}
            print(f"{python} {'again' if cached else 'nothing cached'}: {medians}")
    if options.json:
        about = {"command": shlex.join(["python", *sys.argv]), "processor": cpu_name(), "cores": os.cpu_count(), "jax": version("jax")}
        options.json.write_text(json.dumps(about | {"starts": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
