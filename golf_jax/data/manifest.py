"""manifest.json beside the shards: what a data directory holds, so that it can be checked later and elsewhere."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from golf_jax.config import GolfError, parse_json
from golf_jax.data.tokenizer import ByteTables, count_bytes
from golf_jax.files import read_bytes, write_atomic

FORMAT = "golf_jax.data/1"
NAME = "manifest.json"
MAX_BYTES = 1 << 26
COUNTS = ("documents", "bytes", "repeated", "blank", "left_out_bytes", "changed")
"""Of the text that the shards were built from."""


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path, tokens: int) -> dict[str, Any]:
    """How a manifest lists one shard."""
    return {"name": path.name, "tokens": tokens, "sha256": sha256_file(path)}


def text_bytes(tables: ByteTables, tokens: np.ndarray, chunk: int = 1 << 24) -> int:
    """UTF-8 bytes of text that `tokens` [n] stand for; the first token counts nothing. Works in pieces of `chunk` tokens."""
    previous, targets = tokens[:-1], tokens[1:]
    pieces = (slice(start, start + chunk) for start in range(0, len(targets), chunk))
    return sum(int(count_bytes(tables, previous[piece], targets[piece]).sum()) for piece in pieces)


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Reads a manifest of this format; GolfError for anything else, also for names that lead out of the directory."""
    path = Path(path)
    raw = read_bytes(path, MAX_BYTES)
    try:
        manifest = parse_json(raw)
    except GolfError as error:
        raise GolfError(f"{path}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise GolfError(f"{path}: not a manifest of format {FORMAT}")
    _check(path, manifest, "", {"tokenizer": dict, "train": dict, "val": dict})
    _check(path, manifest["tokenizer"], "tokenizer.", {"file": str, "sha256": str, "vocab_size": int})
    if not _is_name(manifest["tokenizer"]["file"]):
        raise GolfError(f"{path}: tokenizer.file {manifest['tokenizer']['file']!a} names no file in the directory; give --tokenizer MODEL")
    if "text" in manifest:
        _check(path, manifest, "", {"text": dict})
        _check(path, manifest["text"], "text.", {field: int for field in set(COUNTS) & set(manifest["text"])})
    for split in ("train", "val"):
        _check(path, manifest[split], f"{split}.", {"tokens": int, "files": list})
        for field in {"documents", "bytes"} & set(manifest[split]):
            _check(path, manifest[split], f"{split}.", {field: int})
        for kind in {"files", "sidecars"} & set(manifest[split]):
            _check(path, manifest[split], f"{split}.", {kind: list})
            for number, entry in enumerate(manifest[split][kind]):
                _check(path, entry, f"{split}.{kind}.{number}.", {"name": str, "tokens": int, "sha256": str})
                if not _is_name(entry["name"]):
                    raise GolfError(f"{path}: {split}.{kind}.{number}.name {entry['name']!a} names no file in the directory")
    return manifest


def _is_name(text: str) -> bool:
    """Whether `text` names a file of a directory itself, on every system."""
    return text.isprintable() and text not in ("", ".", "..") and not set(text) & set("/\\:")


def _check(path: Path, value: Any, where: str, fields: dict[str, type]) -> None:
    if not isinstance(value, dict):
        raise GolfError(f"{path}: {where.rstrip('.')} must be an object")
    for field, kind in fields.items():
        if type(value.get(field)) is not kind:
            raise GolfError(f"{path}: {where}{field} is missing or no {kind.__name__}")


def hashes(manifest: dict[str, Any]) -> dict[str, str]:
    """Name -> SHA-256 of all shards and byte sidecars that a manifest lists."""
    lists = [manifest[split].get(kind, []) for split in ("train", "val") for kind in ("files", "sidecars")]
    return {entry["name"]: entry["sha256"] for entries in lists for entry in entries}


def damage(directory: Path) -> str:
    """In what `directory` differs from its manifest (a file altered, missing, too many); empty when it does not. Reads every byte."""
    try:
        manifest = read_manifest(directory / NAME)
        expected = hashes(manifest)
        expected[manifest["tokenizer"]["file"]] = manifest["tokenizer"]["sha256"]
        found = {path.name for path in directory.iterdir()} - {NAME}
        if found != set(expected):
            return f"{directory}: files {sorted(found ^ set(expected))[:3]} are missing or not in the manifest"
        for name, digest in expected.items():
            if not (directory / name).is_file() or sha256_file(directory / name) != digest:  # a FIFO would block for ever
                return f"{directory / name}: differs from the manifest"
        return ""
    except (GolfError, OSError) as error:
        return str(error)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> Path:
    """Writes `manifest` as `directory`/manifest.json, all or nothing."""
    return write_atomic(directory / NAME, json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")
