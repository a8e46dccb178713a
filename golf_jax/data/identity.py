"""Which data a run trained on and was scored on: a digest for environment, checkpoint, artifact and result."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from golf_jax.config import GolfError
from golf_jax.data.manifest import NAME, hashes, read_manifest, sha256_file
from golf_jax.data.shards import HEADER_BYTES, Shard

SAMPLES, SAMPLE_BYTES = 32, 1 << 16  # evenly spread, with the first and the last bytes; a shard up to their sum is read whole
WHOLE_BYTES = 1 << 29  # files that are no more together are hashed whole, in about a second


def identify(tokenizer_sha256: str, train: Sequence[Path], val: Sequence[Path]) -> dict[str, Any]:
    """JSON-able identity: tokenizer and, per split and shard, name, size, digest of header and sampled content.

    `sha256` of the whole file goes with it where all files together have at most WHOLE_BYTES, else where a manifest of this package lies
    beside it: that is taken over unread, unless the shard was written to after the manifest. `digest` sums all of it up in 16 hex digits.
    Costs 2 MB of reading per shard that is not hashed. GolfError when a file cannot be read or is not the manifest's.
    """
    whole = sum(path.stat().st_size for path in {*train, *val} if path.exists()) <= WHOLE_BYTES
    identity: dict[str, Any] = {"tokenizer": tokenizer_sha256, "train": _shards(train, whole), "val": _shards(val, whole)}
    return identity | {"digest": hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two identities, in a few words; empty if nothing does."""
    if before.get("tokenizer") != now["tokenizer"]:
        return f"tokenizer: SHA-256 {str(before.get('tokenizer'))[:12]} then, {now['tokenizer'][:12]} now"
    for split in ("train", "val"):
        then = {entry["name"]: entry for entry in before.get(split, [])}
        here = {entry["name"]: entry for entry in now[split]}
        if names := sorted(then.keys() ^ here.keys()):
            return f"{split} shards: {', '.join(names[:3])} only {'then' if names[0] in then else 'now'}"
        for name, entry in here.items():
            if fields := [field for field in entry if field in then[name] and entry[field] != then[name][field]]:
                return f"{split} shard {name}: another {', '.join(fields)}"
    return ""


def trained_on(run: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What is to be said where validation files of the text `here` were trained on in a `run` (identities); empty where none was."""
    then = {(entry["bytes"], entry["content"]): entry["name"] for entry in run["train"]}
    pairs = [(entry["name"], then.get((entry["bytes"], entry["content"]))) for entry in here["val"]]
    if not (found := [pair for pair in pairs if pair[1]]):
        return ""
    one = f"{found[0][0]} is its {found[0][1]}"
    return f"WARNING: the model was trained on {len(found)} of the {len(pairs)} files that it is scored on ({one}): this is no validation"


def _shards(paths: Sequence[Path], whole: bool) -> list[dict[str, Any]]:
    manifests: dict[Path, dict[str, str]] = {}
    entries = []
    for path in paths:
        if path.parent not in manifests:
            manifests[path.parent] = _listed(path.parent)
        entry = {"name": path.name, **_sample(path)}
        listed = manifests[path.parent].get(path.name)
        try:
            read = whole or listed and path.stat().st_mtime_ns > (path.parent / NAME).stat().st_mtime_ns
            found = sha256_file(path) if read else listed
        except OSError as error:
            raise GolfError(f"{path}: cannot be read ({error.strerror})") from error
        if listed and found != listed:
            raise GolfError(f"{path}: sha256 differs from the manifest's; the file was altered; fetch or build it again")
        entries.append(entry | ({"sha256": found} if found else {}))
    return entries


def _listed(directory: Path) -> dict[str, str]:
    if not (directory / NAME).is_file():
        return {}
    try:
        return hashes(read_manifest(directory / NAME))
    except GolfError:
        return {}  # of another program; `verify` is where a manifest has to be sound


def watch(shards: Iterable[Any], known: Sequence[Mapping[str, Any]]) -> None:
    """Have open shards whose file something touches compared with what an identity says of them (`known`: its entries of one split)."""
    entries = {entry["name"]: entry for entry in known}
    for shard in shards:
        if isinstance(shard, Shard) and (entry := entries.get(shard.path.name)):
            shard.still = partial(_is_still, entry)


def _is_still(entry: Mapping[str, Any], descriptor: int) -> bool:
    found = _sample_of(descriptor)
    if "sha256" in entry:
        with open(descriptor, "rb", closefd=False) as file:
            file.seek(0)
            found["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found.items() <= entry.items()


def _sample(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb", buffering=0) as file:
            return _sample_of(file.fileno())
    except OSError as error:
        raise GolfError(f"{path}: cannot be read ({error.strerror})") from error


def _sample_of(descriptor: int) -> dict[str, Any]:
    size = os.fstat(descriptor).st_size
    digest = hashlib.sha256(os.pread(descriptor, HEADER_BYTES, 0))
    last = max(size - SAMPLE_BYTES, 0)
    for number in range(SAMPLES):
        digest.update(os.pread(descriptor, SAMPLE_BYTES, last * number // (SAMPLES - 1)))
    return {"bytes": size, "content": digest.hexdigest()[:32]}
