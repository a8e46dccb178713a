"""Build, verify: what comes out is complete, counted, split without overlap; damage is found."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import golf_jax
from golf_jax.config import GolfError
from golf_jax.data import build as build_module
from golf_jax.data import proof
from golf_jax.data.build import build, is_validation
from golf_jax.data.documents import find_files, read_documents
from golf_jax.data.identity import identify
from golf_jax.data.manifest import COUNTS, damage, read_manifest, sha256_file
from golf_jax.data.shards import find_shards, load_val_tokens, open_shard, write_shard
from golf_jax.data.tokenizer import Tokenizer, split_documents
from golf_jax.data.verify import documents_of, verify_directory
from golf_jax.files import UNFINISHED, folder_beside

TEXTS = [f"Document {number} has its own words: {number * 7919:x} and {number * 104729:o}." for number in range(200)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def built(tmp_path, jsonl):
    build([jsonl], tmp_path / "data", vocab_size=300, shard_tokens=2500, log=lambda line: None)
    return tmp_path / "data"


def problems(directory):
    return "\n".join(verify_directory(directory).problems)


def test_every_document_is_in_the_split_its_hash_says(built):
    tokenizer = Tokenizer(built / "tokenizer.model")
    for split, held_out in (("train", False), ("val", True)):
        documents = split_documents(load_val_tokens(built / f"{split}_*.bin"), tokenizer.bos_id)
        decoded = [tokenizer.decode(document) for document in documents]
        assert decoded == [text for text in TEXTS if is_validation(text, 10) == held_out] and decoded


def test_manifest_counts_and_hashes_are_true(built):
    manifest = read_manifest(built / "manifest.json")
    assert len(manifest["train"]["files"]) > 1
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == len(TEXTS)
    assert manifest["train"]["bytes"] + manifest["val"]["bytes"] == sum(map(len, TEXTS))
    for split in ("train", "val"):
        files = manifest[split]["files"]
        assert [file["name"] for file in files] == [path.name for path in find_shards(built / f"{split}_*.bin")]
        assert [file["sha256"] for file in files] == [sha256_file(built / file["name"]) for file in files]
        assert sum(len(open_shard(built / file["name"])) for file in files) == manifest[split]["tokens"]
    assert manifest["tokenizer"] == {
        "file": "tokenizer.model",
        "sha256": Tokenizer(built / "tokenizer.model").sha256,
        "vocab_size": 300,
    }
    report = verify_directory(built)
    assert report.problems == [] and any(
        line.startswith("manifest: not proved here") and line.endswith(", text.left_out_bytes, text.changed, text.changes")
        for line in report.facts
    )


def test_what_is_said_to_be_changed_is_what_was_changed(tmp_path, jsonl, built):
    """Not what the tokenizer might change in another text."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=330, byte_fallback=True, bos_id=1, unk_id=0, minloglevel=2
    )
    (tmp_path / "lossy.model").write_bytes(model.getvalue())
    lines: list[str] = []
    kept = build([jsonl], tmp_path / "kept", tokenizer=tmp_path / "lossy.model", log=lines.append)
    assert (
        kept["text"]["changes"][:2] == ["line ends become spaces", "runs of spaces become one, those at the ends none"]
        and kept["text"]["changed"] == 0
    )
    assert any(line.endswith("; changed: nothing") for line in lines)
    jsonl.write_text(jsonl.read_text() + json.dumps({"text": "two lines\nand  two spaces"}) + "\n")
    build([jsonl], tmp_path / "lost", tokenizer=tmp_path / "lossy.model", log=lines.append)
    assert any("; changed: 1 documents (with this tokenizer line ends become spaces; " in line for line in lines)


