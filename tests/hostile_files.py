"""Files of every kind that the commands read, altered: each is read or refused with one line, whatever is in it.

    python tests/hostile_files.py COUNT SEED

tries COUNT of them with 1 GiB of memory to spare and prints the outcomes as JSON.
"""

import collections
import importlib.util
import io
import json
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_runs
import numpy as np
from forgery import HOSTILE, _alter
from tiny_recipes import build_text, tiny

from golf_jax.config import GolfError, to_dict
from golf_jax.data.documents import read_documents
from golf_jax.data.shards import load_val_tokens
from golf_jax.data.tokenizer import Tokenizer, byte_tables
from golf_jax.data.verify import verify_directory
from golf_jax.files import json_rows, sealed
from golf_jax.interop.conformity import problems
from golf_jax.interop.packed import read_checkpoint, read_packed
from golf_jax.interop.reference import Set, read_npz
from golf_jax.interop.safetensors import write_safetensors
from golf_jax.options import Author
from golf_jax.proof.claims import read_claims
from golf_jax.proof.own import check_own
from golf_jax.proof.submission import Finished, claims
from golf_jax.reporting.compare import groups, runs_csv
from golf_jax.reporting.contents import sections
from golf_jax.reporting.measure import Again
from golf_jax.reporting.page import page
from golf_jax.reporting.record import read_record, read_records
from golf_jax.training.resume import devices_of, stored_recipe

Read = Callable[[Path], Any]
REFERENCE = Path(__file__).parent / "reference/pr638.npz"


def use_tokenizer(path: Path) -> None:
    model = Tokenizer(path)
    byte_tables(model.processor)
    model.decode(model.encode("some text 12"))
    model.changes()


def claims_of(path: Path) -> None:
    json.dumps(claims([Finished.read(path)], [], Author("a", "b"), False, "2026-01-01"), allow_nan=False)


def shown(paths: list[Path]) -> str:
    """As a report has them, without its figures, and as a sweep does."""
    records, nothing = read_records(paths), Again()
    runs_csv(groups(records))
    return page("title", sections(records, {}, nothing))


def use_set(path: Path) -> None:
    problems(path)
    for case in Set(path).cases("params"):
        assert case.params


class Kind:
    """Genuine files of one kind, and what reads them. `json`: a value inside may be exchanged, not only bytes."""

    def __init__(self, files: dict[str, bytes], altered: str, read: Read, json: bool = False, seal: bool = False) -> None:
        self.files, self.altered, self.read, self.json, self.seal = files, altered, read, json, seal

    def mutated(self, rng: np.random.Generator) -> bytes:
        data = self.files[self.altered]
        pick = lambda items: items[int(rng.integers(len(items)))]  # noqa: E731
        if self.json and rng.random() < 0.7:
            value = json.loads(data)
            for _ in range(1 + int(rng.integers(3))):
                _alter(value, rng, pick)
            value = sealed(value) if self.seal and isinstance(value, dict) and rng.random() < 0.5 else value
            return json.dumps(value).encode("utf8", "surrogatepass")
        altered = bytearray(data)
        for _ in range(1 + int(rng.integers(4))):
            at = int(rng.integers(max(len(altered), 1)))
            action = rng.integers(5)
            if action == 0:
                del altered[at:]
            elif action == 1:
                altered[at : at + int(rng.integers(9))] = pick([b"[" * 3000, b"9" * 400, b"NaN", b"\xff\xfe", b"", b"\0" * 64, b'"', b"-1"])
            elif action == 2:
                altered += altered[at : at + 200]
            else:
                altered[at : at + 1] = bytes([int(rng.integers(256))])
        return bytes(altered)


def small_reference() -> bytes:
    """The parameters of a portable set: little to read, all of its structure."""
    arrays = read_npz(REFERENCE)
    about = json.loads(str(arrays["reference"]))
    about["sections"] = {"params": about["sections"]["params"]}
    out = io.BytesIO()
    kept = {key: value for key, value in arrays.items() if key.startswith("params/")}
    np.savez_compressed(out, reference=np.array(json.dumps(about)), **kept)
    return out.getvalue()


