"""manifest.json beside the shards: what a data directory holds, so that it can be checked later and elsewhere."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from golf_jax.config import GolfError
from golf_jax.data.tokenizer import ByteTables, count_bytes
from golf_jax.files import write_atomic

FORMAT = "golf_jax.data/1"
NAME = "manifest.json"


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
    """Reads a manifest of this format; GolfError for anything else."""
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise GolfError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise GolfError(f"{path}: not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise GolfError(f"{path}: not a manifest of format {FORMAT}")
    return manifest


def write_manifest(directory: Path, manifest: dict[str, Any]) -> Path:
    """Writes `manifest` as `directory`/manifest.json, all or nothing."""
    return write_atomic(directory / NAME, (json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n").encode())
