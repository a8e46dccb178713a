"""Time of the full training step, in parts and against their floors, and beside the PyTorch peer on the same batch.

    python benchmarks/step_time.py pr638 --data.ranks 1 --peer compile --json benchmarks/results/h200.json   # one GPU's share
    python benchmarks/step_time.py quickstart --peer eager compile                                            # a laptop

The first argument is a recipe, `--section.field value` overrides it. JAX and each peer take two steps in turn, so that other load on the
machine meets all of them, and the second counts, as steps follow each other in training; medians are reported. On a CPU the CPU seconds of
a step are reported too: they hardly depend on other load when the run is pinned to one core (`taskset -c 0`).
"""

import importlib.metadata
import json
import os
import pickle
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer shares the GPU

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from parts import Part, model_parts, optimizer_parts  # noqa: E402

from golf_jax import mesh as meshes  # noqa: E402
from golf_jax.cli import parse, run  # noqa: E402
from golf_jax.config import GolfError, Recipe, to_dict  # noqa: E402
from golf_jax.data.loader import Batch, document_segments  # noqa: E402
from golf_jax.model import count, leaves, resolve, to_tensors  # noqa: E402
from golf_jax.model.params import tensor_names  # noqa: E402
from golf_jax.optim.schedules import Clock  # noqa: E402
from golf_jax.processes import cores, split_cpu  # noqa: E402
from golf_jax.training.phases import phases  # noqa: E402
from golf_jax.training.state import init_state  # noqa: E402
from golf_jax.training.step import make_step, micro_rows, step_inputs  # noqa: E402

PEAKS = {"H200": (989.0, 4800.0), "H100": (989.0, 3350.0)}  # dense bf16 TFLOP/s and GB/s of one device, vendor's figures
LR_FACTOR, MOMENTUM = 1.0, 0.95


@dataclass(frozen=True)
class Options:
    """What is measured beside the step, and how long."""

    peer: tuple[Literal["eager", "compile"], ...] = ()
    """PyTorch peers to run beside it, without and with torch.compile."""
    plain_peer: bool = False
    """The peers without GLIBC_TUNABLES, which `golf_jax.train` sets for itself."""
    devices: int = 0
    """As of `python -m golf_jax.train`: 0 for all, of a CPU about one per core."""
    steps: int = 20
    """Timed steps of each, every other one, after two that are not timed."""
    looping: bool = False
    """The phase with depth recurrence."""
    peak_tflops: float = 0.0
    """Peak of one device in the activation dtype; 0: the vendor's figure by device name, on a CPU a measured matmul."""
    peak_gbs: float = 0.0
    """Memory bandwidth of one device; 0: likewise, on a CPU a measured copy."""
    parts: bool = True
    """Time the parts, too."""
    trace: str = ""
    """Folder for a profiler trace of three more steps."""
    json: str = ""
    """File for the results; written when the step is timed, and again with the parts."""


def settle() -> None:
    """Let the other side's threads go to sleep: PyTorch's watch for more work for some time, on the cores that are to be measured."""
    time.sleep(0.1)