def kinds(root: Path) -> dict[str, Kind]:
    text = build_text(root / "text")
    files = {path.name: path.read_bytes() for path in text.iterdir()}
    recipe = tiny("pr1182")  # on no text: what is asked of it again is not these readers'
    more = {"seconds": 1.0, "lr_factor": 1.0, "momentum": 0.9, "grad_norm": 1.0}
    rows = [{"event": "train", "step": step, "loss": 2.0, **more} for step in range(3)]
    run = {
        "config.json": json.dumps(to_dict(recipe)).encode(),
        "environment.json": json.dumps(made_runs.ENVIRONMENT).encode(),
        "stages.json": json.dumps(sealed(made_runs.stages())).encode(),
        "result.json": json.dumps(made_runs.result()).encode(),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "log.txt": b"step:1/2 train_loss:2.0 train_time:10ms\n",
    }
    write_safetensors({"tok_emb.weight": np.ones((4, 2), np.float32), "x": np.ones(3, np.float16)}, root / "a.safetensors")
    said = {
        "name": "x",
        "val_bpb": 1.1,
        "val_loss": 2.0,
        "bytes_total": 15_000_000,
        "seeds": [1, 2],
        "seed_results": {"1": {"val_bpb": 1.1}},
    }
    torch_kinds = {}
    if importlib.util.find_spec("torch"):
        import torch

        state, out = {"model": {"tok_emb.weight": torch.ones(4, 2), "x": torch.ones(3, dtype=torch.bfloat16)}}, io.BytesIO()
        torch.save(state, out)
        torch_kinds["checkpoint"] = Kind({"a.pt": out.getvalue()}, "a.pt", lambda path: read_checkpoint(path / "a.pt"))
        quantized, out = (
            {"w": {"a.q": torch.ones(2, 2, dtype=torch.int8), "a.scale": torch.ones(2)}, "m": {"a": {"type": "int6"}}},
            io.BytesIO(),
        )
        torch.save(quantized, out)
        torch_kinds["packed"] = Kind(
            {"a.ptz": zlib.compress(out.getvalue())}, "a.ptz", lambda path: read_packed((path / "a.ptz").read_bytes())
        )
    own: Read = lambda path: check_own(path, rerun=False)  # noqa: E731
    return {
        "tokenizer": Kind(files, "tokenizer.model", lambda path: use_tokenizer(path / "tokenizer.model")),
        "manifest": Kind(files, "manifest.json", verify_directory, json=True),
        "shard": Kind(files, "val_000000.bin", lambda path: load_val_tokens(path / "val_*.bin", 300)),
        "config": Kind(run, "config.json", lambda path: (stored_recipe(path), read_record(path)), json=True),
        "environment": Kind(run, "environment.json", lambda path: (devices_of(path), own(path), claims_of(path)), json=True),
        "stages": Kind(run, "stages.json", lambda path: shown([path, path]), json=True, seal=True),
        "result": Kind(run, "result.json", lambda path: (own(path), claims_of(path)), json=True),
        "metrics": Kind(run, "metrics.jsonl", lambda path: (json_rows(path / "metrics.jsonl"), read_record(path))),
        "set": Kind({"set.npz": small_reference()}, "set.npz", lambda path: use_set(path / "set.npz")),
        "safetensors": Kind({"a.safetensors": (root / "a.safetensors").read_bytes()}, "a.safetensors",
                            lambda path: read_checkpoint(path / "a.safetensors")),
        "claims": Kind({"submission.json": json.dumps(said).encode()}, "submission.json",
                       lambda path: read_claims(path / "submission.json", "x"), json=True),
        "documents": Kind({"a.jsonl": b'{"text": "one"}\n{"text": "two"}\n'}, "a.jsonl",
                          lambda path: list(read_documents([path / "a.jsonl"]))),
    } | torch_kinds  # fmt: skip


def outcome(kind: Kind, data: bytes, folder: Path) -> str:
    """`read` or `refused`; anything but a GolfError of one printable line passes through."""
    (folder / kind.altered).write_bytes(data)
    try:
        kind.read(folder)
    except GolfError as error:
        if not str(error).isprintable() or len(str(error)) > 1000:
            raise AssertionError(f"message: {str(error)[:300]!r}") from None
        return "refused"
    return "read"


def run(count: int, seed: int, root: Path) -> dict[str, Any]:
    """Outcomes by kind; a traceback counts under its own text, with the file that caused it in `root`."""
    rng, report, slowest = np.random.default_rng(seed), {}, 0.0
    found = kinds(root)
    for name, kind in found.items():
        folder, seen = root / name, collections.Counter()
        folder.mkdir()
        for file, data in kind.files.items():
            (folder / file).write_bytes(data)
        assert outcome(kind, kind.files[kind.altered], folder) == "read", name
        for _ in range(count // len(found)):
            data, begin = kind.mutated(rng), time.perf_counter()
            try:
                seen[outcome(kind, data, folder)] += 1
            except (Exception, AssertionError) as error:
                text = f"{type(error).__name__}: {error}"[:200]
                seen[text] += 1
                (root / f"{name}-{len(seen)}").write_bytes(data)
            slowest = max(slowest, time.perf_counter() - begin)
        report[name] = dict(seen)
    return {"outcomes": report, "slowest_seconds": round(slowest, 3)}


if __name__ == "__main__":
    assert HOSTILE
    count, seed = map(int, sys.argv[1:3])
    root = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(tempfile.mkdtemp())
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
    print(json.dumps(run(count, seed, root), indent=1))
