"""Bytes and seconds of packing the integer codes of PR 2135 at full size (35,913,728 of them), by our coder and by general compressors.

    python benchmarks/code_packing.py [--kind gaussian|trained] [--only rans,zstd,brotli,lzma,lrzip] [--out FILE]

FILE gets each result as it comes, beside what it has of the same codes; lrzip takes minutes.

gaussian: weights independent and normal, so a row's codes have the spread that its clip in standard deviations leaves.
trained: rows and columns of lognormal spread (0.35 and 0.25 of a natural logarithm) and heavy tails (Student t, 8 degrees of freedom),
rounded with the record's scale per row.
Every compressor gets the layout that suits it: ours the matrices of one role, lrzip (where it is installed) the record's, one file of all
matrices, rows by similarity (natural order in the token table, for time) and column by column, the others that same file. Its reader needs
the order of the rows, too, which the record's frame stores with two bytes per row (`row_order_bytes`); ours has none.
Seconds are of processor time, one core (lrzip in one block, with one thread: with more it packs blocks apart, and worse).
"""

import argparse
import json
import lzma
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import zstandard
from step_time import cpu_name

from golf_jax.artifact.compressors import COMPRESSORS
from golf_jax.interop.pgrp import row_order

LAYERS, WIDTH, KV, HIDDEN, VOCAB = 11, 512, 256, 2048, 8192
ROLES = {
    "attn.c_q": ((WIDTH, WIDTH), 13.0, 31), "attn.c_k": ((KV, WIDTH), 13.0, 31), "attn.c_v": ((KV, WIDTH), 13.0, 31),
    "attn.proj": ((WIDTH, WIDTH), 13.0, 31), "mlp.fc": ((HIDDEN, WIDTH), 11.5, 31), "mlp.proj": ((WIDTH, HIDDEN), 11.5, 31),
    "tok_emb": ((VOCAB, WIDTH), 14.0, 63),
}  # fmt: skip


