"""Download, against a local stand-in of the hub with the export's layout."""

import json
import logging
import shutil
import sys

import numpy as np
import pytest

from golf_jax.config import GolfError
from golf_jax.data.download import HuggingFaceHub, download
from golf_jax.data.manifest import sha256_file
from golf_jax.data.shards import write_shard
from golf_jax.data.tokenizer import Tokenizer, train_bpe
from golf_jax.data.verify import verify_directory

TEXTS = [f"Text {number} says {number * 7919:x}, {number * 104729:o}." for number in range(80)]


class LocalHub:
    """The files of a directory, handed out as the hub does; counts what is fetched."""

    def __init__(self, root):
        self.root, self.fetched, self.broken = root, [], set()

    def fetch(self, path, into):
        self.fetched.append(path)
        if path in self.broken:
            raise ConnectionError("the line went dead\nand more")
        (into / path).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(self.root / path, into / path)

    def sha256(self, paths):
        return {path: sha256_file(self.root / path) for path in paths if (self.root / path).is_file()}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """datasets/{manifest.json,datasets/fineweb10B_sp300/,tokenizers/}: two validation and three training shards."""
    root = tmp_path_factory.mktemp("hub") / "datasets"
    tokenizer = Tokenizer(train_bpe(TEXTS, 300))
    documents = tokenizer.encode_documents(TEXTS)
    val, train = np.concatenate(documents[:20]), np.concatenate(documents[20:])
    for split, tokens, count in (("val", val, 2), ("train", train, 3)):
        for number, part in enumerate(np.array_split(tokens, count)):
            write_shard(root / f"datasets/fineweb10B_sp300/fineweb_{split}_{number:06d}.bin", part)
    (root / "tokenizers").mkdir()
    (root / "tokenizers/fineweb_300_bpe.model").write_bytes(tokenizer.model)
    stats = {"files_train": 3, "files_val": 2, "tokens_val": len(val)}
    index = {
        "datasets": [{"name": "fineweb10B_sp300", "tokenizer_name": "sp_bpe_300", "stats": stats}],
        "tokenizers": [{"name": "sp_bpe_300", "model_path": "tokenizers/fineweb_300_bpe.model"}],
    }
    (root / "manifest.json").write_text(json.dumps(index))
    return root.parent


@pytest.fixture
def hub(export, tmp_path):
    return LocalHub(shutil.copytree(export, tmp_path / "hub"))


def quiet(line):
    pass


SHARDS = "datasets/datasets/fineweb10B_sp300/"


def test_what_was_asked_for_arrives_and_is_sound(hub, tmp_path):
    lines = []
    directory = download("sp300", tmp_path / "data", train_shards=2, hub=hub, log=lines.append)
    assert directory == tmp_path / "data/datasets/fineweb10B_sp300"
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "manifest.json",
        "tokenizer.model",
        *(f"fineweb_{name}.bin" for name in ("train_000000", "train_000001", "val_000000", "val_000001")),
    }
    assert len(lines) == 5 and lines[0].startswith("[1/5] tokenizers/fineweb_300_bpe.model")
    report = verify_directory(directory)
    assert report.problems == [] and any("0 of 20 validation documents" in fact for fact in report.facts)


def test_a_second_run_fetches_only_what_is_missing_or_damaged(hub, tmp_path):
    directory = download("sp300", tmp_path / "data", train_shards=2, hub=hub, log=quiet)
    (directory / "fineweb_val_000001.bin").write_bytes(b"")
    raw = bytearray((directory / "fineweb_train_000000.bin").read_bytes())
    raw[-1] ^= 1
    (directory / "fineweb_train_000000.bin").write_bytes(raw)
    hub.fetched.clear()
    download("sp300", tmp_path / "data", train_shards=3, hub=hub, log=quiet)
    files = ("fineweb_val_000001.bin", "fineweb_train_000000.bin", "fineweb_train_000002.bin")
    assert hub.fetched == ["datasets/manifest.json", *(SHARDS + name for name in files)]
    assert verify_directory(directory).problems == []


def test_a_broken_transfer_is_told_and_resumed(hub, tmp_path):
    hub.broken = {SHARDS + "fineweb_train_000001.bin"}
    with pytest.raises(GolfError, match="fineweb_train_000001.bin failed: ConnectionError: the line went dead; run again") as caught:
        download("sp300", tmp_path / "data", train_shards=3, hub=hub, log=quiet)
    assert "\n" not in str(caught.value)
    hub.broken, hub.fetched = set(), []
    directory = download("sp300", tmp_path / "data", train_shards=3, hub=hub, log=quiet)
    assert len(hub.fetched) == 3 and verify_directory(directory).problems == []


