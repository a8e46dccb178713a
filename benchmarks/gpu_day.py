"""Everything that a GPU is needed for, in one call of ten minutes: is it right, how fast is it, what does it take.

    python benchmarks/gpu_day.py            one GPU (H100, H200), `pip install -e ".[cuda,torch]"`
    python benchmarks/gpu_day.py --dry      the same items in miniature on a CPU: finds what a typo would cost on the day;
                                            without torch, without the PyTorch peers

Items run one after another, the most wanted first, each in a process of its own with a limit of its own: one that crashes or hangs
costs only itself. What an item had written when it was cut off counts. After each, `day.jsonl` (one object per item) and `day.md` in
benchmarks/results/gpu_day/ (or --out DIR) are written anew; a second call does what the first had no time for.
"""

import argparse
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
BACKENDS = ("cudnn", "pallas", "xla")  # of attention
MLP = "pallas with its MLP"  # attention and the MLP's activation inside kernels of ours
RECIPES = {
    "pr638": ["pr638"],
    "pr2005 looping": ["pr2005", "--looping"],
    "pr2005 plain": ["pr2005"],
    "quickstart": ["quickstart", "--data.rows-per-rank", "16", "--micro-rows", "0"],
}
SMALL = "--data.seq-len 64 --data.rows-per-rank 2 --model.width 32 --model.num-heads 2 --model.num-kv-heads 1 --model.num-layers"
TINY = {
    "quickstart": f"{SMALL} 1 --model.xsa-last-n 1 --micro-rows 0",
    "pr638": f"{SMALL} 2 --model.xsa-last-n 2 --model.bigram-buckets 64",
    "pr2005": f"{SMALL} 3 --model.xsa-last-n 3 --model.parallel-from 2 --model.loop-start 1 --model.loop-end 1",
}


class Item(NamedTuple):
    name: str
    seconds: int
    """At most; the item also ends with the day."""
    command: list[str]
    """Script and arguments; `--json FILE` is added."""


def items(dry: bool, out: Path) -> list[Item]:
    """The day, the most wanted first."""

    def attention(backend: str) -> Item:
        return Item(f"attention {backend}", 90, ["attention_check.py", "xla" if dry else backend, *["--dry"] * dry])

    def step(name: str, backend: str, *flags: str, seconds: int = 90) -> Item:
        recipe, *rest = RECIPES[name]
        size = shlex.split(TINY[recipe]) if dry else ["--data.ranks", "1"]
        if dry:
            rest = [r for r in rest if r == "--looping"]
            size += "--data.ranks 1 --steps 2 --peak-tflops 1 --peak-gbs 1".split()
        flags = tuple("eager" if dry and f == "compile" else f for f in flags)
        where, without = ["--model.attention", "xla" if dry else backend], ["--no-parts"] * ("--parts" not in flags)
        if backend == MLP:
            where = ["--model.attention", "xla" if dry else "pallas", "--model.mlp", "xla" if dry else "pallas"]
        kind = " beside PyTorch" if "--peer" in flags else ", traced" if "--trace" in flags else ""
        return Item(
            f"step {name}, {backend}{kind}", seconds, ["step_time.py", recipe, *rest, *size, "--devices", "1", *where, *without, *flags]
        )

    def mlp(backend: str) -> Item:
        return Item(f"MLP {backend}", 60, ["mlp_check.py", "xla" if dry else backend, *["--dry"] * dry])

    torch = importlib.util.find_spec("torch") is not None or not dry  # on the day it has to be there
    tiny = "--layers 2 --width 32 --seq-len 64 --stride 16 --rows 1 --no-straightforward".split() + ["--peer", "eager"] * torch
    real = "--rows 32 --repeats 10 --peer compile".split()

    def sliding(recipe: str) -> Item:
        size = tiny if dry else real
        return Item(f"sliding {recipe}", 90, ["eval_sliding.py", "--recipes", recipe, "--devices", "1", *size])

    peer, parts = ("--peer", "compile") * torch, ("--parts",)
    first = [attention(b) for b in BACKENDS[:2]] + [step(name, b, *parts) for name in ("pr638", "pr2005 looping") for b in BACKENDS[:2]]
    second = [step("pr638", "cudnn", *peer, seconds=150), sliding("pr638"), step("pr638", "pallas", "--trace", str(out / "trace"))]
    second += [mlp("pallas"), step("pr638", MLP), step("pr2005 looping", MLP), mlp("xla")]
    third = [step("pr2005 looping", "cudnn", *peer, seconds=150), step("quickstart", "cudnn", *parts, *peer)]
    fourth = [step("pr2005 plain", b, *parts) for b in BACKENDS[:2]] + [step("pr2005 plain", "cudnn", *peer, seconds=150)]
    rest = [
        attention("xla"),
        step("pr638", "xla"),
        step("quickstart", "pallas"),
        step("pr2005 looping", "xla"),
        step("pr2005 plain", "xla"),
    ]
    if dry:  # each script in each of its ways, once
        return [
            attention("xla"),
            mlp("xla"),
            step("pr638", MLP),
            step("pr638", "cudnn", *parts, "--trace", str(out / "trace")),
            step("pr2005 looping", "pallas", *peer),
            sliding("pr638"),
        ]
    return [*first, *second, *third, *fourth, *rest]


