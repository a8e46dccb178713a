"""Attention backends of a CPU side by side: forward, and forward with all gradients, on one core, in turn.

    taskset -c 0 python benchmarks/attention_cpu.py [--repeats 60] [--json FILE]

Prints the best and the median of each, and the ratio of the bests: `native` over `xla`.
"""

import argparse
import functools
import json
import shlex
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from step_time import cpu_name

from golf_jax.kernels.attention import SUFFIX, xsa_attention

SHAPES = ((2, 256, 6, 3, 32), (2, 256, 8, 4, 16), (2, 256, 8, 4, 64), (1, 2048, 8, 4, 64))  # B, T, H, G, K


def measure(shape: tuple[int, ...], repeats: int) -> dict:
    B, T, H, G, K = shape
    rng = np.random.default_rng(0)
    q, k, v, dy = (jnp.asarray(rng.standard_normal((B, T, heads, K)), jnp.float32) for heads in (H, G, G, H))

    def both(attend, q, k, v, dy):
        y, pullback = jax.vjp(attend, q, k, v)
        return y, pullback(dy)

    programs = {}
    for backend in SUFFIX:
        attend = functools.partial(xsa_attention, xsa=True, backend=backend)
        programs[backend, "forward"] = (jax.jit(attend), (q, k, v))
        programs[backend, "both"] = (jax.jit(functools.partial(both, attend)), (q, k, v, dy))
    samples: dict = {name: [] for name in programs}
    for i in range(repeats + 1):
        for name, (run, args) in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(*args))
            if i:
                samples[name].append(1e3 * (time.perf_counter() - begin))
    found: dict = {"shape": shape}
    for part in ("forward", "both"):
        found[part] = {b: {"best_ms": min(samples[b, part]), "median_ms": float(np.median(samples[b, part]))} for b in SUFFIX}
        found[part]["ratio"] = found[part]["native"]["best_ms"] / found[part]["xla"]["best_ms"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60, help="a tenth of them for rows of 2,048")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for shape in SHAPES:
        found.append(r := measure(shape, max(2, options.repeats * 256 // shape[1] * shape[0] // 2)))
        parts = (
            f"{p}: " + ", ".join(f"{b} {r[p][b]['best_ms']:.2f} ({r[p][b]['median_ms']:.2f}) ms" for b in SUFFIX)
            for p in ("forward", "both")
        )
        print(f"{shape} {'; '.join(parts)}; native / xla {r['forward']['ratio']:.2f}, {r['both']['ratio']:.2f}", flush=True)
    if options.json:
        about = {"command": shlex.join(["python", *sys.argv]), "device": cpu_name(), "jax": jax.__version__}
        options.json.write_text(json.dumps(about | {"cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
