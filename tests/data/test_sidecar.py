"""Byte sidecars: built beside the shards, proved against the original text, used by the score; anything else is refused."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from golf_jax.config import GolfError
from golf_jax.data.build import build
from golf_jax.data.caseops import OPERATORS, encode
from golf_jax.data.download import CASEOPS_REPO, REPO, download, hub_of
from golf_jax.data.manifest import damage
from golf_jax.data.shards import find_shards, load_val_tokens, open_shard, write_shard
from golf_jax.data.sidecar import beside, encode_counted, load_sidecar
from golf_jax.data.text import open_text
from golf_jax.data.tokenizer import Tokenizer, split_documents
from golf_jax.data.verify import verify_directory

TEXTS = [
    f"Report {number}: NASA's iPhone said {number * 7919:X}\n\n  and McDonald {OPERATORS[number % 4]} café É {number * 104729:o}  日本.\n"
    for number in range(160)
]
PLAIN = ["".join(c for c in text if c not in OPERATORS) for text in TEXTS]  # a plain build would count them as text, and refuses


def quiet(line):
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("caseops")
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    build([root / "texts.jsonl"], root / "data", vocab_size=340, shard_tokens=500, transform="caseops", log=quiet)
    return root / "data"


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "data")


def text_of(directory):
    return open_text(str(directory / "train_*.bin"), str(directory / "val_*.bin"), str(directory / "tokenizer.model"), 340, 32)


def sidecar_of(directory):
    """Tokenizer, validation tokens and their byte counts."""
    sidecar = load_sidecar(directory / "val_*.bin")
    assert sidecar is not None
    return Tokenizer(directory / "tokenizer.model"), load_val_tokens(directory / "val_*.bin"), sidecar


def test_operators_are_pieces_of_their_own_and_no_piece_has_a_capital(built):
    tokenizer = Tokenizer(built / "tokenizer.model")
    assert [tokenizer.processor.piece_to_id(operator) for operator in OPERATORS] == [4, 5, 6, 7]
    assert tokenizer.caseops and not any(c.isascii() and c.isupper() for piece in tokenizer.pieces[264:] for c in piece)
    assert tokenizer.encode(TEXTS[0]) == tokenizer.processor.encode(encode(TEXTS[0]))
    assert tokenizer.original(tokenizer.encode(TEXTS[0])) == TEXTS[0]


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))) | st.text(f"aAB \u2581\n\x00é日{OPERATORS}"))
@example("\u2581NASA \u2581")
def test_any_text_comes_back_from_tokens_and_its_bytes_are_counted(built, text):
    """But for U+2581, which SentencePiece takes for a space, of one byte, in every text."""
    tokenizer, expected = Tokenizer(built / "tokenizer.model"), text.replace("\u2581", " ")
    tokens, counts = next(encode_counted(tokenizer, [text]))
    assert tokenizer.original(tokens) == expected and counts.sum() == len(expected.encode())


def test_every_document_comes_back_from_its_tokens_and_its_bytes_are_counted(built):
    tokenizer, tokens, sidecar = sidecar_of(built)
    assert len(find_shards(built / "val_*.bin")) > 1 and len(sidecar.counts) == len(tokens)
    at = 0
    for ids in split_documents(tokens, tokenizer.bos_id):
        text = tokenizer.original(ids)
        assert text in TEXTS
        assert sidecar.counts[at : at + len(ids)].sum() == len(text.encode())
        at += len(ids)
    marks, literal = np.isin(tokens, [1, 4, 5, 6, 7]), np.append(False, tokens[:-1] == 7)
    assert not sidecar.counts[marks & ~literal].any() and set(sidecar.counts[marks & literal]) == {3}


def test_what_was_built_is_sound_and_its_score_counts_original_bytes(built):
    report = verify_directory(built)
    assert report.problems == [] and damage(built) == ""
    text = text_of(built)
    total = int(text.tables.of_targets(text.val_tokens, slice(None)).sum())
    assert total == sum(len(t.encode()) for t in TEXTS if t in {text.tokenizer.original(d) for d in split_documents(text.val_tokens, 1)})
    assert math.isclose(total, text.val_bytes, rel_tol=0.2)  # the last document may be cut: it is not proved
    assert any(entry["name"].startswith("val_bytes_") for entry in text.identity["val"])


def test_markers_without_a_sidecar_are_refused(copy):
    for path in copy.glob("val_bytes_*.bin"):
        path.unlink()
    with pytest.raises(GolfError, match="markers of a text transform would count as text"):
        text_of(copy)
    assert any("is missing" in problem for problem in verify_directory(copy).problems)


def test_a_sidecar_with_gaps_is_refused(copy):
    next(iter(sorted(copy.glob("val_bytes_*.bin")))).unlink()
    with pytest.raises(GolfError, match="has no byte counts beside it"):
        text_of(copy)


@pytest.mark.parametrize(("at", "message"), [(0, "document starts or case operators count as text"), (None, "its text has")])
def test_wrong_counts_are_found(copy, at, message):
    path = beside(find_shards(copy / "val_*.bin")[0])
    counts, tokens = open_shard(path)[:].copy(), open_shard(find_shards(copy / "val_*.bin")[0])[:]
    counts[int(np.flatnonzero(~np.isin(tokens, [1, 4, 5, 6, 7]))[3]) if at is None else at] += 1
    write_shard(path, counts)
    with pytest.raises(GolfError, match=message):
        text_of(copy)
    assert any("was altered" in problem for problem in verify_directory(copy).problems)


def test_counts_of_other_lengths_and_other_shards_are_refused(copy):
    path = beside(find_shards(copy / "val_*.bin")[0])
    counts = open_shard(path)[:].copy()
    write_shard(path, counts[:-1])
    with pytest.raises(GolfError, match="byte counts for the"):
        text_of(copy)


def test_a_sidecar_of_a_plain_tokenizer_is_refused(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PLAIN))
    build([tmp_path / "texts.jsonl"], tmp_path / "data", vocab_size=340, log=quiet)
    shard = find_shards(tmp_path / "data/val_*.bin")[0]
    write_shard(beside(shard), np.ones(len(open_shard(shard)), int))
    with pytest.raises(GolfError, match="has not the four case operators"):
        text_of(tmp_path / "data")


@pytest.mark.parametrize(
    ("transform", "message"), [("caseops", "has not the four case operators"), ("rot13", "is unknown; there is caseops")]
)
def test_a_transform_needs_its_tokenizer_and_a_tokenizer_its_transform(built, tmp_path, transform, message):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PLAIN))
    build([tmp_path / "texts.jsonl"], tmp_path / "plain", vocab_size=340, log=quiet)
    with pytest.raises(GolfError, match=message):
        build([tmp_path / "texts.jsonl"], tmp_path / "data", tokenizer=tmp_path / "plain/tokenizer.model", transform=transform, log=quiet)
    with pytest.raises(GolfError, match="give --transform caseops"):
        build([tmp_path / "texts.jsonl"], tmp_path / "data", tokenizer=built / "tokenizer.model", log=quiet)


VARIANT = "sp340_lossless_caps_caseops_v1_reserved"


class StandIn:
    """The record's repository as a directory."""

    def __init__(self, root):
        self.root = root

    def fetch(self, path, into):
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(self.root / path, into / path)

    def sha256(self, paths):
        return {}