def run(item: Item, out: Path, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """One item in a process group of its own: what it left, and how it ended."""
    file, log = out / "item.json", out / "item.log"
    file.unlink(missing_ok=True)
    begin = time.perf_counter()
    command = [sys.executable, str(HERE / item.command[0]), *item.command[1:], "--json", str(file)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
        try:
            status = process.wait(limit)
            end = "ok" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            end = f"cut off after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # a PyTorch peer belongs to the group
                process.wait()
    result = {"item": item.name, "end": end, "seconds": round(time.perf_counter() - begin, 1), "command": shlex.join(item.command)}
    if end != "ok":
        result["log"] = log.read_text(errors="replace")[-3000:]
    text = file.read_text() if file.exists() else ""
    try:
        whole = text.startswith(("[", "{\n"))  # else an object a line
        result["result"] = json.loads(text) if whole else [json.loads(line) for line in text.splitlines()] or None
    except ValueError:  # cut off while it wrote
        result["result"] = None
    for left in (file, log):
        left.unlink(missing_ok=True)
    return result


def gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip() or "nvidia-smi says nothing"
    except (OSError, subprocess.TimeoutExpired):
        return "no nvidia-smi here"


def page(done: list[dict[str, Any]], left: list[str], device: str) -> str:
    """The day as Markdown."""
    lines = [f"# GPU day\n\n`python benchmarks/gpu_day.py` on {device}.\n"]
    for kind, title, shape, fields in (
        ("attention", "Attention", "B T H G K", {"dtype": "dtype", "xsa": "XSA", "documents": "documents"}),
        ("MLP", "The MLP's second map with its activation", "N F D", {"slope": "slope"}),
    ):
        names = ["backend", f"shape {shape}", *fields.values(), "worst error", "", "forward, with backward ms (TFLOP/s)"]
        lines += [f"\n## {title}\n", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for r in (r for d in done if d["item"].startswith(kind) for r in d["result"] or []):
            said = f"{max(r['errors'].values()):.1e}" if "errors" in r else r["failed"].replace("|", "/").replace("\n", " ")[:120]
            timed = [r[k] for k in ("forward", "forward and backward") if k in r]
            speed = ", ".join(f"{t['ms']:.2f}" + (f" ({t['tflops']:.0f})" if t["tflops"] else "") for t in timed)
            about = [r["backend"], " ".join(map(str, r["shape"])), *(r[field] for field in fields)]
            lines += [f"| {' | '.join(map(str, [*about, said, 'ok' if r['ok'] else 'WRONG', speed]))} |"]
    steps = {d["item"].removeprefix("step "): d["result"] for d in done if d["item"].startswith("step") and d["result"]}
    lines += ["\n## Steps\n", "| step | ms | MFU | peak GB | compile s | PyTorch ms, GB | JAX / PyTorch |", "|---|---|---|---|---|---|---|"]
    for name, r in steps.items():
        peers = [f"{k} {p['wall_ms']:.1f}, {p.get('peak_bytes', 0) / 1e9:.1f}" for k, p in r["peers"].items()]
        ratios = [f"{p['jax_over_torch']:.3f}" for p in r["peers"].values()]
        numbers = f"{r['step']['wall_ms']:.1f} | {r['mfu']:.1%} | {r['peak_bytes'] / 1e9:.1f} | {r['compile_s']:.0f}"
        lines += [f"| {name} | {numbers} | {'; '.join(peers)} | {'; '.join(ratios)} |"]
    for recipe in RECIPES:
        times = {b: r["step"]["wall_ms"] for b in (*BACKENDS, MLP) if (r := steps.get(f"{recipe}, {b}"))}
        if times:
            lines += [f"\n{recipe}: fastest backend {min(times, key=times.__getitem__)} of {', '.join(times)}."]
    for name, r in steps.items():
        if r["parts"]:
            lines += [f"\n### Parts of {name}\n", "| part | ms | floor ms |", "|---|---|---|"]
            lines += [f"| {p['part']} | {p['wall_ms']:.2f} | {p['floor_ms']:.2f} |" for p in r["parts"]]
    lines += ["\n## Sliding evaluation\n", "| recipe | program | windows/s | time / ours |", "|---|---|---|---|"]
    for r in (r for d in done if d["item"].startswith("sliding") for r in d["result"] or []):
        lines += [f"| {r['recipe']} | {n} | {w:.1f} | {r['time_over_ours'][n]:.2f} |" for n, w in r["windows_per_second"].items()]
    lines += ["\n## Items\n", "| item | end | s |", "|---|---|---|"]
    lines += [f"| {d['item']} | {d['end']} | {d['seconds']:.0f} |" for d in done] + [f"| {name} | not yet | |" for name in left]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="in miniature on the CPU")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu_day")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out, record, end = options.out.resolve(), options.out / "day.jsonl", time.perf_counter() + 60 * options.minutes
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_COMPILATION_CACHE_DIR": str(out / "cache")}
    environment |= {"JAX_PLATFORMS": "cpu"} if options.dry else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    done = [d for d in done if d["end"] == "ok"]  # what failed or was cut off has another try
    device, finished = "a CPU, in miniature" if options.dry else gpu(), {d["item"] for d in done}
    todo = [item for item in items(options.dry, out) if item.name not in finished]
    for i, item in enumerate(todo):
        limit = min(item.seconds if not options.dry else math.inf, end - time.perf_counter())
        if limit < 15:
            break
        done.append(run(item, out, limit, environment))
        print(f"{item.name}: {done[-1]['end']}, {done[-1]['seconds']} s", flush=True)
        if done[-1]["end"] != "ok":
            print("\n".join(done[-1]["log"].splitlines()[-3:]), flush=True)
        record.write_text("".join(json.dumps(d) + "\n" for d in done))
        (out / "day.md").write_text(page(done, [t.name for t in todo[i + 1 :]], device))
    return 0 if {item.name for item in todo} <= {d["item"] for d in done if d["end"] == "ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