class Peer:
    """The PyTorch peer in a process of its own (torch_peer.serve)."""

    def __init__(self, job: dict[str, Any], plain: bool = False):
        """plain: without what `golf_jax.train` sets for itself, as people run a script."""
        environment = {k: v for k, v in os.environ.items() if not (plain and k == "GLIBC_TUNABLES")}
        command = [sys.executable, str(Path(__file__).with_name("torch_peer.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._send(job)

    def _send(self, message: Any) -> None:
        assert self.process.stdin
        pickle.dump(message, self.process.stdin)
        self.process.stdin.flush()

    def step(self) -> dict[str, Any]:
        assert self.process.stdout
        try:
            self._send("step")
            return pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            raise GolfError("the PyTorch peer died: its message is above") from None

    def close(self) -> None:
        self._send("stop")
        self.process.wait()


def peer_job(recipe: Recipe, params: dict[str, Any], where: str) -> dict[str, Any]:
    """What the peer must know of a recipe and its parameters; where: `cpu`, `gpu`."""
    tensors = {name: np.asarray(t, np.float32) for name, t in to_tensors(recipe.model, params).items()}
    roles = {tensor: leaves(recipe.model)[name].role for tensor, (name, _) in tensor_names(recipe.model).items()}
    return dict(recipe=recipe, tensors=tensors, roles=roles, device="cpu" if where == "cpu" else "cuda")


def timed(fn, *args) -> tuple[Any, dict[str, float]]:
    wall, cpu = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(fn(*args))
    return out, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def summary(samples: list[dict[str, float]]) -> dict[str, float]:
    wall, cpu = ([s[name] for s in samples] for name in ("wall_s", "cpu_s"))
    return {"wall_ms": 1e3 * float(np.median(wall)), "wall_min_ms": 1e3 * min(wall), "cpu_ms": 1e3 * float(np.median(cpu))}


def time_parts(parts: list[Part], repeats: int) -> list[dict[str, Any]]:
    """Medians of each part, whole runs of all parts alternating."""
    compiled = [p.run.lower(*p.args).compile() for p in parts]
    samples: list[list[dict[str, float]]] = [[] for _ in parts]
    for i in range(repeats + 1):
        for part, fn, taken in zip(parts, compiled, samples, strict=True):
            sample = timed(fn, *part.args)[1]
            if i:
                taken.append(sample)
    return [
        {"part": p.name, "times": p.times, "flops": p.flops * p.times, "bytes": p.bytes * p.times}
        | {name: value * p.times for name, value in summary(taken).items()}
        for p, taken in zip(parts, samples, strict=True)
    ]


def on_every_device(part: Part, mesh: Mesh) -> Part:
    """The same work on all devices at once, as in the step: on a CPU they share cores and bandwidth."""
    run = jax.jit(jax.shard_map(part.run, mesh=mesh, in_specs=meshes.REPLICATED, out_specs=meshes.REPLICATED, check_vma=False))
    return part._replace(run=run, args=jax.device_put(part.args, meshes.replicated(mesh)))


def peaks(options: Options, mesh: Mesh) -> tuple[float, float]:
    """(TFLOP/s, GB/s) of one device."""
    device = mesh.devices.flat[0]
    tflops, gbs = next((p for name, p in PEAKS.items() if name in device.device_kind), (0.0, 0.0))
    if device.platform == "cpu":
        # Short runs, many of them, the best counts: some fit between the time slices of other processes.
        a, matmul = jnp.ones((512, 512)), jax.jit(lambda a: a @ a)
        source, target = np.ones(2**23), np.empty(2**23)
        tflops = 2 * 512**3 / min(timed(matmul, a)[1]["wall_s"] for _ in range(300)) / 1e12 / mesh.size
        gbs = 2 * source.nbytes / min(timed(np.copyto, target, source)[1]["wall_s"] for _ in range(100)) / 1e9 / mesh.size
    tflops, gbs = options.peak_tflops or tflops, options.peak_gbs or gbs
    if not tflops or not gbs:
        raise GolfError(f"no peak known for {device.device_kind}: give --peak-tflops and --peak-gbs")
    return tflops, gbs


def surroundings(mesh: Mesh) -> dict[str, Any]:
    """What a result must say of where it was taken."""
    device = mesh.devices.flat[0]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{mesh.size} x {cpu_name() if meshes.platform(mesh) == 'cpu' else device.device_kind}",
        "cores": cores(),
        "load_average": os.getloadavg()[0],
        "environment": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "GLIBC_TUNABLES")},
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")} | {"python": platform.python_version()},
    }


