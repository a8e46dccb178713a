"""Artifacts that somebody made up: tables, streams and bytes altered behind a valid hash.

    python tests/forgery.py COUNT SEED

loads COUNT of them with 1 GiB of memory to spare and prints the outcomes as JSON.
"""

import collections
import copy
import hashlib
import json
import resource
import sys
import time
from typing import Any

import numpy as np

from golf_jax.artifact.compressors import COMPRESSORS
from golf_jax.artifact.container import _PREFIX, inspect
from golf_jax.artifact.model import load_model, pack_model
from golf_jax.config import DataConfig, GolfError, LowRankConfig, ModelConfig, QuantConfig, QuantRule, Recipe
from golf_jax.model.params import leaves

HOSTILE: list[Any] = [None, True, False, -1, 0, 1, 7, 10**6, 2**31 - 1, 2**31, 10**30, 10**300, 1.5, -0.0, 1e308, "", "x", "7", "float16",
                      "int8", "blocks.0.attn.c_k.weight",
           "\x1b[31mred\x07\n", "\ud800", "n" * 5000, [], [0, 2**28], [1] * 70, {}, {"a": {}}, [2**30, 2**30]]  # fmt: skip


def seal(head: bytes, raw_length: int, streams: list[bytes], compressor: str) -> bytes:
    """A file with a valid prefix and hash around anything."""
    body = head + b"".join(streams)
    number, start = COMPRESSORS[compressor].number, _PREFIX.size + 32
    prefix = _PREFIX.pack(b"GOLF", 1, number, start + len(body), len(head), min(raw_length, 2**32 - 1))
    return prefix + hashlib.sha256(prefix + body).digest() + body


def forge(table: Any, streams: list[bytes], compressor: str = "zstd") -> bytes:
    raw = json.dumps(table).encode()
    return seal(COMPRESSORS[compressor].compress(raw, 1), len(raw), streams, compressor)


def genuine(compressor: str = "zstd") -> bytes:
    """A tiny model, packed as a run does."""
    model = ModelConfig(vocab_size=64, num_layers=2, width=16, num_heads=2, num_kv_heads=1, bigram_buckets=8, bigram_dim=8)
    quant = QuantConfig(rules=(QuantRule("", "float16", max_numel=64), QuantRule("", "int6_row")), compressor=compressor, level=3,
                        lowrank=LowRankConfig(rank=2, top=2, group=16))  # fmt: skip
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in leaves(model).items()}
    return pack_model(Recipe("tiny", model=model, quant=quant, data=DataConfig(seq_len=64)), params, "0" * 64, code_bytes=0).data


def parts_of(data: bytes) -> tuple[dict[str, Any], list[bytes], str]:
    opened = inspect(data)
    rows = [e.line() for e in opened.entries]
    return {"header": opened.header, "tensors": rows, "sections": [len(s) for s in opened.stored]}, opened.stored, opened.compressor


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One forgery of `data`: a value somewhere in the table, a stream, or bytes of the whole."""
    table, streams, compressor = parts_of(data)
    streams = list(streams)
    pick = lambda items: items[int(rng.integers(len(items)))]  # noqa: E731
    kind = rng.integers(10)
    if kind < 6:
        for _ in range(1 + int(rng.integers(3))):
            _alter(table, rng, pick)
    elif kind < 8:
        i = int(rng.integers(len(streams)))
        stream = bytearray(streams[i])
        action = rng.integers(4)
        if action == 0:
            streams[i] = bytes(stream[: int(rng.integers(len(stream)))])
        elif action == 1:
            streams[i] = COMPRESSORS[compressor].compress(bytes(1 << int(rng.integers(24))), 1)
        else:
            for _ in range(1 + int(rng.integers(4))):
                stream[int(rng.integers(len(stream)))] = int(rng.integers(256))
            streams[i] = bytes(stream)
        table["sections"] = [len(s) for s in streams]
    elif kind == 8:
        raw = bytearray(json.dumps(table).encode())
        for _ in range(1 + int(rng.integers(3))):
            at = int(rng.integers(len(raw)))
            raw[at : at + int(rng.integers(3))] = pick([b"[" * 3000, b"9" * 5000, b"NaN", b"1e999", b"\xff", b"", b"-", b'"', b"true"])
        return seal(COMPRESSORS[compressor].compress(bytes(raw), 1), len(raw), streams, compressor)
    else:
        altered = bytearray(data)
        for _ in range(1 + int(rng.integers(4))):
            altered[int(rng.integers(len(altered)))] = int(rng.integers(256))
        if rng.integers(2):
            prefix, body = bytes(altered[: _PREFIX.size]), bytes(altered[_PREFIX.size + 32 :])
            return prefix + hashlib.sha256(prefix + body).digest() + body
        return bytes(altered)
    return forge(table, streams, compressor)


def _alter(node: Any, rng: np.random.Generator, pick: Any) -> None:
    """Replace, remove, add or exchange something at a random place of nested lists and dictionaries."""
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return
        key = pick(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.85:
            node = node[key]
            continue
        action = rng.integers(8)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[pick(["num_layers", "loop_repeats", "mlp_ratio", "width", "vocab_size", "bigram_dim", "rope_base"])] = copy.deepcopy(
                pick(HOSTILE)
            )
        elif action == 2 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        elif action == 3 and isinstance(node[key], int):
            node[key] = node[key] * pick([-1, 2, 10, 1000]) + pick([-1, 0, 1])
        else:
            node[key] = copy.deepcopy(pick(HOSTILE))
        return


def outcome(data: bytes) -> str:
    """`loaded` or `refused`; anything but a GolfError of one line passes through, as does a weight that is not finite."""
    try:
        loaded = load_model(data)
    except GolfError as error:
        message = str(error)
        if not message.isprintable() or len(message) > 1000:
            raise AssertionError(f"message: {message!r}") from None
        return "refused"
    if not all(np.isfinite(p.astype(np.float32)).all() for p in loaded.params.values()):
        raise AssertionError("non-finite weights were loaded")
    return "loaded"


def run(count: int, seed: int) -> dict[str, Any]:
    originals = [genuine(name) for name in COMPRESSORS]
    rng = np.random.default_rng(seed)
    seen, slowest = collections.Counter(), 0.0
    for i in range(count):
        data = mutated(originals[i % len(originals)], rng)
        begin = time.perf_counter()
        try:
            seen[outcome(data)] += 1
        except (Exception, AssertionError) as error:
            seen[f"{type(error).__name__}: {error}"[:200]] += 1
        slowest = max(slowest, time.perf_counter() - begin)
    return {"outcomes": dict(seen), "slowest_seconds": round(slowest, 3)}


if __name__ == "__main__":
    count, seed = map(int, sys.argv[1:])
    genuine()  # everything is imported and running before the memory is limited
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
    print(json.dumps(run(count, seed)))