@pytest.fixture
def export(built, tmp_path):
    root = tmp_path / "hub/datasets"
    (root / f"datasets/fineweb10B_{VARIANT}").mkdir(parents=True)
    (root / "tokenizers").mkdir()
    for path in built.glob("*.bin"):
        shutil.copy(path, root / f"datasets/fineweb10B_{VARIANT}/fineweb_{path.name}")
    shutil.copy(built / "tokenizer.model", root / "tokenizers/caseops.model")
    shards = {split: find_shards(built / f"{split}_*.bin") for split in ("train", "val")}
    stats = {f"files_{split}": len(paths) for split, paths in shards.items()}
    stats["tokens_val"] = sum(len(open_shard(path)) for path in shards["val"])
    index = {
        "datasets": [{"name": f"fineweb10B_{VARIANT}", "tokenizer_name": "caseops", "stats": stats}],
        "tokenizers": [{"name": "caseops", "model_path": "tokenizers/caseops.model"}],
    }
    (root / "manifest.json").write_text(json.dumps(index))
    return root.parent


def test_an_export_of_caseops_text_arrives_with_its_byte_counts(export, built, tmp_path):
    directory = download(VARIANT, tmp_path / "data", train_shards=1, hub=StandIn(export), log=quiet)
    assert verify_directory(directory).problems == []
    assert len(list(directory.glob("fineweb_val_bytes_*.bin"))) == len(find_shards(built / "val_*.bin"))
    (directory / "fineweb_val_bytes_000000.bin").unlink()
    assert verify_directory(directory).problems


def test_each_variant_has_its_repository(monkeypatch):
    monkeypatch.setattr("golf_jax.data.download.HuggingFaceHub", lambda repo, revision: (repo, revision))
    assert hub_of("sp8192") == (REPO, None)
    assert hub_of(VARIANT) == (CASEOPS_REPO, None) == ("romeerp/parameter-golf-caseops-v1", None)
    assert hub_of(VARIANT, "mine/of-my-own") == ("mine/of-my-own", None)