@pytest.mark.parametrize(
    "options",
    [{}, {"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}],
    ids=["takes spaces off", "puts one behind"],
)
def test_a_space_at_the_end_that_is_lost_or_added_is_a_change_and_sound(tmp_path, jsonl, options):
    model = io.BytesIO()
    common = {"vocab_size": 330, "byte_fallback": True, "bos_id": 1, "unk_id": 0, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **common, **options)
    (tmp_path / "ends.model").write_bytes(model.getvalue())
    jsonl.write_text("".join(json.dumps({"text": text + " "}) + "\n" for text in TEXTS))
    text = build([jsonl], tmp_path / "data", tokenizer=tmp_path / "ends.model", log=lambda line: None)["text"]
    assert text["changed"] == text["documents"] and problems(tmp_path / "data") == ""


def test_an_unknown_character_is_shown_itself(tmp_path, jsonl):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=60, model_type="char", bos_id=1, unk_id=0, minloglevel=2
    )
    (tmp_path / "few.model").write_bytes(model.getvalue())
    jsonl.write_text(jsonl.read_text() + json.dumps({"text": f"{TEXTS[0]} {TEXTS[1]} \u2603"}) + "\n")
    with pytest.raises(GolfError, match=r"document 200 are unknown .*: '\\u2603'$"):
        build([jsonl], tmp_path / "data", tokenizer=tmp_path / "few.model", log=lambda line: None)


KILLED = """
import os, signal, sys
from golf_jax.data import build
build._write_splits = lambda *rest: os.kill(os.getpid(), signal.SIGKILL)
build.build([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], log=lambda line: None)
"""


def test_what_a_killed_build_left_is_cleared_by_the_next_one(tmp_path, jsonl, built):
    def hidden():
        return [path.name for path in tmp_path.iterdir() if path.name[0] == "."]

    environment = {**os.environ, "PYTHONPATH": str(Path(golf_jax.__file__).parents[1])}
    arguments = [str(jsonl), str(tmp_path / "new"), str(built / "tokenizer.model")]
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment)
        assert len(hidden()) == 1
    left = hidden()
    (tmp_path / ".new.original").mkdir()  # somebody's own
    with folder_beside(tmp_path / "new") as living:  # clears the dead one's, and keeps its own
        assert sorted(hidden()) == sorted([living.name, ".new.original"]) and living.name not in left
        build([jsonl], tmp_path / "new", tokenizer=built / "tokenizer.model", log=lambda line: None)
        assert living.name in hidden()
    with folder_beside(tmp_path / "new"):
        (tmp_path / f".new.12345678{UNFINISHED}").mkdir()  # of one that is killed meanwhile
    assert hidden() == [".new.original"] and verify_directory(tmp_path / "new").problems == []


def test_the_tokenizer_never_saw_validation_text(tmp_path, jsonl, monkeypatch):
    seen = []
    monkeypatch.setattr(build_module, "train_bpe", lambda texts, size: seen.extend(texts) or original([*seen], size))
    build([jsonl], tmp_path / "data", vocab_size=300, log=lambda line: None)
    assert seen == [text for text in TEXTS if not is_validation(text, 10)]


original = build_module.train_bpe


def test_repeated_and_empty_documents_are_dropped(tmp_path, jsonl, built):
    jsonl.write_text(jsonl.read_text() * 2 + json.dumps({"text": " \n"}) + "\n" + json.dumps({"text": f"  {TEXTS[3]}"}) + "\n")
    tokenizer = built / "tokenizer.model"
    again = build([jsonl], tmp_path / "again", tokenizer=tokenizer, shard_tokens=2500, log=lambda line: None)
    before = read_manifest(built / "manifest.json")
    assert (again["train"], again["val"]) == (before["train"], before["val"])


