"""What a training step needs of memory, known from the compiled program before it runs, and `--micro-rows auto` that follows from it."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from golf_jax.config import GolfError, Recipe
from golf_jax.mesh import AXIS, platform
from golf_jax.processes import from_main
from golf_jax.progress import Log
from golf_jax.training.phases import phases
from golf_jax.training.state import graph
from golf_jax.training.step import compile_step

SHARE = 0.9  # of what is free: data, validation and the allocator's gaps take the rest


def program_bytes(compiled: Any) -> int:
    """Bytes that one device holds while a compiled program runs: arguments, results, temporaries; what is donated counts once."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def free_bytes(mesh: Mesh) -> int:
    """Bytes that one device of the mesh may still take. Devices of a CPU share what the machine, or this process' cgroup, has left."""
    device = mesh.local_devices[0]
    if platform(mesh) != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            raise GolfError(f"micro_rows auto: {device.device_kind} does not say how much memory it has; give --micro-rows N")
        return stats["bytes_limit"] - stats["bytes_in_use"]
    left = [_meminfo(), _cgroup()]
    return int(min(left) / len(mesh.local_devices))


def _meminfo() -> float:
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    available = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return available or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2  # no such file: half of all there is


def _cgroup() -> float:
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup of version 2, or `max`
        return math.inf


def choices(recipe: Recipe, devices: int) -> list[int]:
    """The numbers of sequences per device and forward pass that divide a step, largest first; none above what one rank has."""
    rank, local = recipe.data.rank_rows, recipe.data.batch_shape[0] // devices
    return [n for n in range(min(rank, local), 0, -1) if local % n == 0 and rank % n == 0]


def fitted(recipe: Recipe, mesh: Mesh, log: Log, *, free: int | None = None, needs: Callable[[Recipe], int] | None = None) -> Recipe:
    """The recipe with `micro_rows = "auto"` replaced by the most sequences per forward pass whose compiled steps fit the device.

    Compiles what it then runs (`compile_step` keeps it): most often once, else once more per number tried, the next being the one that
    fits if memory grows with the sequences. free, needs: of one device and of a recipe, for tests. Raises GolfError if not even one
    sequence fits.
    """
    if recipe.micro_rows != "auto":
        return recipe
    most = int((free_bytes(mesh) if free is None else free) * SHARE)
    most = int(from_main(str(most)))  # the processes of a run go the same way
    needs = needs or (lambda r: max(program_bytes(compile_step(graph(r), mesh, phase).run) for phase in phases(r)))
    below, needed = math.inf, 0
    for rows in choices(recipe, mesh.shape[AXIS]):
        if rows > below:
            continue
        tried = replace(recipe, micro_rows=rows)
        needed = needs(tried)
        log(f"micro_rows {rows}: a step takes {needed / 1e9:.2f} GB of the {most / 1e9:.2f} GB that a device may take")
        if needed <= most:
            return tried
        below = max(1, rows * most // needed)
    raise GolfError(
        f"micro_rows auto: one sequence of {recipe.data.seq_len} tokens takes {needed / 1e9:.2f} GB, a device has {most / 1e9:.2f} GB: "
        "lower --data.seq-len or --model.width, or free memory"
    )
