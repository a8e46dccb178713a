"""Memory of the programs of a recipe at full size, from the compiled programs: nothing is run, so nothing has to fit.

    python benchmarks/memory.py [--recipes pr638 pr2005] [--seq-lens 512 1024 2048] [--rows 1 2 4] [--json FILE]

Training step (the phase that takes most), validation, sliding window, Hessians (recipes with GPTQ) and test-time training (recipes that
have it), for one device, by sequences per forward pass and by sequence length: arguments, results and temporaries, what is donated counted
once; for scoring also the parameters, which lie beside the weights that it prepares. On a CPU in float32, or what --dtype says; code is
generated without optimisation, which changes no buffer.
"""

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from golf_jax.artifact.calibration import _batch_hessians  # noqa: E402
from golf_jax.config import Recipe, load_recipe  # noqa: E402
from golf_jax.evaluation.adapter import Rule, training_program  # noqa: E402
from golf_jax.evaluation.scorer import Shapes, avals, scoring_program  # noqa: E402
from golf_jax.mesh import REPLICATED, ROWS, make_mesh, replicated, rows  # noqa: E402
from golf_jax.model import leaves, resolve  # noqa: E402
from golf_jax.training.memory import program_bytes  # noqa: E402
from golf_jax.training.phases import phases  # noqa: E402
from golf_jax.training.state import graph  # noqa: E402
from golf_jax.training.step import compile_step  # noqa: E402


def programs(recipe: Recipe, mesh: Mesh, batch: int, seq_len: int) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """(name, compiles it, bytes that lie beside what it takes) at `batch` sequences of `seq_len` tokens per forward pass, two passes in a
    training step."""
    config, quiet = recipe.model, replace(recipe.eval, sliding=replace(recipe.eval.sliding, stride=0))
    data = replace(recipe.data, ranks=1, rows_per_rank=2 * batch, seq_len=seq_len)
    quiet = replace(quiet, score_first=type(quiet.score_first)(), adapt_first=type(quiet.adapt_first)())  # they may ask for longer rows
    step = replace(recipe, data=data, micro_rows=batch, eval=quiet)
    shapes: Shapes = tuple((name, leaf.shape, "float32") for name, leaf in leaves(config).items())
    beside = sum(4 * math.prod(shape) for _, shape, _ in shapes)
    if not recipe.optim.clip_per_rank:  # which fixes the rows
        yield "training", lambda: compile_step(graph(step), mesh, phases(step)[-1]).run, 0
    yield "validation", lambda: scoring_program(config, mesh, shapes, batch, seq_len, None, True), beside
    yield "sliding", lambda: scoring_program(config, mesh, shapes, batch, seq_len, min(64, seq_len), True), beside
    if recipe.quant.gptq_batches:
        hessians = jax.shard_map(
            functools.partial(_batch_hessians, config),
            mesh=mesh, in_specs=(REPLICATED, ROWS, ROWS), out_specs=REPLICATED, check_vma=False,
        )  # fmt: skip

        def add(total: Any, *given: Any) -> Any:
            return jax.tree.map(jnp.add, total, hessians(*given))

        tokens = jax.ShapeDtypeStruct((batch, seq_len), jnp.uint16, sharding=rows(mesh))
        real = jax.ShapeDtypeStruct((batch,), jnp.float32, sharding=rows(mesh))
        given = avals(mesh, shapes), tokens, real
        total = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), jax.eval_shape(hessians, *given))
        yield "Hessians", lambda: jax.jit(add, donate_argnums=0).lower(total, *given).compile(), 0
    if recipe.eval.score_first.on:
        rule = Rule(optax.trace(recipe.eval.score_first.momentum), 1.0)
        yield "test-time training", lambda: training_program(config, rule, mesh, shapes, (1, 2 * batch, 1), seq_len, 1, batch), 0


def measure(recipe: Recipe, mesh: Mesh, batch: int, seq_len: int) -> Iterator[dict[str, Any]]:
    for name, compile, beside in programs(recipe, mesh, batch, seq_len):
        begin = time.process_time()
        compiled = compile()
        m = compiled.memory_analysis()
        yield {
            "recipe": recipe.name,
            "program": name,
            "rows": batch,
            "seq_len": seq_len,
            "bytes": program_bytes(compiled) + beside,
            "temporary_bytes": m.temp_size_in_bytes,
            "argument_bytes": m.argument_size_in_bytes,
            "compile_cpu_s": round(time.process_time() - begin, 1),
        }


def table(results: list[dict[str, Any]]) -> str:
    """GB by program, one column per (rows, tokens)."""
    columns = sorted({(r["seq_len"], r["rows"]) for r in results})
    found = {(r["recipe"], r["program"], r["seq_len"], r["rows"]): r["bytes"] for r in results}
    lines = ["| recipe | program | " + " | ".join(f"{n} x {t:,}" for t, n in columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for recipe, program in dict.fromkeys((r["recipe"], r["program"]) for r in results):
        cells = [f"{found[key] / 1e9:.2f}" if (key := (recipe, program, *c)) in found else "" for c in columns]
        lines.append(f"| {recipe} | {program} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["pr638", "pr2005"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4], help="at the recipe's sequence length")
    parser.add_argument("--seq-lens", type=int, nargs="*", default=[512, 1024], help="further ones, for one row")
    parser.add_argument("--dtype", default="float32", help="of activations; empty: the recipe's")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    mesh, results = make_mesh(1), []
    for name in options.recipes:
        recipe = load_recipe(name)
        recipe = replace(recipe, model=resolve(replace(recipe.model, dtype=options.dtype or recipe.model.dtype), "cpu"))
        for batch, seq_len in [(n, recipe.data.seq_len) for n in options.rows] + [(1, t) for t in options.seq_lens]:
            for r in measure(recipe, mesh, batch, seq_len):
                results.append(r)
                print(r, flush=True)
                if options.json:
                    options.json.write_text(
                        json.dumps({"jax": jax.__version__, "dtype": options.dtype, "programs": results}, indent=1) + "\n"
                    )
    print(table(results))


if __name__ == "__main__":
    main()
