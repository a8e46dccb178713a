"""Is this data what it claims to be? Headers, lengths, token range, hashes, document starts, byte tables, leaks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from golf_jax.config import GolfError
from golf_jax.data.manifest import NAME, read_manifest, sha256_file, text_bytes
from golf_jax.data.overlap import find_overlap
from golf_jax.data.proof import prove_text
from golf_jax.data.shards import Shard, check_holes, check_token_range, find_shards, open_shard
from golf_jax.data.sidecar import Sidecar, find_sidecars, load_sidecar
from golf_jax.data.tokenizer import Tokenizer, byte_tables
from golf_jax.progress import Log, Progress

PROOF_SECONDS = 60.0  # per split, of encoding again
OFFICIAL_DOCUMENTS, OFFICIAL_BYTES = 50_000, 151_080_891  # FineWeb validation set of the challenge
PARTS = ("files", "sidecars", "documents")
HASHED = {"format", "tokenizer.file", "tokenizer.sha256", *(f"{split}.{part}" for split in ("train", "val") for part in PARTS)}


@dataclass
class Report:
    """What was found: `facts` in order, and `problems` (empty: the data is sound)."""

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def documents_of(shards: Sequence[np.ndarray | Shard], bos_id: int) -> Iterator[np.ndarray]:
    """The documents, each with its BOS, also those that go on in the next shard; empty ones are left out."""
    carry = np.empty(0, np.uint16)
    for shard in (part[:] for part in shards):
        starts = np.flatnonzero(shard == bos_id).tolist()
        if not starts:
            carry = np.concatenate([carry, shard])
            continue
        bounds = [*starts, len(shard)]
        pieces = [shard[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]
        yield from (document for document in [np.concatenate([carry, shard[: starts[0]]]), *pieces[:-1]] if len(document) > 1)
        carry = pieces[-1]
    if len(carry) > 1:
        yield carry


def verify(train: str, val: str, tokenizer: str | Path, manifest: dict[str, Any] | None = None, log: Log | None = None) -> Report:
    """Checks the shards of two globs against a tokenizer and, when given, a manifest of this package. Reads every token twice.

    log: hears about progress, where it takes long.
    """
    report = Report()
    model = Tokenizer(tokenizer)
    report.facts.append(f"tokenizer: {model.vocab_size} pieces, sha256 {model.sha256}")
    if manifest is None:
        report.facts.append("manifest: none, so hashes and counts cannot be compared")
    elif manifest["tokenizer"]["sha256"] != model.sha256:
        report.problems.append(f"{tokenizer}: sha256 {model.sha256}, the manifest says {manifest['tokenizer']['sha256']}")
    say = log or (lambda line: None)
    before = len(report.problems)
    say("reading the shards")
    splits = {
        split: _verify_split(report, split, pattern, model, (manifest or {}).get(split), log)
        for split, pattern in (("train", train), ("val", val))
    }
    if splits["val"]:
        say(f"encoding documents again, for {PROOF_SECONDS:.0f} s at most of train and of val")
        sidecar = _verify_sidecar(report, val, (manifest or {}).get("val", {}))
        _verify_text(report, splits, model, sidecar, log)
        if manifest and len(report.problems) == before:  # else the totals cannot be right
            _verify_totals(report, splits, model, sidecar, manifest)
    say("looking for validation text in training")
    train_documents, held_out = (documents_of(splits[split], model.bos_id) for split in ("train", "val"))
    progress = Progress(log, "overlap: tokens of training compared:", sum(map(len, splits["train"])))
    found = find_overlap(_counted(train_documents, progress), held_out, model, inside=True)
    report.facts.append(found.fact())
    if found.leaked:
        report.problems.append(f"{found.leaked} of {found.documents} validation documents are also training documents (whole or in part)")
    return report


def _counted(documents: Iterator[np.ndarray], progress: Progress) -> Iterator[np.ndarray]:
    done = 0
    for document in documents:
        yield document
        progress.at(done := done + len(document))


def _verify_split(report: Report, split: str, pattern: str, model: Tokenizer, entry: dict[str, Any] | None, log: Log | None) -> list[Shard]:
    listed = {file["name"]: file for file in entry["files"]} if entry else {}
    shards: list[Shard] = []
    documents = 0
    try:
        paths = find_shards(pattern)
    except GolfError as error:
        report.problems.append(str(error))
        paths = []
    progress = Progress(log, f"{split}: shards read:", len(paths))
    for number, path in enumerate(paths):
        progress.at(number)
        try:
            shard = open_shard(path)
            tokens = shard.whole()
            check_token_range(tokens, model.vocab_size, path)
            check_holes(tokens, path)
        except GolfError as error:
            report.problems.append(str(error))
            continue
        finally:
            expected = listed.pop(path.name, None)
        if not shards and tokens[0] != model.bos_id:
            report.problems.append(f"{path}: starts with token {tokens[0]}, not with BOS ({model.bos_id})")
        shards.append(shard)
        documents += int(np.count_nonzero(tokens == model.bos_id))
        if entry and expected is None:
            report.problems.append(f"{path}: is not in the manifest")
        elif expected and sha256_file(path) != expected["sha256"]:
            report.problems.append(f"{path}: sha256 differs from the manifest's; the file was altered")
        elif expected and len(shard) != expected["tokens"]:
            report.problems.append(f"{path}: {len(shard)} tokens, the manifest says {expected['tokens']}")
    report.problems += [f"{pattern}: {name} of the manifest is missing" for name in listed]
    report.facts.append(f"{split}: {len(shards)} shards, {sum(map(len, shards)):,} tokens, {documents:,} documents")
    if shards and not documents:
        report.problems.append(f"{pattern}: no BOS ({model.bos_id}) anywhere, documents have no start")
    elif entry and documents != entry.get("documents", documents):
        report.problems.append(f"{pattern}: {documents} documents, the manifest says {entry['documents']}")
    return shards if documents else []


def _verify_sidecar(report: Report, pattern: str, entry: dict[str, Any]) -> Sidecar | None:
    try:
        found = {path.name: path for path in find_sidecars(pattern)}
        for listed in entry.get("sidecars", []):
            if listed["name"] not in found:
                report.problems.append(f"{pattern}: {listed['name']} of the manifest is missing")
            elif sha256_file(found[listed["name"]]) != listed["sha256"]:
                report.problems.append(f"{found[listed['name']]}: sha256 differs from the manifest's; the file was altered")
            elif (count := len(open_shard(found[listed["name"]]))) != listed["tokens"]:
                report.problems.append(f"{found[listed['name']]}: {count} byte counts, the manifest says {listed['tokens']}")
        return load_sidecar(pattern)
    except GolfError as error:
        report.problems.append(str(error))
        return None


def _verify_text(report: Report, splits: dict[str, list[Shard]], model: Tokenizer, sidecar: Sidecar | None, log: Log | None) -> None:
    tokens = np.concatenate([shard[:] for shard in splits["val"]])
    try:
        report.facts += prove_text(model, splits["train"], tokens, PROOF_SECONDS, overlap=False, sidecar=sidecar, log=log).facts
    except GolfError as error:
        report.problems.append(str(error))
        return
    official = _bytes(splits["val"], model, sidecar) == OFFICIAL_BYTES and np.count_nonzero(tokens == model.bos_id) == OFFICIAL_DOCUMENTS
    report.facts.append("the official validation set" if official else "not the official validation set")


def _bytes(shards: list[Shard], model: Tokenizer, sidecar: Sidecar | None) -> int:
    """Bytes of text of all shards of a split."""
    if sidecar:
        return int(sidecar.counts[1:].sum(dtype=np.int64))
    tables, last, total = byte_tables(model.processor), np.empty(0, np.uint16), 0
    for tokens in (np.concatenate([last, shard[:]]) for shard in shards):
        total, last = total + text_bytes(tables, tokens), tokens[-1:]
    return total


def _verify_totals(
    report: Report, splits: dict[str, list[Shard]], model: Tokenizer, sidecar: Sidecar | None, manifest: dict[str, Any]
) -> None:
    """Whatever the manifest sums up, against the sum."""
    there: dict[str, Any] = {"tokenizer.vocab_size": model.vocab_size, "transform": "caseops" if model.caseops else ""}
    there |= {f"{split}.tokens": sum(map(len, shards)) for split, shards in splits.items()}
    there["val.bytes"] = _bytes(splits["val"], model, sidecar)
    if not model.caseops:  # else original bytes, which nothing beside the training shards counts
        there["train.bytes"] = _bytes(splits["train"], model, None)
    if {"repeated", "blank"} <= (text := manifest.get("text", {})).keys():
        there["text.documents"] = sum(manifest[split].get("documents", 0) for split in splits) + text["repeated"] + text["blank"]
    if not text.get("changed", 1) and not model.caseops:  # nothing changed: every byte is counted or left out
        there["text.bytes"] = there["train.bytes"] + there["val.bytes"] + text.get("left_out_bytes", 0)
    for name, value in there.items():
        section, _, field = name.rpartition(".")
        said = (manifest[section] if section else manifest).get(field, value)
        if said != value:
            report.problems.append(f"{NAME}: {name} is {said!r} there and {value!r} here")
    if beyond := [name for name in _fields(manifest) if name.startswith("text.") or name not in there.keys() | HASHED]:
        names = ", ".join(name if name.isprintable() else ascii(name) for name in beyond[:16])
        report.facts.append(f"manifest: not proved here, as only the original text could: {names[:400]}")


def _fields(manifest: dict[str, Any]) -> list[str]:
    """By dotted names, two levels deep."""
    return [f"{s}.{f}" if isinstance(v, dict) else s for s, v in manifest.items() for f in (v if isinstance(v, dict) else [s])]


def verify_directory(directory: str | Path, tokenizer: str | Path | None = None, log: Log | None = None) -> Report:
    """`verify` on a directory that `build` or `download` wrote, or on any with *train*.bin, *val*.bin and a given tokenizer."""
    directory = Path(directory)
    if not directory.is_dir():
        raise GolfError(f"{directory}: no such directory")
    manifest = read_manifest(directory / NAME) if (directory / NAME).exists() else None
    if tokenizer is None:
        if manifest is None:
            raise GolfError(f"{directory}: has no {NAME} that names a tokenizer; give --tokenizer MODEL")
        tokenizer = directory / str(manifest["tokenizer"]["file"])
    return verify(str(directory / "*train*.bin"), str(directory / "*val*.bin"), tokenizer, manifest, log)
