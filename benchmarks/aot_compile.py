"""Compile for Hopper on a machine without a GPU and report what the compiler says: registers, spills, memory,
bytes moved, collectives.

    python benchmarks/aot_compile.py [--what kernels] [--head-dim 64] [--devices 1 8] [--target FILE] [--json FILE]
    python benchmarks/aot_compile.py --what step [--recipes pr638 pr2005] [--backends pallas cudnn xla] [--mlp pallas] [--devices 1 8]

Needs the CUDA wheels (`pip install "jax[cuda13]"`), no driver. Exits with status 1 if a kernel spills registers or a
program does not contain the attention backend it was asked for. Sizes are those of the records per GPU: 48 sequences of
2,048 tokens, 8 query and 4 kv heads, head_dim 64, bf16. `step` is the whole sharded training step of a recipe, each phase, at the
recipe's batch: 48 sequences per GPU on 8, eight times 48 one after another on 1. It cannot tell speed, autotuning choices or races.
The target is a text GpuTargetConfigProto; that of a real device: `jax._src.lib.xla_client
.get_topology_for_devices(jax.devices()).target_config`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax: the CUDA plugin is used as a compiler only
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from hlo_traffic import traffic  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402  (no public way to a context that reads Mosaic modules)
from jax.experimental import topologies  # noqa: E402
from jax.extend.mlir import ir  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golf_jax.config import load_recipe  # noqa: E402
from golf_jax.data.loader import Batch  # noqa: E402
from golf_jax.kernels.attention import assert_backend, xsa_attention  # noqa: E402
from golf_jax.kernels.cross_entropy import softcap_cross_entropy  # noqa: E402
from golf_jax.kernels.mlp import squared_leaky_linear  # noqa: E402
from golf_jax.mesh import replicated, rows  # noqa: E402
from golf_jax.model import resolve  # noqa: E402
from golf_jax.optim.schedules import Clock  # noqa: E402
from golf_jax.training.phases import phases  # noqa: E402
from golf_jax.training.state import state_shapes  # noqa: E402
from golf_jax.training.step import make_step, step_inputs  # noqa: E402

BATCH, T, H, G, WIDTH = 48, 2048, 8, 4, 512
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Program(NamedTuple):
    """One thing to compile: a function of abstract, sharded arguments, and the attention backend it must contain."""

    name: str
    function: Callable
    arguments: tuple
    backend: str


def kernel_programs(mesh: Mesh, head_dim: int) -> Iterator[Program]:
    """Attention forward and backward by backend, inside documents too, the MLP's second map with its activation, and the head with its
    cross entropy, batch-sharded."""
    batch = BATCH * mesh.size

    sharded = P("data")

    def array(*shape, dtype=jnp.bfloat16, spec=sharded):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def local(function, *specs, out):
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)

    q, kv = array(batch, T, H, head_dim), array(batch, T, G, head_dim)
    for backend in ("pallas", "cudnn"):
        for xsa in (True, False):

            def attention(q, k, v, xsa=xsa, backend=backend):
                return xsa_attention(q, k, v, xsa=xsa, backend=backend)

            def with_gradients(q, k, v, dy, attention=attention):
                y, pullback = jax.vjp(attention, q, k, v)
                return y, *pullback(dy)

            name = f"{backend} attention{', xsa' if xsa else ''}"
            yield Program(f"{name}: forward", local(attention, *[sharded] * 3, out=sharded), (q, kv, kv), backend)
            yield Program(f"{name}: forward and backward", local(with_gradients, *[sharded] * 4, out=sharded), (q, kv, kv, q), backend)

    def gated(q, k, v, gate, gain, dy, first=None):
        def attention(q, k, v, gate, gain, *logs):
            return xsa_attention(q, k, v, xsa=True, gate_BSH=gate, factors=(gain, *logs), first_BS=first, backend="pallas")

        y, pullback = jax.vjp(attention, q, k, v, gate, gain, *(jnp.zeros(x.shape[:3]) for x in (q, k, v)))
        return y, *pullback(dy)

    def inside_documents(q, k, v, dy, first):
        y, pullback = jax.vjp(lambda q, k, v: xsa_attention(q, k, v, xsa=True, first_BS=first, backend="pallas"), q, k, v)
        return y, *pullback(dy)

    arguments = (q, kv, kv, array(batch, T, H), array(H, dtype=jnp.float32, spec=P()), q)
    specs, out = (*[sharded] * 4, P(), sharded), (*[sharded] * 5, P(), *[sharded] * 3)
    name = "pallas attention, xsa, head gate, factors"
    yield Program(f"{name}: forward and backward", local(gated, *specs, out=out), arguments, "pallas")
    for sequences, length in ((BATCH, T), (1, BATCH * T)):  # documents inside 48 rows, and packed into one
        q, kv = (array(sequences * mesh.size, length, heads, head_dim) for heads in (H, G))
        first, where = array(sequences * mesh.size, length, dtype=jnp.int32), f"documents in rows of {length}: forward and backward"
        function = local(inside_documents, *[sharded] * 5, out=sharded)
        yield Program(f"pallas attention, xsa, {where}", function, (q, kv, kv, q, first), "pallas")
        arguments = (q, kv, kv, array(sequences * mesh.size, length, H), array(H, dtype=jnp.float32, spec=P()), q, first)
        yield Program(f"{name}, {where}", local(gated, *specs, sharded, out=out), arguments, "pallas")
    for hidden in (3 * WIDTH, 4 * WIDTH):

        def mlp(u, r, w, dm):
            m, pullback = jax.vjp(lambda u, r, w: squared_leaky_linear(u, r, w, 0.5), u, r, w)
            return m, *pullback(dm)

        u, dm, r = array(batch * T, hidden), array(batch * T, WIDTH), array(batch * T, dtype=jnp.float32)
        arguments, specs = (u, r, array(hidden, WIDTH, spec=P()), dm), (sharded, sharded, P(), sharded)
        yield Program(f"pallas MLP, {hidden} hidden units: forward and backward", local(mlp, *specs, out=sharded), arguments, "pallas")
    for vocab in (1024, 8192):

        def loss(x, table, targets):
            value, gradients = jax.value_and_grad(lambda x, t: softcap_cross_entropy(x, t, targets, softcap=30.0).mean(), (0, 1))(x, table)
            return jax.lax.pmean(value, "data"), gradients[0], jax.lax.pmean(gradients[1], "data")

        arguments = array(batch * T, WIDTH), array(vocab, WIDTH, dtype=jnp.float32, spec=P()), array(batch * T, dtype=jnp.int32)
        function = local(loss, sharded, P(), sharded, out=(P(), sharded, P()))
        yield Program(f"softcap cross entropy, vocabulary {vocab}: value and gradients", function, arguments, "xla")


def step_programs(mesh: Mesh, recipes: list[str], backends: list[str], mlp: str, layers: int) -> Iterator[Program]:
    """The training step as golf_jax.train compiles it, with and without depth recurrence where the recipe has it."""
    for name, backend in [(name, backend) for name in recipes for backend in backends]:
        recipe = load_recipe(name)
        cut = {"num_layers": layers} if layers else {}
        model = replace(recipe.model, attention=backend, mlp=mlp if backend == "pallas" else "auto", **cut)
        recipe = replace(recipe, model=resolve(model, "gpu", documents=recipe.data.packed))
        state = state_shapes(recipe, mesh)
        d = recipe.data
        tokens = jax.ShapeDtypeStruct(d.batch_shape, jnp.int32, sharding=rows(mesh))
        kinds = step_inputs(recipe, Clock(0, 0.0))
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype, sharding=replicated(mesh)), kinds)
        for phase in phases(recipe):
            arguments = (state, Batch(tokens, tokens, tokens if d.packed else None), inputs)
            yield Program(
                f"{name} {phase.name}, {backend}{', MLP too' * (recipe.model.mlp == 'pallas')}",
                make_step(recipe, mesh, phase),
                arguments,
                backend,
            )


@contextlib.contextmanager
def captured_output():
    """The text that C++ code writes to stdout and stderr (ptxas), as a one-item list filled on exit."""
    text = []
    sys.stdout.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    with tempfile.TemporaryFile() as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield text
        finally:
            for descriptor, old in zip((1, 2), saved, strict=True):
                os.dup2(old, descriptor)
                os.close(old)
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def ptxas_reports(text: str) -> list[dict]:
    """Registers and spills of each kernel from `ptxas -v` output, and how many such there are."""
    pattern = (
        r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?' for '\w+'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(pattern, text, re.DOTALL)
    return [
        dict(kernel=n, registers=int(r), spill_store_bytes=int(s), spill_load_bytes=int(load), count=count)
        for (n, s, load, r), count in Counter(found).items()
    ]


def shared_memory(lowered) -> list[int]:
    """Dynamic shared memory in bytes of each Mosaic GPU kernel of a lowered program, in program order."""
    sizes = []
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    context.load_all_available_dialects()

    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(operation.attributes["call_target_name"]):
            module = ir.StringAttr(ir.DictAttr(operation.attributes["mhlo.backend_config"])["module"]).value_bytes
            with context:
                text = str(ir.Module.parse(module))
            launch = re.search(r'gpu\.launch"\((?:%\d+, )*(%\d+)\)', text)  # the last operand
            constant = launch and re.search(rf'{launch[1]} = ".*arith\.constant"\(\) {{value = (\d+) ', text)
            if not constant:
                raise RuntimeError("no shared memory size in a Mosaic GPU module: its text has changed")
            sizes.append(int(constant[1]))
        for region in operation.regions:
            for block in region:
                for child in block:
                    visit(child.operation)

    visit(lowered.compiler_ir().operation)
    return sizes


def compile_program(program: Program, mesh: Mesh) -> dict:
    """Compile ahead of time; see the module's docstring for what is reported."""
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), captured_output() as log:
        function = program.function if hasattr(program.function, "trace") else jax.jit(program.function)
        lowered = function.trace(*program.arguments).lower()
        compiled = lowered.compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert_backend(text, program.backend)
    return dict(
        name=program.name,
        devices=mesh.size,
        compile_seconds=round(seconds, 1),
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        donated_bytes=memory.alias_size_in_bytes,
        traffic_bytes=dict(traffic(text)),
        collectives={c: n for c in COLLECTIVES if (n := len(re.findall(rf" {c}(?:-start)?\(", text)))},
        kernels=ptxas_reports(log[0]),
        shared_memory_bytes=sorted(set(shared_memory(lowered))),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("kernels", "step"), default="kernels")
    parser.add_argument("--recipes", nargs="+", default=["pr638", "pr2005"], help="for step")
    parser.add_argument("--backends", nargs="+", default=["pallas", "cudnn", "xla"], help="for step")
    parser.add_argument("--mlp", choices=("auto", "xla", "pallas"), default="auto", help="for step with attention pallas")
    parser.add_argument("--layers", type=int, default=0, help="for step: not as many as the recipe has, where that is allowed")
    parser.add_argument("--head-dim", type=int, default=64, help="for kernels")
    parser.add_argument("--devices", type=int, nargs="+", default=[1], help="sizes of the data axis")
    parser.add_argument("--target", type=Path, default=Path(__file__).with_name("h100_target.txtpb"))
    parser.add_argument("--json", type=Path, help="also write the report here")
    options = parser.parse_args()
    results, target = [], options.target.read_text()

    def programs() -> Iterator[tuple[Program, Mesh]]:
        for devices in options.devices:
            topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{devices}")
            mesh = Mesh(np.array(topology.devices), ("data",))
            made = (
                kernel_programs(mesh, options.head_dim)
                if options.what == "kernels"
                else step_programs(mesh, options.recipes, options.backends, options.mlp, options.layers)
            )
            yield from ((program, mesh) for program in made)

    for program, mesh in programs():
        results.append(result := compile_program(program, mesh))
        memory = f"temporary {result['temporary_bytes'] / 1e6:.1f} MB, traffic {sum(result['traffic_bytes'].values()) / 1e9:.1f} GB"
        where = f"{result['name']} on {result['devices']}"
        print(f"{where}: compiled in {result['compile_seconds']} s, {memory}, collectives {result['collectives'] or 'none'}", flush=True)
        for kernel in result["kernels"]:
            print("   ", ", ".join(f"{key} {value}" for key, value in kernel.items()))
        if result["shared_memory_bytes"]:
            print("    shared memory bytes", result["shared_memory_bytes"], flush=True)
    spills = [k["kernel"] for r in results for k in r["kernels"] if k["spill_store_bytes"] or k["spill_load_bytes"]]
    report = dict(jax=jax.__version__, target=options.target.name, programs=results)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(results)} programs; spilling kernels: {', '.join(spills) or 'none'}")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