def test_directories_texts_and_long_documents(tmp_path):
    folder = tmp_path / "books"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("short")
    paragraphs = [f"paragraph {number} " + "word " * 400 for number in range(20)]
    (folder / "a.md").write_text("\n\n".join(paragraphs))
    (folder / "sub" / "c.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (folder / "ignored.bin").write_bytes(b"\xff")
    *parts, short, one, two = read_documents(find_files([folder])[0])
    assert (short, one, two) == ("short", "one", "two")
    assert len(parts) > 3 and all(len(part) >= 8192 for part in parts[:-1]) and max(map(len, parts)) < 12_000
    assert "".join(parts) == "\n\n".join(paragraphs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "a.jsonl:2: needs a JSON object"),
        ("a.jsonl", b'{"text": "x"\n', "a.jsonl:1"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1"),
        ("a.txt", b"ab\xff", r"a.txt:1: not UTF-8 text \(byte 2\)"),
        ("a.txt", "a text of a Windows program".encode("utf-16-le"), "a.txt:1: more than a fifth are NUL bytes: UTF-16"),
        ("a.csv", None, "a.csv: cannot be read"),
    ],
)
def test_bad_inputs_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(GolfError, match=message):
        list(read_documents(find_files([tmp_path / name])[0]))


def test_a_failed_build_leaves_nothing_and_an_old_one_is_kept(tmp_path, jsonl, built):
    (tmp_path / "link").symlink_to("nowhere")  # the finished folder could not take its place
    for there in (built, tmp_path / "link"):
        with pytest.raises(GolfError, match="exists already"):
            build([jsonl], there)
    (tmp_path / "one.txt").write_text("word " * 1000)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(GolfError, match="leave none for"):
        build([tmp_path / "one.txt"], tmp_path / "new", tokenizer=built / "tokenizer.model", log=lambda line: None)
    with pytest.raises(GolfError, match="vocab_size=60000"):
        build([jsonl], tmp_path / "new", vocab_size=60_000, log=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_verify_finds_a_flipped_byte(built):
    path = built / "train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    assert "train_000000.bin: sha256 differs" in problems(built)


@pytest.mark.parametrize(
    "field",
    ["tokenizer.vocab_size", "train.tokens", "train.bytes", "train.documents", "val.tokens", "val.bytes", "text.documents", "text.bytes"],
)
def test_verify_compares_every_total_of_the_manifest(built, field, monkeypatch):
    monkeypatch.setattr(proof, "PROVED_TOKENS", 100)  # whatever part of the byte count is proved, the total is that of all
    assert problems(built) == ""
    manifest, (section, name) = json.loads((built / "manifest.json").read_text()), field.split(".")
    manifest[section][name] += 1
    (built / "manifest.json").write_text(json.dumps(manifest))
    report = verify_directory(built)
    assert len(report.problems) == 1 and str(manifest[section][name]) in report.problems[0]


@pytest.mark.parametrize("field", COUNTS)
def test_a_count_of_the_manifest_that_is_no_number_is_refused(built, field):
    manifest = json.loads((built / "manifest.json").read_text())
    manifest["text"][field] = "0"
    (built / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(GolfError, match=f"manifest.json: text.{field} is missing or no int"):
        verify_directory(built)


def test_a_run_finds_a_token_that_was_altered_between_the_samples(tmp_path, built):
    """By the manifest's hash, for whatever was written to after it: training, and going on with it, read no more than samples else."""
    tokenizer, path = Tokenizer(built / "tokenizer.model"), built / "train_000000.bin"
    before = identify(tokenizer.sha256, [path], [])
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)  # newer, and the same
    assert identify(tokenizer.sha256, [path], []) == before
    with path.open("r+b") as file:
        file.seek(1500)
        file.write(b"\x09")
    with pytest.raises(GolfError, match="train_000000.bin: sha256 differs from the manifest's; the file was altered"):
        identify(tokenizer.sha256, [path], [])


def test_verify_finds_a_validation_document_in_training(built):
    """Also one that runs over the end of a shard: the leak of issue 2127."""
    held_out = open_shard(built / "val_000000.bin")[:]
    training = open_shard(built / "train_000000.bin")[:]
    second = np.flatnonzero(held_out == 1)[1]
    leak = np.concatenate([training, held_out[:second]])
    (built / "manifest.json").unlink()
    write_shard(built / "train_000000.bin", leak[:-5])
    write_shard(built / "train_000000b.bin", np.concatenate([leak[-5:], [1, 40]]))
    report = verify_directory(built, built / "tokenizer.model")
    assert len(report.problems) == 1 and "1 of 23 validation documents are also training" in report.problems[0]


def test_verify_finds_missing_foreign_and_truncated_shards(built):
    (built / "train_000001.bin").unlink()
    write_shard(built / "train_000009.bin", np.array([1, 5, 6]))
    path = built / "val_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    found = problems(built)
    for message in ("train_000001.bin of the manifest is missing", "train_000009.bin: is not in the manifest", "truncated"):
        assert message in found


def test_verify_finds_another_tokenizer_and_a_missing_bos(tmp_path, jsonl, built):
    build([jsonl], tmp_path / "small", vocab_size=291, log=lambda line: None)
    report = verify_directory(built, tmp_path / "small" / "tokenizer.model")
    assert any("the manifest says" in problem for problem in report.problems)
    assert any("outside a vocabulary of 291" in problem for problem in report.problems)
    write_shard(tmp_path / "small" / "val_000000.bin", np.arange(40, 60))
    assert "starts with token 40, not with BOS" in problems(tmp_path / "small")
    assert "no BOS (1) anywhere" in problems(tmp_path / "small")


@pytest.mark.parametrize("vocab_size", [0, 260, 100_000])
def test_a_vocabulary_that_no_tokenizer_has_is_refused(tmp_path, vocab_size):
    with pytest.raises(GolfError, match=f"vocab_size={vocab_size} must lie between 261"):
        build_module.build_documents(lambda: ["text"], tmp_path / "d", source="", vocab_size=vocab_size)


def test_documents_do_not_depend_on_where_shards_end(built):
    tokens = load_val_tokens(built / "train_*.bin")
    whole = [document.tolist() for document in documents_of([tokens], 1)]
    assert len(whole) == 177
    for size in (7, 50, 1000):
        parts = np.split(tokens, range(size, len(tokens), size))
        assert [document.tolist() for document in documents_of(parts, 1)] == whole


def test_official_shards_are_sound(shared):
    for vocab in (1024, 8192):
        model = shared / f"data/tokenizers/fineweb_{vocab}_bpe.model"
        report = verify_directory(shared / f"data/fineweb_sp{vocab}", model)
        assert report.problems == [] and any("0 of 181 validation documents" in fact for fact in report.facts)


def test_a_pipe_in_place_of_a_shard_is_damage(built, tmp_path):
    copy = Path(shutil.copytree(built, tmp_path / "copy"))
    assert damage(copy) == ""
    shard = next(copy.glob("*val*.bin"))
    shard.unlink()
    os.mkfifo(shard)
    assert damage(copy) == f"{shard}: differs from the manifest"


def test_a_manifest_names_nothing_outside_its_directory(built):
    manifest = json.loads((built / "manifest.json").read_text())
    files = [{"tokenizer": {**manifest["tokenizer"], "file": name}} for name in ("../tokenizer.model", "..", "", "a\0b", "\ud800", "c:x")]
    for change in (*files, {"train": None}, {"val": {}}):
        (built / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(GolfError, match=r"manifest\.json: "):
            verify_directory(built)


def test_one_character_without_end_is_refused_before_a_reader_takes_it_for_a_hole(tmp_path):
    documents = ["some words of text " * 40 + str(n) for n in range(40)] + ["x" * 10_000_000]
    with pytest.raises(GolfError, match=r"(train|val)_000000.bin: the 65,536 tokens from .* are all \d+, which is no text"):
        build_module.build_documents(lambda: documents, tmp_path / "out", source="made", vocab_size=280, val_every=2, log=lambda line: None)
    assert not (tmp_path / "out").exists()
