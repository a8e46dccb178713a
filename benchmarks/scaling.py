"""What one device does, moves, holds and sends in a training step, from programs compiled for many fake devices: nothing is run.

    python benchmarks/scaling.py [--recipe pr638] [--layers 0] [--json FILE]

Weak scaling: every device has one sequence. FLOPs are those of the matrix products and of attention, counted in the program before it
is compiled (loops as often as they run); bytes, memory and collectives are the compiled program's. Sent bytes are what a ring takes per
device: 2 (n - 1) / n of what is all-reduced, (n - 1) / n of what is gathered or scattered. On a CPU in float32; code without optimisation,
which changes no buffer.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

MOST = 512
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={MOST} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from hlo_traffic import array_bytes, traffic  # noqa: E402

from golf_jax.config import Recipe, load_recipe  # noqa: E402
from golf_jax.data.loader import Batch  # noqa: E402
from golf_jax.mesh import make_mesh, replicated, rows  # noqa: E402
from golf_jax.model import count, resolve  # noqa: E402
from golf_jax.optim.schedules import Clock  # noqa: E402
from golf_jax.training.memory import program_bytes  # noqa: E402
from golf_jax.training.phases import phases  # noqa: E402
from golf_jax.training.state import graph, state_shapes  # noqa: E402
from golf_jax.training.step import make_step, step_inputs  # noqa: E402

_COLLECTIVE = re.compile(r"= (\([^=]*?\)|\S+) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(")


def flops(jaxpr: Any) -> int:
    """Of the matrix products of one device."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = sum(flops(j) for value in eqn.params.values() for j in _jaxprs(value))
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        total += inner * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
    return total


def _jaxprs(value: Any) -> Iterator[Any]:
    for v in value if isinstance(value, list | tuple) else [value]:
        if hasattr(v := getattr(v, "jaxpr", v), "eqns"):
            yield v


def sent(text: str, devices: int) -> dict[str, float]:
    """Bytes that a device sends in a step, by kind of collective, over a ring."""
    found: dict[str, float] = {}
    for shape, kind in _COLLECTIVE.findall(re.sub(r"/\*.*?\*/", "", text)):  # long tuples number their members in comments
        whole = array_bytes(shape) * (devices if kind == "reduce-scatter" else 1)
        found[kind] = found.get(kind, 0) + whole * (devices - 1) / devices * (2 if kind == "all-reduce" else 1)
    return found


def measure(recipe: Recipe, devices: int) -> dict[str, Any]:
    recipe = replace(recipe, data=replace(recipe.data, ranks=devices, rows_per_rank=1))
    mesh, phase = make_mesh(devices), phases(recipe)[-1]
    tokens = jax.ShapeDtypeStruct(recipe.data.batch_shape, jnp.int32, sharding=rows(mesh))
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=replicated(mesh)), step_inputs(recipe, Clock(0, 0.0)))
    batch = Batch(tokens, tokens, tokens if recipe.data.packed else None)
    traced = make_step(graph(recipe), mesh, phase).trace(state_shapes(recipe, mesh), batch, inputs)
    compiled = traced.lower().compile()
    text = compiled.as_text()
    return {
        "devices": devices,
        "width": recipe.model.width,
        "layers": recipe.model.num_layers,
        "seq_len": recipe.data.seq_len,
        "parameters": count(recipe.model),
        "flops": flops(traced.jaxpr),
        "bytes_moved": sum(traffic(text).values()),
        "bytes_held": program_bytes(compiled),
        "argument_bytes": compiled.memory_analysis().argument_size_in_bytes,
        "bytes_sent": sent(text, devices),
    }


def row(r: dict[str, Any]) -> str:
    sends = ", ".join(f"{kind} {n / 1e6:.1f}" for kind, n in r["bytes_sent"].items()) or "-"
    figures = f"{r['parameters'] / 1e6:.1f} | {r['flops'] / 1e12:.3f} | {r['bytes_moved'] / 1e9:.1f} | {r['bytes_held'] / 1e9:.2f}"
    held = f"{r['argument_bytes'] / 1e9:.3f} | {sum(r['bytes_sent'].values()) / 1e6:.1f} ({sends})"
    return f"| {r['devices']} | {r['width']} | {r['seq_len']:,} | {figures} | {held} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="pr638")
    parser.add_argument("--layers", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 1024, 2048], help="on 8 devices")
    parser.add_argument("--seq-lens", type=int, nargs="*", default=[512, 1024, 4096], help="on 8 devices")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    recipe = replace(recipe, micro_rows=0, model=replace(resolve(recipe.model, "cpu"), dtype="float32"))
    if options.layers:
        recipe = replace(recipe, model=replace(recipe.model, num_layers=options.layers))
    m, d = recipe.model, recipe.data
    head = m.width // m.num_heads
    wider = [replace(recipe, model=replace(m, width=w, num_heads=w // head, num_kv_heads=w // head // 2)) for w in options.widths]
    longer = [replace(recipe, data=replace(d, seq_len=t)) for t in options.seq_lens]
    results = []
    for variant, devices in [(recipe, n) for n in options.devices] + [(r, 8) for r in wider + longer]:
        results.append(measure(variant, devices))
        print(row(results[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps({"jax": jax.__version__, "recipe": recipe.name, "programs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
