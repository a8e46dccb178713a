"""Are the MLP's kernels right, and how fast: output and gradients on the device at hand, against float64 and at the records' size.

    python benchmarks/mlp_check.py pallas [--json FILE] [--dry]

The second map with the activation in front, (leaky_relu(r u))^2 W, as `golf_jax.model.gpt.mlp` calls it; `xla` is the plain form. Small
shapes against the definition in float64, those of a record's step (98,304 tokens, width 512, 1,536 and 2,048 hidden units) against
float32 on the same rounded inputs, and timed. FILE is written after every case, one JSON object a line. Exits with status 1 if a case
misses its tolerance (relative L2, those of tests/kernels) or fails.
"""

import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from attention_check import arguments, median, run_cases

from golf_jax.kernels.mlp import squared_leaky_linear
from golf_jax.model.layers import linear, scaled_squared_leaky

TOLERANCE = 3e-3  # dr, in float32 from the kernels, is a sum of rounded gradients in the plain form


class Case(NamedTuple):
    shape: tuple[int, int, int]
    """N, F, D"""
    slope: float
    real: bool = False
    """The size of a step: against float32, and timed."""


def cases(dry: bool) -> list[Case]:
    small = [(200, 128, 256), (1100, 512, 384), (4096, 1536, 512)] if not dry else [(48, 32, 16)]
    real = [(98304, 1536, 512), (98304, 2048, 512)] if not dry else [(64, 48, 16)]
    return [*(Case(shape, slope) for shape in small for slope in (0.5, 0.0)), *(Case(shape, 0.5, True) for shape in real)]


def inputs(case: Case) -> list[jax.Array]:
    """u with a row of zeros, r, W, and the cotangent of m."""
    N, F, D = case.shape
    rng = np.random.default_rng(0)
    u, w, dm = (rng.standard_normal(shape, np.float32) for shape in ((N, F), (F, D), (N, D)))
    u[3] = 0
    return [jnp.asarray(u, "bfloat16"), jnp.asarray(0.5 + rng.random(N), jnp.float32), *(jnp.asarray(a, "bfloat16") for a in (w, dm))]


def check(case: Case, backend: str) -> dict[str, Any]:
    def kernels(u, r, w):
        return squared_leaky_linear(u, r, w, case.slope)

    def plain(u, r, w):
        return linear(scaled_squared_leaky(u, r[:, None], case.slope), w)

    def definition(u, r, w):
        x = u * r[:, None]
        return jnp.matmul(jnp.square(jnp.where(x > 0, x, case.slope * x)), w, precision="highest")

    def with_gradients(function):
        def run(u, r, w, dm):
            m, pullback = jax.vjp(function, u, r, w)
            return m, *pullback(dm)

        return run

    function, arrays = kernels if backend == "pallas" else plain, inputs(case)
    begin = time.perf_counter()
    forward = jax.jit(function).lower(*arrays[:3]).compile()
    both = jax.jit(with_gradients(function)).lower(*arrays).compile()
    seconds = time.perf_counter() - begin
    got = [np.asarray(a, np.float64) for a in both(*arrays)]
    with jax.enable_x64(not case.real):
        exact = (jnp.asarray(a, jnp.float32 if case.real else jnp.float64) for a in arrays)
        expected = [np.asarray(a, np.float64) for a in jax.jit(with_gradients(definition))(*exact)]
    errors = {n: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for n, a, b in zip(("m", "du", "dr", "dw"), got, expected, strict=True)}
    result: dict[str, Any] = {"backend": backend, **case._asdict(), "errors": errors, "compile_s": seconds}
    result["ok"] = all(e < TOLERANCE for e in errors.values())  # NaN is not
    if case.real:
        N, F, D = case.shape
        for name, products, run, args in (("forward", 1, forward, arrays[:3]), ("forward and backward", 3, both, arrays)):
            milliseconds = 1e3 * median(run, args)
            result[name] = {"ms": milliseconds, "tflops": 2 * products * N * F * D / milliseconds / 1e9}
    return result


def main() -> int:
    options = arguments(__doc__, ("xla", "pallas"))
    return run_cases(options.backend, cases(options.dry), check, options.json)


if __name__ == "__main__":
    sys.exit(main())
