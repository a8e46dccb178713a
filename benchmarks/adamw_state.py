"""AdamW's state replicated (what the step does) or sharded over the devices: both forms of one update, side by side.

    python benchmarks/adamw_state.py pr2005 --target benchmarks/h100_target.txtpb     # ahead of time for eight H100: bytes
    python benchmarks/adamw_state.py pr2005                                           # on the devices that are here: also milliseconds

Replicated: all-reduce of the gradients, every device updates everything. Sharded: the leaves as one vector per dtype, reduce-scatter
of the gradients, each device updates its share with its share of the state, all-gather of the directions. Only leaves outside Muon.
--target needs the CUDA wheels (`pip install "jax[cuda13]"`), no GPU.
"""

import argparse
import os
import sys
import time
from pathlib import Path

if any(argument.startswith("--target") for argument in sys.argv):
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax: the CUDA plugin is used as a compiler only

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from hlo_traffic import traffic  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from golf_jax.config import Recipe, load_recipe  # noqa: E402
from golf_jax.mesh import AXIS, make_mesh  # noqa: E402
from golf_jax.model import leaves  # noqa: E402
from golf_jax.optim.adam import scale_by_adam  # noqa: E402
from golf_jax.optim.optimizer import route  # noqa: E402
from golf_jax.processes import split_cpu  # noqa: E402


def forms(recipe: Recipe, devices: int) -> tuple[dict, dict[str, tuple]]:
    """(shapes of the parameters, form -> (function of (params, grads, state), shapes of its state, how they are laid out))."""
    described = leaves(recipe.model)
    groups = route(recipe.optim, {n: leaf.role for n, leaf in described.items()})
    low = jnp.bfloat16 if recipe.numerics == "as_run" else jnp.float32
    stored = {n: low if n in recipe.model.bf16_params else jnp.float32 for n in described}
    params = {n: jax.ShapeDtypeStruct(described[n].shape, stored[n]) for n, g in groups.items() if g.kind == "adamw"}
    first = next(g for g in recipe.optim.groups if g.kind == "adamw")
    rule = scale_by_adam(*first.betas, first.eps)

    def apply(params, direction):
        return {n: (p.astype(jnp.float32) - 0.01 * direction[n].astype(jnp.float32)).astype(p.dtype) for n, p in params.items()}

    def replicated(params, grads, state):
        direction, state = rule.update(jax.lax.pmean(grads, AXIS), state)
        return apply(params, direction), state

    def flat(tree):
        """One vector per dtype, padded to a multiple of the devices."""
        out = {}
        for dtype in sorted({str(x.dtype) for x in tree.values()}):
            vector = jnp.concatenate([x.reshape(-1) for x in tree.values() if str(x.dtype) == dtype])
            out[dtype] = jnp.pad(vector, (0, -len(vector) % devices))
        return out

    def unflat(vectors, like):
        start, out = dict.fromkeys(vectors, 0), {}
        for n, x in like.items():
            dtype, begin = str(x.dtype), start[str(x.dtype)]
            out[n], start[dtype] = vectors[dtype][begin : begin + x.size].reshape(x.shape), begin + x.size
        return out

    def sharded(params, grads, state):
        share = {t: jax.lax.psum_scatter(g, AXIS, scatter_dimension=0, tiled=True) / devices for t, g in flat(grads).items()}
        direction, state = rule.update(share, state)
        gathered = {t: jax.lax.all_gather(d, AXIS, tiled=True) for t, d in direction.items()}
        return apply(params, unflat(gathered, params)), state

    whole = jax.eval_shape(rule.init, params)
    shares = jax.eval_shape(lambda p: rule.init(flat(p)), params)
    by_share = jax.tree.map(lambda x: P(AXIS) if x.ndim else P(), shares)
    return params, {"replicated": (replicated, whole, jax.tree.map(lambda _: P(), whole)), "sharded": (sharded, shares, by_share)}


def placed_shape(mesh: Mesh, spec: P, a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--target", type=Path, help="text GpuTargetConfigProto of a GPU that is not here")
    parser.add_argument("--devices", type=int, default=8)
    options = parser.parse_args()
    if options.target:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=options.target.read_text(), topology=f"1x1x{options.devices}"
        )
        mesh = Mesh(np.array(topology.devices), (AXIS,))
    else:
        split_cpu(options.devices, options.devices)
        mesh = make_mesh(options.devices)
    recipe = load_recipe(options.recipe)
    params, made = forms(recipe, mesh.size)
    print(f"{recipe.name}: {sum(p.size for p in params.values()):,} parameters under AdamW, {mesh.size} devices")
    programs = {}
    for name, (update, state, spec) in made.items():
        step = jax.shard_map(update, mesh=mesh, in_specs=(P(), P(), spec), out_specs=(P(), spec), check_vma=False)
        whole = jax.tree.map(lambda a: placed_shape(mesh, P(), a), params)
        placed = (whole, whole, jax.tree.map(lambda a, s: placed_shape(mesh, s, a), state, spec))
        compiled = jax.jit(step, donate_argnums=(0, 2)).lower(*placed).compile()
        moved, memory = traffic(compiled.as_text()), compiled.memory_analysis()
        held = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6
        print(
            f"{name}: {sum(moved.values()) / 1e6:.0f} MB moved, of it collectives {moved['collectives'] / 1e6:.0f} MB; {held:.0f} MB held"
        )
        programs[name] = (compiled, placed)
    if options.target:
        return
    times = {name: [] for name in programs}
    zeros = lambda tree: jax.tree.map(lambda a: jax.device_put(jnp.zeros(a.shape, a.dtype), a.sharding), tree)  # noqa: E731
    values = {name: [zeros(a) for a in placed] for name, (_, placed) in programs.items()}
    for _ in range(30):  # in turn, so that other load meets both
        for name, (compiled, _) in programs.items():
            p, g, s = values[name]
            begin = time.perf_counter()
            p, s = jax.block_until_ready(compiled(p, g, s))
            times[name].append(time.perf_counter() - begin)
            values[name] = [p, g, s]
    print(", ".join(f"{name} {1e3 * float(np.median(t[2:])):.2f} ms" for name, t in times.items()))


if __name__ == "__main__":
    main()
