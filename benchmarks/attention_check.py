"""Is an attention backend right, and how fast: output and gradients on the device at hand, against float64 and at the records' size.

    python benchmarks/attention_check.py pallas [--json FILE] [--dry]

Small shapes against the definition in float64, the shape of a record's step (48 x 2,048 tokens, 8 query and 4 kv heads of 64) against
float32 on the same rounded inputs; with and without XSA, and inside documents where the backend has that. FILE is written after every
case, one JSON object a line. Exits with status 1 if a case misses its tolerance (relative L2, those of tests/kernels) or fails.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.kernels.attention import assert_backend, xsa_attention

TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3}
FLOPS = 4  # of one visible score and one dimension of a head, forward: two products; the backward pass has five


class Case(NamedTuple):
    shape: tuple[int, int, int, int, int]
    """B, T, H, G, K"""
    dtype: str
    xsa: bool
    documents: bool
    real: bool = False
    """The size of a step: against float32, and timed."""


def cases(backend: str, dry: bool) -> list[Case]:
    small = [(2, 256, 4, 2, 64), (1, 200, 8, 4, 64), (1, 384, 2, 1, 128), (1, 130, 2, 2, 32)]
    real = (48, 2048, 8, 4, 64)
    if dry:
        small, real = [(1, 48, 4, 2, 16)], (2, 64, 4, 2, 16)
    dtypes = ("float32", "bfloat16") if backend == "xla" and not dry else ("bfloat16",)
    kinds = ((True, False), (True, True)) if dry else ((True, False), (False, False), (True, True), (False, True))
    kinds = [(xsa, documents) for xsa, documents in kinds if backend != "cudnn" or not documents]
    made = [Case(s, d, *kind) for s in small for d in dtypes for kind in kinds]
    return [*made, *(Case(real, "bfloat16", *kind, True) for kind in kinds if any(kind))]


def inputs(case: Case) -> tuple[list[jax.Array], jax.Array | None]:
    """q, k, v and the cotangent of y, with zero value vectors; the first visible keys (documents of very different lengths)."""
    B, T, H, G, K = case.shape
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((B, T, heads, K), np.float32) for heads in (H, G, G, H)]
    arrays[2][0, 0, 0] = arrays[2][0, T // 2, G - 1] = 0
    first = None
    if case.documents:
        starts = rng.random((B, T)) < 8 / T
        starts[:, 1] = True  # a document of one token
        first = jnp.asarray(np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1), jnp.int32)
    return [jnp.asarray(a, case.dtype) for a in arrays], first


def definition(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array | None, xsa: bool) -> jax.Array:
    """Causal attention in the dtype of its inputs, all scores at once; `xsa`: without the part along the own value."""
    T, H, K = q.shape[1:]
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    products = functools.partial(jnp.einsum, precision="highest")
    seen = jnp.tril(jnp.ones((T, T), bool))[None]
    if first is not None:
        seen = seen & (first[:, :, None] <= jnp.arange(T))
    scores = jnp.where(seen[:, None], products("bshk,bthk->bhst", q, k) / np.sqrt(K), -jnp.inf)
    o = products("bhst,bthk->bshk", jax.nn.softmax(scores, -1), v)
    if not xsa:
        return o
    squared = jnp.sum(v * v, -1, keepdims=True)
    unit = jnp.where(squared > 0, v * jax.lax.rsqrt(jnp.where(squared > 0, squared, 1)), 0)
    return o - jnp.sum(o * unit, -1, keepdims=True) * unit


def with_gradients(function: Callable[..., jax.Array], q: Any, k: Any, v: Any, dy: Any) -> tuple:
    y, pullback = jax.vjp(function, q, k, v)
    return y, *pullback(dy)


def expected(case: Case, arrays: list[jax.Array], first: jax.Array | None) -> list[np.ndarray]:
    """y, dq, dk, dv: in float64, or at the real size in float32, one row of the batch at a time."""
    exact = jnp.float32 if case.real else jnp.float64

    def one(row: tuple) -> tuple:
        given = (None if first is None else row[4][None],)
        out = with_gradients(lambda q, k, v: definition(q, k, v, *given, case.xsa), *(a[None].astype(exact) for a in row[:4]))
        return tuple(a[0] for a in out)

    with jax.enable_x64(not case.real):
        rows = (*arrays, jnp.zeros((len(arrays[0]), 0)) if first is None else first)
        return [np.asarray(a, np.float64) for a in jax.jit(lambda rows: jax.lax.map(one, rows))(rows)]


def check(case: Case, backend: str) -> dict[str, Any]:
    arrays, first = inputs(case)
    function = functools.partial(xsa_attention, xsa=case.xsa, first_BS=first, backend=backend)
    begin = time.perf_counter()
    forward = jax.jit(function).lower(*arrays[:3]).compile()
    both = jax.jit(functools.partial(with_gradients, function)).lower(*arrays).compile()
    seconds = time.perf_counter() - begin
    assert_backend(both.as_text(), backend)
    got = [np.asarray(a, np.float64) for a in both(*arrays)]
    wanted = dict(zip(("y", "dq", "dk", "dv"), zip(got, expected(case, arrays, first), strict=True), strict=True))
    errors = {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, (a, b) in wanted.items()}
    result: dict[str, Any] = {"backend": backend, **case._asdict(), "errors": errors, "compile_s": seconds}
    result["ok"] = all(e < TOLERANCE[case.dtype] for e in errors.values())  # NaN is not
    if case.real:
        B, T, H, _, K = case.shape
        pairs = FLOPS * B * H * K * T * (T + 1) / 2
        for name, flops, run, args in (("forward", 1, forward, arrays[:3]), ("forward and backward", 3.5, both, arrays)):
            milliseconds = 1e3 * median(run, args)
            result[name] = {"ms": milliseconds, "tflops": None if case.documents else flops * pairs / milliseconds / 1e9}
    return result


def median(run: Any, args: list[jax.Array], repeats: int = 20) -> float:
    """Seconds of one run."""
    samples = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        jax.block_until_ready(run(*args))
        samples.append(time.perf_counter() - begin)
    return float(np.median(samples[2:]))


def run_cases(backend: str, cases: Iterable[Any], check: Callable[[Any, str], dict[str, Any]], json_file: Path | None) -> int:
    """Check every case (a named tuple) with a backend, print and write each result as it comes; 1 if one is wrong or failed."""
    device, results = jax.devices()[0].device_kind, []
    for case in cases:
        try:
            result = check(case, backend)
        except Exception as error:  # one shape that a kernel refuses or dies of must not hide the others
            result = {"backend": backend, **case._asdict(), "ok": False, "failed": f"{type(error).__name__}: {error}"[:500]}
        results.append(result | {"device": device})
        print(json.dumps(results[-1]), flush=True)
        if json_file:
            json_file.write_text("".join(json.dumps(r) + "\n" for r in results))
    return 0 if all(r["ok"] for r in results) else 1


def arguments(doc: str | None, backends: Sequence[str]) -> argparse.Namespace:
    """Of a check's command line: backend, json, dry."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=backends)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny shapes")
    return parser.parse_args()


def main() -> int:
    options = arguments(__doc__, ("xla", "cudnn", "pallas"))
    return run_cases(options.backend, cases(options.backend, options.dry), check, options.json)


if __name__ == "__main__":
    sys.exit(main())
