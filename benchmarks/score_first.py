"""Score-first test-time training, chunk by chunk: the method of golf_jax.evaluation and the same in PyTorch, side by side.

    python benchmarks/score_first.py [pr2005] [--chunks 2] [--chunk-tokens 4096] [--peer compile] [--plain-peer] [--json FILE]

Each chunk is scored by sliding windows, then trained on by SGD with the recipe's settings (pr2005's for recipes that have none), both
sides from the same random weights on the same random tokens; the peer (torch_peer.py, in a process of its own) computes all logits of
every window. Chunks are shorter than the recipe's 32,768 tokens, for patience; windows and rows keep the proportion of 512 to 16 times the
epochs. The first chunk, which compiles and has fewer windows, is not timed. Prints seconds per chunk, scoring and training apart, their
ratios, and the difference of each chunk's sum of scores, which follows both sides through all updates.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from step_time import Peer, peer_job, settle, surroundings

from golf_jax.cli import parse, run
from golf_jax.config import Recipe, load_recipe
from golf_jax.config.base import check
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation import Stream
from golf_jax.evaluation.adapter import Adapter
from golf_jax.evaluation.score_first import momentum_rule
from golf_jax.evaluation.scorebook import ScoreBook
from golf_jax.evaluation.scorer import WindowScorer, shapes_of
from golf_jax.evaluation.windows import chunk_windows
from golf_jax.mesh import make_mesh, platform, replicate
from golf_jax.model import Model, init_params, resolve
from golf_jax.processes import split_cpu


@dataclass(frozen=True)
class Options:
    """What is measured, and how long."""

    peer: tuple[Literal["eager", "compile"], ...] = ()
    """PyTorch peers to run beside it, without and with torch.compile."""
    plain_peer: bool = False
    """The peers without GLIBC_TUNABLES, which `golf_jax.evaluate` sets for itself."""
    devices: int = 0
    """As of `python -m golf_jax.evaluate`: 0 for all, of a CPU about one per core."""
    chunks: int = 2
    """Timed chunks, after one that is not timed."""
    chunk_tokens: int = 4096
    """Tokens per chunk, whole sequences."""
    json: str = ""
    """File for the results."""


def measure(recipe: Recipe, options: Options) -> dict[str, Any]:
    mesh = make_mesh(options.devices)
    config = resolve(recipe.model, platform(mesh))
    settings = recipe.eval.score_first if recipe.eval.score_first.on else load_recipe("pr2005").eval.score_first
    settings = replace(settings, chunk_tokens=options.chunk_tokens)
    check(
        options.chunk_tokens >= recipe.data.seq_len and options.chunk_tokens % recipe.data.seq_len == 0,
        f"--chunk-tokens must be a multiple of data.seq_len {recipe.data.seq_len}, got {options.chunk_tokens}",
    )
    T, last, noise = recipe.data.seq_len, settings.stride, np.random.default_rng(0)
    fresh = init_params(config, jax.random.key(0))
    params = replicate(mesh, {n: p + 0.02 * noise.standard_normal(p.shape).astype(np.float32) for n, p in fresh.items()})
    tokens = noise.integers(0, config.vocab_size, (1 + options.chunks) * options.chunk_tokens + 1).astype(np.uint16)
    one_byte = ByteTables(np.ones(config.vocab_size, np.int16), *np.zeros((2, config.vocab_size), bool))
    stream, model = Stream(tokens, one_byte, T), Model(config, params)
    windows, chunk_of = chunk_windows(settings.windows, stream.targets, T, last, options.chunk_tokens)
    sequences, rows = options.chunk_tokens // T, stream.batch_rows(mesh) * mesh.size

    book = ScoreBook(stream, 1 + options.chunks)
    adapter = Adapter(model, stream, mesh, settings, momentum_rule(settings), sequences, settings.epochs)
    check(len(adapter.plan.sequence) == 1, f"--chunk-tokens {options.chunk_tokens}: the peer makes one update per epoch; give fewer tokens")
    scorer = WindowScorer(model, shapes_of(params), mesh, book, windows, last, chunk_of)
    lr = np.full((settings.epochs, 1), settings.lr)

    def ours(c: int) -> dict[str, Any]:
        first = c * options.chunk_tokens
        begin, cpu = time.perf_counter(), time.process_time()
        scorer.run(adapter.params, windows[chunk_of == c], c)
        scored = time.perf_counter()
        book.update(first, first + sequences * T, adapter.steps)
        adapter.train(adapter.prepare(first), lr)
        end = time.perf_counter()
        return {"wall_s": end - begin, "score_s": scored - begin, "train_s": end - scored, "cpu_s": time.process_time() - cpu}

    offsets = np.arange(T + 1)
    work = [
        (
            tokens[windows.start[chunk_of == c][:, None] + offsets],
            tokens[c * options.chunk_tokens + np.arange(sequences)[:, None] * T + offsets],
        )
        for c in range(1 + options.chunks)
    ]
    job = peer_job(replace(recipe, model=config), params, platform(mesh)) | {"chunks": work, "last": T, "looping": True, "rows": rows}
    job |= {"sgd": {"lr": settings.lr, "momentum": settings.momentum}, "epochs": settings.epochs, "clip_norm": settings.clip_norm}
    peers = {name: Peer(job | {"compile": name == "compile"}, options.plain_peer) for name in options.peer}
    samples: dict[str, list[dict[str, Any]]] = {"jax": [], **{name: [] for name in peers}}
    differences: dict[str, list[float]] = {name: [] for name in peers}
    for c in range(1 + options.chunks):  # in turn, so that whatever else the machine does meets all
        answers = {}
        for name, take in {"jax": lambda c=c: ours(c), **{name: peer.step for name, peer in peers.items()}}.items():
            settle()
            answers[name] = take()
        chosen = windows[chunk_of == c]
        for name, answer in answers.items():
            if name in peers:
                counted = offsets[:-1] >= chosen.score_from[:, None]
                differences[name].append(float(answer["scores"][counted].sum(dtype=np.float64) / book.sums[c, 0] - 1))
            if c:
                samples[name].append({k: answer[k] for k in ("wall_s", "cpu_s", "score_s", "train_s")})
            print(f"chunk {c}, {name}: {answer['score_s']:.2f} s scored, {answer['train_s']:.2f} s trained", flush=True)
    for peer in peers.values():
        peer.close()
    total = {n: {k: sum(s[k] for s in taken) for k in taken[0]} for n, taken in samples.items()}
    return surroundings(mesh) | {
        "recipe": recipe.name,
        "attention": config.attention,
        "dtype": config.dtype,
        "windows_per_chunk": int(np.count_nonzero(chunk_of == 1)),
        "sequences_per_chunk": sequences * settings.epochs,
        "chunks": samples,
        "jax_over_torch": {n: {k: total["jax"][k] / total[n][k] for k in total[n]} for n in peers},
        "difference": differences,
    }


def main(argv: list[str]) -> int:
    recipe, options = parse(argv, Options(), "Score-first test-time training beside PyTorch.")
    split_cpu(options.devices, recipe.data.batch_shape[0])
    result = measure(recipe, options)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    of_chunk = f"{result['windows_per_chunk']} windows scored, {result['sequences_per_chunk']} sequences trained on"
    print(f"{recipe.name} on {result['device']}, per chunk {of_chunk}")
    for name, ratio in result["jax_over_torch"].items():
        print(
            f"JAX / PyTorch {name}: {ratio['wall_s']:.3f} (cpu {ratio['cpu_s']:.3f}; scoring {ratio['score_s']:.3f}, training "
            f"{ratio['train_s']:.3f}); sums of scores differ by {', '.join(f'{d:.1e}' for d in result['difference'][name])}"
        )
    return 0


if __name__ == "__main__":
    run(main)