def make(kind: str, layers: int = LAYERS, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Codes int8 [R, C] of every matrix, by role; with fewer layers the token table has fewer rows, in proportion."""
    rng = np.random.default_rng(seed)
    found = {role: [codes(kind, rng, *about) for _ in range(layers)] for role, about in ROLES.items() if role != "tok_emb"}
    (rows, columns), sigmas, high = ROLES["tok_emb"]
    return found | {"tok_emb": [codes(kind, rng, (rows * layers // LAYERS, columns), sigmas, high)]}


def codes(kind: str, rng: np.random.Generator, shape: tuple[int, int], sigmas: float, high: int) -> np.ndarray:
    if kind == "gaussian":
        w = rng.standard_normal(shape, np.float32)
    else:
        w = rng.standard_t(8, shape).astype(np.float32)
        w *= np.exp(0.35 * rng.standard_normal((shape[0], 1), np.float32)) * np.exp(0.25 * rng.standard_normal((1, shape[1]), np.float32))
    scale = (sigmas * w.std(axis=1, ddof=1) / high).astype(np.float16).astype(np.float32)
    return np.clip(np.rint(w / scale[:, None]), -high, high).astype(np.int8)


def record_layout(groups: dict[str, list[np.ndarray]]) -> bytes:
    parts = []
    for role, matrices in groups.items():
        for m in matrices:
            parts.append((m if role == "tok_emb" else m[row_order(m)]).T.tobytes())
    return b"".join(parts)


def lrzip(data: bytes) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        source, packed, back = (Path(folder, name) for name in ("codes", "codes.lrz", "back"))
        source.write_bytes(data)
        begin = children()
        subprocess.run(["lrzip", "-z", "-L", "9", "-p", "1", "-q", "-o", str(packed), str(source)], check=True)
        middle = children()
        subprocess.run(["lrzip", "-d", "-p", "1", "-q", "-o", str(back), str(packed)], check=True)
        assert back.read_bytes() == data
        return {"bytes": packed.stat().st_size, "encode_seconds": middle - begin, "decode_seconds": children() - middle}


def children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(call: Callable[[], bytes]) -> tuple[bytes, float]:
    begin = time.process_time()
    return call(), time.process_time() - begin


def ours(groups: dict[str, list[np.ndarray]]) -> dict[str, float]:
    by, total, encode, decode = COMPRESSORS["rans"], 0, 0.0, 0.0
    assert by.encode and by.decode
    for matrices in groups.values():
        encoder, decoder = by.encode, by.decode
        stored, seconds = timed(lambda m=matrices, e=encoder: e(m))
        encode += seconds
        back, seconds = timed(lambda s=stored, m=matrices, d=decoder: d(s, [x.shape for x in m]))  # pyright: ignore[reportArgumentType]
        decode += seconds
        assert back == b"".join(m.tobytes() for m in matrices)
        total += len(stored)
    return {"bytes": total, "encode_seconds": encode, "decode_seconds": decode}


def entropy_bytes(groups: dict[str, list[np.ndarray]]) -> float:
    """Order-0 entropy, one histogram per role."""
    total = 0.0
    for matrices in groups.values():
        counts = np.bincount(np.concatenate([m.reshape(-1) for m in matrices]).view(np.uint8), minlength=256)
        counts = counts[counts > 0]
        total += float((counts * np.log2(counts.sum() / counts)).sum()) / 8
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="trained", choices=("gaussian", "trained"))
    parser.add_argument("--only", default="rans,zstd,brotli,lzma,lrzip")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a quick look")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    groups, wanted = make(args.kind, args.layers), args.only.split(",")
    count = sum(m.size for ms in groups.values() for m in ms)
    data = record_layout(groups) if set(wanted) - {"rans"} else b""
    packers: dict[str, Callable[[], dict[str, float]]] = {
        "entropy by role": lambda: {"bytes": entropy_bytes(groups)},
        "rans (ours)": lambda: ours(groups),
        "zstd 22": lambda: general(lambda: zstandard.ZstdCompressor(level=22).compress(data), zstandard.ZstdDecompressor().decompress),
        "brotli 11": lambda: general(lambda: brotli.compress(data, quality=11, lgwin=24), brotli.decompress),
        "lzma 9": lambda: general(lambda: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
        "lrzip -z -L 9": lambda: lrzip(data),
    }
    for name, pack in packers.items():
        if name.split()[0] not in (*wanted, "entropy"):
            continue
        if name.startswith("lrzip") and not shutil.which("lrzip"):
            print("lrzip: not installed, not compared")
            continue
        row: dict[str, Any] = pack() | {"date": time.strftime("%Y-%m-%d")}
        times = ", ".join(f"{k.split('_')[0]} {v:.1f} s" for k, v in row.items() if k.endswith("seconds"))
        print(f"{args.kind:9} {name:16} {row['bytes']:13,.0f} bytes  {8 * row['bytes'] / count:.4f} bits per code  {times}", flush=True)
        if args.out:
            write(Path(args.out), args.kind, groups, name, row)


def general(pack: Callable[[], bytes], unpack: Callable[[bytes], bytes]) -> dict[str, float]:
    stored, encode = timed(pack)
    _, decode = timed(lambda: unpack(stored))
    return {"bytes": len(stored), "encode_seconds": encode, "decode_seconds": decode}


def write(path: Path, kind: str, groups: dict[str, list[np.ndarray]], name: str, row: dict[str, Any]) -> None:
    matrices = [m for ms in groups.values() for m in ms]
    count = sum(m.size for m in matrices)
    old = json.loads(path.read_text()) if path.exists() else {}
    results = old["results"] if (old.get("kind"), old.get("codes")) == (kind, count) else {}
    version = subprocess.run(["lrzip", "--version"], capture_output=True, text=True) if shutil.which("lrzip") else None
    found = {
        "command": f"python benchmarks/code_packing.py --kind {kind} --out {path}",
        "device": cpu_name(),
        "versions": {
            "python": platform.python_version(), "numpy": np.__version__, "zstandard": zstandard.__version__,
            "brotli": brotli.__version__, "lrzip": (version.stdout + version.stderr).split()[-1] if version else "",
        },
        "kind": kind, "codes": count, "row_order_bytes": sum(2 * len(m) for m in matrices), "results": results | {name: row},
    }  # fmt: skip
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