def peak_bytes(device: jax.Device, compiled: Any) -> int:
    """High-water mark of the device, or on a CPU what the compiled step plans."""
    if stats := device.memory_stats():
        return stats["peak_bytes_in_use"]
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def measure(recipe: Recipe, options: Options) -> Iterator[dict[str, Any]]:
    """The result when the step is timed, and once more with its parts."""
    mesh = meshes.make_mesh(options.devices)
    device, where = mesh.devices.flat[0], meshes.platform(mesh)
    recipe = replace(recipe, model=resolve(recipe.model, where, documents=recipe.data.packed))
    d, rows = recipe.data, micro_rows(recipe, mesh.size)
    micros = d.batch_shape[0] // mesh.size // rows
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, recipe.model.vocab_size, d.batch_shape, np.int32) for _ in range(2))
    if options.peer and mesh.size > 1 and where != "cpu":
        raise GolfError("the PyTorch peer runs on one device: give --devices 1")

    state = init_state(recipe, mesh, recipe.seed)
    job = peer_job(recipe, state.params, where) | dict(x=x, y=y, looping=options.looping)
    job |= dict(lr_factor=LR_FACTOR, momentum=MOMENTUM, rows=rows * mesh.size)  # as many at a time as our devices together
    fixed = {"muon": {"momentum": MOMENTUM, "momentum_warmup_steps": 0}}
    groups = tuple(replace(g, **fixed.get(g.kind, {})) for g in recipe.optim.groups)
    inputs = step_inputs(replace(recipe, optim=replace(recipe.optim, groups=groups)), Clock(0, 0.0))
    inputs = inputs._replace(lr_factor=np.float32(LR_FACTOR), fake_quant=np.float32(0), swa_collect=np.bool_(False))
    inputs = jax.device_put(inputs, meshes.replicated(mesh))
    batch = jax.device_put(Batch(x, y, document_segments(x, 1, d.seq_len) if d.packed else None), meshes.rows(mesh))
    phase = phases(recipe)[-1 if options.looping else 0]
    start = time.perf_counter()
    compiled = make_step(recipe, mesh, phase).lower(state, batch, inputs).compile()
    compile_s = time.perf_counter() - start

    peers = {name: Peer(job | {"compile": name == "compile"}, options.plain_peer) for name in options.peer}
    firsts = {name: peer.step() for name, peer in peers.items()}  # compiles
    samples: dict[str, list] = {"jax": [], **{name: [] for name in peers}}
    losses: dict[str, list[float]] = {"jax": [], **{name: [answer["loss"]] for name, answer in firsts.items()}}

    def step() -> dict[str, Any]:
        nonlocal state
        (state, metrics), sample = timed(compiled, state, batch, inputs)
        return sample | {"loss": float(metrics.loss)}

    for i in range(options.steps + 1):
        for name, take in {"jax": step, **{name: peer.step for name, peer in peers.items()}}.items():
            settle()
            answers = [take(), take()]  # the first has to get back what the other side's turn has cost: caches, pages, threads that sleep
            losses[name] += [answer["loss"] for answer in answers]
            if i:
                samples[name].append(answers[1])
    for peer in peers.values():
        peer.close()
    if options.trace:
        with jax.profiler.trace(options.trace):
            for _ in range(3):
                state, metrics = compiled(state, batch, inputs)
            jax.block_until_ready(metrics)

    result: dict[str, Any] = surroundings(mesh) | {
        "recipe": recipe.name,
        "config": to_dict(replace(recipe, quant=type(recipe.quant)())),
        "parameters": count(recipe.model),
        "tokens_per_step": d.batch_tokens,
        "micro_batches": micros,
        "compile_s": compile_s,
        "step": summary(samples["jax"]),
        "peak_bytes": peak_bytes(device, compiled),
        "first_losses": {name: values[:3] for name, values in losses.items()},
        "peers": {},
    }
    for name in peers:
        result["versions"]["torch"] = firsts[name]["version"]
        result["peers"][name] = summary(samples[name]) | {"first_step_s": firsts[name]["wall_s"]}
        ratios = {k: [a[k] / b[k] for a, b in zip(samples["jax"], samples[name], strict=True)] for k in ("wall_s", "cpu_s")}
        result["peers"][name] |= {"jax_over_torch": float(np.median(ratios["wall_s"])), "cpu_ratio": float(np.median(ratios["cpu_s"]))}
        if "peak_bytes" in firsts[name]:
            result["peers"][name]["peak_bytes"] = samples[name][-1]["peak_bytes"]

    tflops, gbs = peaks(options, mesh)
    result |= {"peak_tflops": tflops, "peak_gbs": gbs}
    of_model = [on_every_device(p, mesh) for p in model_parts(recipe.model, rows, d.seq_len, micros, options.looping)]
    flops = sum(p.flops * p.times for p in of_model)
    result["clock"] = "cpu_ms" if where == "cpu" and result["cores"] == 1 else "wall_ms"  # on one core CPU time is free of other load
    result["mfu"] = flops / (result["step"][result["clock"]] * 1e-3) / (tflops * 1e12)
    result["parts"] = []
    yield result
    if not options.parts:
        return
    parts = time_parts(of_model, options.steps)
    parts += time_parts(optimizer_parts(recipe, mesh, state), options.steps)
    if mesh.size > 1:
        *rest, whole, collectives = parts
        parts = [*rest, whole | {k: whole[k] - collectives[k] for k in ("wall_ms", "wall_min_ms", "cpu_ms")}, collectives]
    for part in parts:
        part["floor_ms"] = 1e3 * max(part["flops"] / (tflops * 1e12), part["bytes"] / (gbs * 1e9))
    left = {k: result["step"][k] - sum(p[k] for p in parts) for k in ("wall_ms", "wall_min_ms", "cpu_ms")}
    parts.append({"part": "rest", "times": 1, "flops": 0.0, "bytes": 0, "floor_ms": 0.0} | left)
    result["parts"] = parts
    yield result


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "CPU")


