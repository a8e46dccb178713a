"""Fetches the official FineWeb export of the challenge, as its manifest lists it, and checks every file.

In the dataset repository everything lies under `datasets/`: manifest.json (lists `datasets` and `tokenizers`),
datasets/fineweb10B_<variant>/fineweb_{train,val}_NNNNNN.bin, tokenizers/. Here the same tree is written without that prefix.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from golf_jax.config import GolfError, named, parse_json
from golf_jax.data.manifest import file_entry, sha256_file, text_bytes, write_manifest
from golf_jax.data.shards import MAX_TOKENS, find_shards, load_val_tokens, open_shard
from golf_jax.data.sidecar import beside, find_sidecars, load_sidecar
from golf_jax.data.tokenizer import Tokenizer, byte_tables
from golf_jax.files import read_bytes, write_atomic

REPO = "willdepueoai/parameter-golf"
CASEOPS_REPO = "romeerp/parameter-golf-caseops-v1"  # of PR 2135: the same layout, byte counts beside the validation shards
PREFIX = "datasets"
INDEX = f"{PREFIX}/manifest.json"
MAX_INDEX, MOST_FILES = 1 << 26, 10_000  # bytes of the manifest; files of one split


class Hub(Protocol):
    """Where files come from; tests put a local directory in its place."""

    def fetch(self, path: str, into: Path) -> Path:
        """Brings the repository's file `path` below `into` (taking up an interrupted transfer); returns where it lies."""
        ...

    def sha256(self, paths: list[str]) -> dict[str, str]:
        """The digests the hub knows for `paths` (large files only)."""
        ...


class HuggingFaceHub:
    """A dataset repository, through huggingface_hub (progress bars, resume and retries are its own)."""

    def __init__(self, repo: str = REPO, revision: str | None = None) -> None:
        try:
            import huggingface_hub  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise GolfError("download needs huggingface_hub: pip install 'golf-jax[data]'") from error
        retries = logging.getLogger("huggingface_hub.utils._http")  # its other line repeats the address, and `_ask` tells the error
        retries.addFilter(lambda record: record.getMessage().startswith("Retrying"))
        self.hub, self.repo, self.revision = huggingface_hub, repo, revision

    def fetch(self, path: str, into: Path) -> Path:
        """See `Hub.fetch`."""
        return Path(self.hub.hf_hub_download(self.repo, path, repo_type="dataset", revision=self.revision, local_dir=into))

    def sha256(self, paths: list[str]) -> dict[str, str]:
        """See `Hub.sha256`."""
        infos = self.hub.HfApi().get_paths_info(self.repo, paths, repo_type="dataset", revision=self.revision)
        return {info.path: info.lfs.sha256 for info in infos if getattr(info, "lfs", None)}


def hub_of(variant: str, repo: str = "", revision: str | None = None) -> HuggingFaceHub:
    """The hub that has `variant`; `repo` names another one."""
    return HuggingFaceHub(repo or (CASEOPS_REPO if "caseops" in variant else REPO), revision)


