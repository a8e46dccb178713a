"""Sliding-window scoring: the program of golf_jax.evaluation against the straightforward one, side by side.

    python benchmarks/eval_sliding.py [--recipes pr1182 pr2005] [--rows 2] [--width 512] [--repeats 3] [--json FILE]

Straightforward: logits of all positions, log-softmax over [B, T, V], and only the last `stride` targets are used. Ours computes the
last block's queries, gate and MLP and the head for those targets only. Both score the same random windows with the same random weights
on one device. Prints the time (on a CPU: processor seconds of all threads, which hardly depend on other load), the temporary memory of
the compiled program, both ratios, and the difference of the scores.
"""

import argparse
import json
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import ModelConfig, load_recipe
from golf_jax.evaluation.scorer import scoring_program, shapes_of
from golf_jax.mesh import make_mesh, platform, put, replicate
from golf_jax.model import init_params, logits, resolve

T, STRIDE = 2048, 64


def straightforward(config: ModelConfig, params: dict, tokens_BT: jax.Array) -> jax.Array:
    tokens_BT = tokens_BT.astype(jnp.int32)
    log_p = jax.nn.log_softmax(logits(config, params, tokens_BT[:, :-1]), axis=-1)
    return -jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], axis=-1)[..., 0][:, -STRIDE:]


def measure(name: str, rows: int, width: int, repeats: int) -> dict:
    mesh = make_mesh(1)
    heads = max(width // 64, 2)
    model = replace(load_recipe(name).model, width=width, num_heads=heads, num_kv_heads=heads // 2)
    config = resolve(model, platform(mesh))
    noise = np.random.default_rng(0)
    fresh = init_params(config, jax.random.key(0))
    params = replicate(mesh, {n: p + 0.02 * noise.standard_normal(p.shape).astype(np.float32) for n, p in fresh.items()})
    tokens = put(mesh, noise.integers(0, config.vocab_size, (rows, T + 1)).astype(np.uint16))
    programs = {
        "ours": scoring_program(config, mesh, shapes_of(params), rows, T, STRIDE, True),
        "straightforward": jax.jit(lambda p, x: straightforward(config, p, x)).lower(params, tokens).compile(),
    }
    scores = {n: np.asarray(program(params, tokens), np.float64) for n, program in programs.items()}
    clock = time.process_time if platform(mesh) == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {n: [] for n in programs}
    for _ in range(repeats):  # alternating, so that whatever else the machine does meets both
        for n, program in programs.items():
            begin = clock()
            jax.block_until_ready(program(params, tokens))
            seconds[n].append(clock() - begin)
    best = {n: min(s) for n, s in seconds.items()}
    memory = {n: program.memory_analysis().temp_size_in_bytes for n, program in programs.items()}
    return {
        "recipe": name,
        "device": str(mesh.devices.flat[0].device_kind),
        "rows": rows,
        "width": width,
        "seconds": best,
        "temporary_bytes": memory,
        "times_faster": best["straightforward"] / best["ours"],
        "times_less_memory": memory["straightforward"] / memory["ours"],
        "difference": abs(scores["ours"].sum() / scores["straightforward"].sum() - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["pr1182", "pr2005"])
    parser.add_argument("--rows", type=int, default=2, help="windows per forward pass")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    results = []
    for name in args.recipes:
        r = measure(name, args.rows, args.width, args.repeats)
        results.append(r)
        s, m = r["seconds"], {n: v / 2**20 for n, v in r["temporary_bytes"].items()}
        print(f"{name} width {r['width']}, {r['rows']} windows of {T}, stride {STRIDE}, on {r['device']}")
        print(f"  time    straightforward {s['straightforward']:.3f} s, ours {s['ours']:.3f} s: {r['times_faster']:.2f} times faster")
        print(
            f"  memory  straightforward {m['straightforward']:,.0f} MiB, ours {m['ours']:,.0f} MiB: {r['times_less_memory']:.2f} times less"
        )
        print(f"  relative difference of the summed scores {r['difference']:.1e}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