def show(r: dict[str, Any]) -> str:
    lines = [
        f"{r['recipe']}: {r['parameters']:,} parameters, {r['tokens_per_step']:,} tokens per step in {r['micro_batches']} micro-batch(es)",
        f"{r['device']}, {r['cores']} core(s), load {r['load_average']:.1f}; peak {r['peak_tflops']:.3g} TFLOP/s, {r['peak_gbs']:.3g} GB/s",
        f"{'part':<28}{'ms':>10}{'cpu ms':>10}{'share':>8}{'floor ms':>10}",
    ]
    step = r["step"]
    for p in [*r["parts"], {"part": "step", "floor_ms": sum(p["floor_ms"] for p in r["parts"])} | step]:
        share = p[r["clock"]] / step[r["clock"]]
        lines.append(f"{p['part']:<28}{p['wall_ms']:>10.2f}{p['cpu_ms']:>10.2f}{share:>8.1%}{p['floor_ms']:>10.2f}")
    lines.append(f"MFU {r['mfu']:.1%}, peak memory {r['peak_bytes'] / 1e6:,.0f} MB, compilation {r['compile_s']:.1f} s")
    for name, p in r["peers"].items():
        lines.append(
            f"PyTorch {r['versions']['torch']} {name}: {p['wall_ms']:.2f} ms ({p['cpu_ms']:.2f} cpu), "
            f"first step {p['first_step_s']:.1f} s; JAX / PyTorch {p['jax_over_torch']:.3f} (cpu {p['cpu_ratio']:.3f})"
        )
    lines.append(f"first losses: {r['first_losses']}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    recipe, options = parse(argv, Options(), "Step time in parts, and beside PyTorch.")
    split_cpu(options.devices, recipe.data.batch_shape[0])
    result = {}
    for result in measure(recipe, options):
        if options.json:
            Path(options.json).parent.mkdir(parents=True, exist_ok=True)
            Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    print(show(result))
    return 0


if __name__ == "__main__":
    run(main)