def download(
    variant: str,
    directory: str | Path,
    train_shards: int = 80,
    hub: Hub | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Brings `variant` (sp1024, sp8192, sp8192_lossless_caps_caseops_v1_reserved, ...): tokenizer, all of validation, with its byte counts
    where text was transformed, and the first `train_shards` training shards.

    Returns the shards' folder. Files already there and sound are kept, so an interrupted download goes on where it stopped.
    GolfError for an unknown variant, too many shards, a file that is damaged after a fresh fetch, a validation set that is not
    as long as the official manifest says.
    """
    if not re.fullmatch(r"sp\d+(_\w*caseops\w*)?", variant):
        raise GolfError(f"variant {variant!r}: must be sp and a vocabulary size (sp1024, sp8192), with _..._caseops_... for CaseOps text")
    if train_shards < 0:
        raise GolfError(f"train_shards={train_shards}: must not be negative")
    transformed = "caseops" in variant
    hub, root = hub or hub_of(variant), Path(directory)
    index = _fetch_index(hub, root)
    dataset, tokenizer_path = _lookup(index, f"fineweb10B_{variant}")
    if not isinstance(stats := dataset.get("stats", {}), dict):
        raise GolfError(f"{INDEX}: stats of {dataset['name']} must be an object")
    if train_shards > (available := _count(stats, "files_train", MOST_FILES)):
        raise GolfError(f"{variant}: the export has {available} training shards, {train_shards} were asked for")
    folder = f"datasets/{dataset['name']}"
    names = [f"{folder}/fineweb_val_{number:06d}.bin" for number in range(_count(stats, "files_val", MOST_FILES))]
    names += [str(beside(Path(name))) for name in names] if transformed else []
    names += [f"{folder}/fineweb_train_{number:06d}.bin" for number in range(train_shards)]
    names = [tokenizer_path, *names]
    digests = _ask(hub.sha256, [f"{PREFIX}/{name}" for name in names])
    for number, name in enumerate(names, 1):
        digest = digests.get(f"{PREFIX}/{name}")
        kept, start = _problem(root / name, digest) is None, time.monotonic()
        if not kept:
            _bring(hub, root, name, digest)
        note = "already here" if kept else f"{time.monotonic() - start:.1f} s"
        log(f"[{number}/{len(names)}] {name}  {(root / name).stat().st_size / 1e6:,.1f} MB  {note}")
    return _write_local_manifest(root, folder, tokenizer_path, stats)


def _ask(call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the hub; whatever goes wrong there (network, access, a missing file) becomes one line."""
    try:
        return call(*arguments)
    except GolfError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise GolfError(f"download of {arguments[0]!s:.120} failed: {type(error).__name__}: {reason}; run again to resume") from error


def _bring(hub: Hub, root: Path, name: str, digest: str | None) -> None:
    fetched = _ask(hub.fetch, f"{PREFIX}/{name}", root / ".hub")
    if problem := _problem(fetched, digest):
        fetched.unlink(missing_ok=True)
        raise GolfError(f"{name}: damaged as fetched ({problem}); run again, or report it to the owners of the export")
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    os.replace(fetched, root / name)


def _problem(path: Path, digest: str | None) -> str | None:
    """Why `path` cannot be used, or None."""
    if not path.is_file() or not path.stat().st_size:
        return "missing or empty"
    if digest is not None and sha256_file(path) != digest:
        return "sha256 differs from the hub's"
    try:
        open_shard(path) if path.suffix == ".bin" else Tokenizer(path)
    except GolfError as error:
        return str(error)
    return None


def _fetch_index(hub: Hub, root: Path) -> dict[str, Any]:
    raw = read_bytes(_ask(hub.fetch, INDEX, root / ".hub"), MAX_INDEX)
    with named(f"{INDEX}: not the manifest of a FineWeb export"):
        index = parse_json(raw)
        for part in ("datasets", "tokenizers"):
            entries = index.get(part) if isinstance(index, dict) else None
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise GolfError(f"{part} must be a list of objects")
    write_atomic(root / "manifest.json", raw)
    return index


def _count(stats: dict[str, Any], name: str, most: int) -> int:
    """A number of the export's manifest, 0 where it is not there."""
    if type(value := stats.get(name, 0)) is not int or not 0 <= value <= most:
        raise GolfError(f"{INDEX}: {name} is {str(value)[:40]!a}; it must be a number of at most {most:,}")
    return value


def _lookup(index: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    dataset = next((entry for entry in index["datasets"] if entry.get("name") == name), None)
    if dataset is None:
        there = ", ".join(str(entry.get("name")) for entry in index["datasets"])
        raise GolfError(f"{name}: not in the export, which has {there}; --repo names another one")
    wanted = dataset.get("tokenizer_name")
    path = next((entry.get("model_path") for entry in index["tokenizers"] if entry.get("name") == wanted), None)
    if not isinstance(path, str) or not path:
        raise GolfError(f"{name}: the export's manifest names no SentencePiece model for it (tokenizer {str(wanted)[:80]!a})")
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise GolfError(f"{name}: the export's manifest places the tokenizer at {path!r}, outside of the export")
    return dataset, path


def _write_local_manifest(root: Path, folder: str, tokenizer_path: str, stats: dict[str, Any]) -> Path:
    directory, tokenizer = root / folder, Tokenizer(root / tokenizer_path)
    val = load_val_tokens(directory / "fineweb_val_*.bin", tokenizer.vocab_size)
    if "tokens_val" in stats and (expected := _count(stats, "tokens_val", MOST_FILES * MAX_TOKENS)) != len(val):
        raise GolfError(f"{directory}: validation has {len(val)} tokens, the export's manifest says {expected}")
    splits: dict[str, dict[str, Any]] = {}
    for split in ("train", "val"):  # all that is there: an earlier download may have brought more training shards
        files = [file_entry(path, len(open_shard(path))) for path in find_shards(directory / f"fineweb_{split}_*.bin")]
        splits[split] = {"tokens": sum(file["tokens"] for file in files), "files": files}
    sidecar = load_sidecar(directory / "fineweb_val_*.bin")
    splits["val"] |= {
        "documents": int((val == tokenizer.bos_id).sum()),
        "bytes": int(sidecar.counts[1:].sum(dtype=np.int64)) if sidecar else text_bytes(byte_tables(tokenizer.processor), val),
    }
    if sidecar:
        splits["val"]["sidecars"] = [file_entry(path, len(open_shard(path))) for path in find_sidecars(directory / "fineweb_val_*.bin")]
    model = write_atomic(directory / "tokenizer.model", tokenizer.model)  # a manifest names nothing outside its directory
    identity = {"file": model.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    write_manifest(directory, {"source": "FineWeb export", "split": "as published", "tokenizer": identity, **splits})
    return directory
