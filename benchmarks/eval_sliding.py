"""Sliding-window scoring: the program of golf_jax.evaluation against the straightforward one and PyTorch's, side by side.

    python benchmarks/eval_sliding.py [--recipes pr638 pr2005] [--rows 2] [--attention native] [--peer eager compile] [--json FILE]

Straightforward: logits of all positions, log-softmax over [B, T, V], and only the last `stride` targets are used; the peer
(torch_peer.py, in a process of its own) does the same. Ours computes the last block's queries, gate and MLP and the head for those
targets only, from weights that are prepared once (`weights_s`), as for all windows of an evaluation. All score the same random
windows with the same random weights, in turn, on all devices (of a CPU one per core).
Prints medians, windows per second, the temporary memory of the compiled programs, ratios, and the difference of the scores.
"""

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import replace
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer shares the GPU

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from step_time import Peer, cpu_name, peer_job, settle  # noqa: E402

from golf_jax.config import DataConfig, ModelConfig, load_recipe  # noqa: E402
from golf_jax.evaluation.scorer import scoring_program, shapes_of, weights_program  # noqa: E402
from golf_jax.mesh import REPLICATED, ROWS, make_mesh, platform, put, replicate  # noqa: E402
from golf_jax.model import init_params, logits, resolve  # noqa: E402
from golf_jax.processes import split_cpu  # noqa: E402


def straightforward(config: ModelConfig, params: dict, tokens_BT: jax.Array, last: int) -> jax.Array:
    tokens_BT = tokens_BT.astype(jnp.int32)
    log_p = jax.nn.log_softmax(logits(config, params, tokens_BT[:, :-1]), axis=-1)
    return -jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=-1)[..., 0][:, -last:]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    mesh, T, last = make_mesh(options.devices), options.seq_len, options.stride
    heads, recipe = max(options.width // 64, 2), load_recipe(name)
    model = replace(recipe.model, width=options.width, num_heads=heads, num_kv_heads=heads // 2, attention=options.attention)
    if options.layers:
        model = replace(model, num_layers=options.layers, xsa_last_n=min(model.xsa_last_n, options.layers))
    config = resolve(model, platform(mesh))
    noise = np.random.default_rng(0)
    fresh = init_params(config, jax.random.key(0))
    params = replicate(mesh, {n: p + 0.02 * noise.standard_normal(p.shape).astype(np.float32) for n, p in fresh.items()})
    windows = options.rows * mesh.size
    host = noise.integers(0, config.vocab_size, (windows, T + 1)).astype(np.uint16)
    tokens = put(mesh, host)
    naive = jax.shard_map(
        lambda p, x: straightforward(config, p, x, last), mesh=mesh, in_specs=(REPLICATED, ROWS), out_specs=ROWS, check_vma=False
    )
    begin = time.perf_counter()
    programs: dict[str, Any] = {"ours": scoring_program(config, mesh, shapes_of(params), options.rows, T, last, True)}
    compile_s = time.perf_counter() - begin
    prepare = weights_program(config, mesh, shapes_of(params))
    given = {"ours": jax.block_until_ready(prepare(params)), "straightforward": params}
    begin = time.perf_counter()
    jax.block_until_ready(prepare(params))
    weights_s = time.perf_counter() - begin
    if options.straightforward:
        programs["straightforward"] = jax.jit(naive).lower(params, tokens).compile()
    recipe = replace(recipe, model=config, data=DataConfig(seq_len=T, ranks=1, rows_per_rank=windows))
    job = peer_job(recipe, params, platform(mesh)) | {"last": last, "looping": True}
    job |= {"x": host[:, :-1].astype(np.int32), "y": host[:, 1:].astype(np.int32)}
    peers = {f"torch {kind}": Peer(job | {"compile": kind == "compile"}, options.plain_peer) for kind in options.peer}
    samples: dict[str, list[dict[str, float]]] = {n: [] for n in (*programs, *peers)}
    scores = {}
    for i in range(options.repeats + 1):  # in turn, so that whatever else the machine does meets all
        for n, program in programs.items():
            settle()
            wall, cpu = time.perf_counter(), time.process_time()
            scores[n] = np.asarray(program(given[n], tokens), np.float64)
            samples[n].append({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu})
        for n, peer in peers.items():
            settle()
            answer = peer.step()
            scores[n] = answer["scores"].astype(np.float64)
            samples[n].append({k: answer[k] for k in ("wall_s", "cpu_s")})
        if not i:
            samples = {n: [] for n in samples}
    for peer in peers.values():
        peer.close()
    median = {n: {k: float(np.median([s[k] for s in taken])) for k in ("wall_s", "cpu_s")} for n, taken in samples.items()}
    where = mesh.devices.flat[0].device_kind
    return {
        "command": shlex.join(["python", *sys.argv]),
        "recipe": name,
        "layers": config.num_layers,
        "attention": config.attention,
        "device": f"{mesh.size} x {cpu_name() if platform(mesh) == 'cpu' else where}",
        "rows": options.rows,
        "width": options.width,
        "seq_len": T,
        "stride": last,
        "dtype": config.dtype,
        "jax": jax.__version__,
        "load_average": os.getloadavg()[0],
        "compile_s": compile_s,
        "weights_s": weights_s,
        "seconds": median,
        "windows_per_second": {n: windows / m["wall_s"] for n, m in median.items()},
        "time_over_ours": {
            n: float(np.median([a["wall_s"] / b["wall_s"] for a, b in zip(taken, samples["ours"], strict=True)]))
            for n, taken in samples.items()
        },
        "temporary_bytes": {n: program.memory_analysis().temp_size_in_bytes for n, program in programs.items()},
        "difference": {n: abs(s.sum() / scores["ours"].sum() - 1) for n, s in scores.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["pr638", "pr2005"])
    parser.add_argument("--rows", type=int, default=2, help="windows per device and forward pass")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--attention", default="auto", help="backend of ours")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--devices", type=int, default=0, help="as of golf_jax.evaluate")
    parser.add_argument("--peer", nargs="*", choices=("eager", "compile"), default=())
    parser.add_argument("--plain-peer", action="store_true", help="peers without GLIBC_TUNABLES, which golf_jax.evaluate sets for itself")
    parser.add_argument("--no-straightforward", dest="straightforward", action="store_false")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    split_cpu(options.devices, sequences=8)
    results = []
    for name in options.recipes:
        results.append(r := measure(name, options))
        print(f"{name} width {r['width']}, {r['rows']} windows of {r['seq_len']} per device, stride {r['stride']}, on {r['device']}")
        for n, m in r["seconds"].items():
            memory = f", temporaries {r['temporary_bytes'][n] / 2**20:,.0f} MiB" if n in r["temporary_bytes"] else ""
            print(
                f"  {n:<16}{m['wall_s']:.3f} s ({m['cpu_s']:.3f} cpu), {r['windows_per_second'][n]:.2f} windows/s, time / ours "
                f"{r['time_over_ours'][n]:.2f}, sum of scores differs by {r['difference'][n]:.1e}{memory}",
                flush=True,
            )
        if options.json:
            with open(options.json, "w") as file:
                json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