def test_a_damaged_export_is_refused(hub, tmp_path):
    path = hub.root / (SHARDS + "fineweb_val_000000.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(GolfError, match=r"fineweb_val_000000.bin: damaged as fetched \(.*truncated"):
        download("sp300", tmp_path / "data", train_shards=0, hub=hub, log=quiet)
    assert not (tmp_path / "data/datasets").exists()


def test_a_shortened_validation_set_is_refused(hub, tmp_path):
    """A well-formed but shorter shard, as in PR 1923."""
    write_shard(hub.root / (SHARDS + "fineweb_val_000001.bin"), np.array([1, 50, 60]))
    with pytest.raises(GolfError, match="the export's manifest says"):
        download("sp300", tmp_path / "data", train_shards=1, hub=hub, log=quiet)


@pytest.mark.parametrize(
    ("variant", "shards", "message"),
    [
        ("sp300", 4, "3 training shards, 4"),
        ("sp512", 1, "which has fineweb10B_sp300"),
        ("byte260", 1, "variant"),
        ("sp300", -1, "negative"),
    ],
)
def test_impossible_wishes_are_refused_before_any_shard_is_fetched(hub, tmp_path, variant, shards, message):
    with pytest.raises(GolfError, match=message):
        download(variant, tmp_path / "data", train_shards=shards, hub=hub, log=quiet)
    assert not any(name.endswith(".bin") for name in hub.fetched)


def test_an_export_cannot_write_outside_of_its_directory(hub, tmp_path):
    index = json.loads((hub.root / "datasets/manifest.json").read_text())
    index["tokenizers"][0]["model_path"] = "../../evil.model"
    (hub.root / "datasets/manifest.json").write_text(json.dumps(index))
    with pytest.raises(GolfError, match="outside of the export"):
        download("sp300", tmp_path / "data", train_shards=1, hub=hub, log=quiet)


@pytest.mark.parametrize(
    ("place", "values", "message"),
    [
        (["datasets"], [None, "x", {}, [None], 5], "datasets must be a list of objects"),
        (["tokenizers"], [None, "x", ["x"]], "tokenizers must be a list of objects"),
        (["datasets", 0, "name"], [None, [], {}, 1], "not in the export"),
        (["datasets", 0, "tokenizer_name"], [None, [], {}], "names no SentencePiece model"),
        (["tokenizers", 0, "model_path"], [None, 5, True, [], {}], "names no SentencePiece model"),
        (["datasets", 0, "stats"], [None, [], "x", 5], "stats of fineweb10B_sp300 must be an object"),
        (["datasets", 0, "stats", "files_train"], [None, "3", -1, 1e30, 10**9, [], True], "files_train is .*; it must be a number of at"),
        (["datasets", 0, "stats", "files_val"], ["x", 1.5, 10**9, {}, True], "files_val is .*; it must be a number of at most 10,000"),
        (["datasets", 0, "stats", "tokens_val"], ["x", None, 1.0, 10**30], "tokens_val is .*; it must be a number of at most"),
    ],
)
def test_a_manifest_whose_fields_are_something_else_is_one_line(hub, tmp_path, place, values, message):
    """Also a number of files whose names alone would take gigabytes."""
    path = hub.root / "datasets/manifest.json"
    index = json.loads(path.read_text())
    *outer, last = place
    for value in values:
        there = index
        for key in outer:
            there = there[key]
        there[last] = value
        path.write_text(json.dumps(index))
        with pytest.raises(GolfError, match=message):
            download("sp300", tmp_path / "data", train_shards=1, hub=hub, log=quiet)


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(GolfError, match=r"pip install 'golf-jax\[data\]'"):
        HuggingFaceHub()


def test_the_real_client_is_asked_for_a_dataset_file_below_the_target(monkeypatch, tmp_path, caplog):
    class Client:
        def hf_hub_download(self, repo, path, **options):
            assert (repo, options["repo_type"], options["revision"]) == ("willdepueoai/parameter-golf", "dataset", None)
            return str(options["local_dir"] / path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Client())
    hub = HuggingFaceHub()
    for line in ("'refused' thrown while requesting HEAD http://x\n", "Retrying in 1s [Retry 1/5]."):
        logging.getLogger("huggingface_hub.utils._http").warning(line)
    assert caplog.messages == ["Retrying in 1s [Retry 1/5]."]
    assert hub.fetch("datasets/manifest.json", tmp_path) == tmp_path / "datasets/manifest.json"
