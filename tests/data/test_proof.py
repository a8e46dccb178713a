"""Proofs of text: what is not the tokenizer's own, not text, not countable or trained on is refused; sound text passes."""

import errno
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_jax.config import GolfError
from golf_jax.data import identity, proof
from golf_jax.data.build import build
from golf_jax.data.corpus import documents
from golf_jax.data.documents import cut, find_files, read_documents
from golf_jax.data.identity import SAMPLE_BYTES, SAMPLES, WHOLE_BYTES, difference, identify
from golf_jax.data.overlap import Overlap, _Windows, find_overlap
from golf_jax.data.proof import prove_text, vocabulary_use
from golf_jax.data.shards import find_shards, load_val_tokens, open_shard, write_shard
from golf_jax.data.tokenizer import Tokenizer, check_tables, train_bpe
from golf_jax.processes import cache_directory

TEXTS = documents()[:80]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_bpe(TEXTS[:60], 512))


@pytest.fixture(scope="module")
def split(tokenizer):
    encoded = tokenizer.encode_documents([part for text in TEXTS for part in cut(text)])
    return [np.concatenate(encoded[30:])], np.concatenate(encoded[:30])


def trained(**options) -> Tokenizer:
    model = io.BytesIO()
    common = {"model_type": "bpe", "vocab_size": 512, "byte_fallback": True, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    lines = (line for text in TEXTS for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, minloglevel=2, **{**common, **options})
    return Tokenizer(model.getvalue())


def test_sound_text_is_proved(tokenizer, split):
    found = prove_text(tokenizer, *split)
    assert found.val_bytes == check_tables(tokenizer, split[1]) > 0
    assert not any("changes" in fact for fact in found.facts)


@settings(max_examples=100, deadline=None)
@given(st.text().filter(lambda text: "\u2581" not in text))
def test_the_default_tokenizer_keeps_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_another_tokenizer_of_the_same_size_is_refused(split):
    with pytest.raises(GolfError, match=r"differs for \d+ of \d+ train documents: .*another tokenizer"):
        prove_text(Tokenizer(train_bpe([text.upper() for text in TEXTS[20:]], 512)), *split)


def test_random_tokens_are_no_text(tokenizer, split):
    tokens = np.random.default_rng(0).integers(4, 512, 4000).astype(np.uint16)
    tokens[::100] = 1
    with pytest.raises(GolfError, match="not text"):
        prove_text(tokenizer, [], tokens)


def test_tokens_that_the_tokenizer_has_not_are_refused(tokenizer, split, tmp_path):
    write_shard(tmp_path / "train_3.bin", np.array([1, 5, 600, 1, 5, 600, 1], np.uint16))
    with pytest.raises(GolfError, match="train_3.bin: token 600 is outside a vocabulary of 512"):
        prove_text(tokenizer, [open_shard(tmp_path / "train_3.bin")], split[1])


def test_documents_without_a_start_are_refused(tokenizer, split):
    for tokens in (np.where(split[1] == 1, 2, split[1]), split[1][3:]):
        with pytest.raises(GolfError, match="must start with BOS"):
            prove_text(tokenizer, [], tokens)


def test_marker_pieces_are_refused_and_line_end_pieces_are_not(split):
    markers = trained(user_defined_symbols=["\ue011"])
    with pytest.raises(GolfError, match=r"private-use pieces \('\\ue011'\)"):
        prove_text(markers, [], np.concatenate(markers.encode_documents(TEXTS[:3])))
    ends = trained(user_defined_symbols=["\n"], normalization_rule_name="identity", remove_extra_whitespaces=False)
    prove_text(ends, [], np.concatenate(ends.encode_documents(TEXTS[:3])))


def test_user_defined_pieces_that_occur_are_told_and_marks_for_capitals_refused(tmp_path):
    """No private-use characters, so text may well have them: with what they count as. A text that has no capitals left had them marked."""
    words = trained(user_defined_symbols=["<cap>", "<br>"], normalization_rule_name="identity", remove_extra_whitespaces=False)

    def said(texts):
        facts = prove_text(words, [], np.concatenate(words.encode_documents(texts))).facts
        return [fact for fact in facts if "user-defined" in fact]

    assert said(TEXTS[:20]) == []
    assert re.match(r"user-defined pieces \('<cap>' 3 times\) count as 15 bytes of text, 0\.\d % of", *said(["<cap>" * 3, *TEXTS[:20]]))
    assert said([text.replace("a", "<br>a") for text in TEXTS[:3]])[0].startswith("WARNING: user-defined pieces ('<br>' ")
    marked = [re.sub("[A-Z]", lambda capital: f"<cap>{capital[0].lower()}", text) for text in TEXTS[:20]]
    with pytest.raises(GolfError, match=r"\('<cap>' [\d,]+ times\) count as [\d,]+ bytes of text, .* no capitals besides: marks"):
        said(marked)
    assert said(["天地玄黄<cap>" * 9])[0].startswith("WARNING")  # a script without small letters
    lines, (file, model) = [], [tmp_path / "a.jsonl", tmp_path / "words.model"]
    file.write_text("".join(json.dumps({"text": f"{text[:200]} <br>"}) + "\n" for text in TEXTS))
    model.write_bytes(words.model)
    build([file], tmp_path / "data", tokenizer=model, log=lines.append)
    assert any("user-defined pieces ('<br>' " in line for line in lines)


def test_repeated_validation_documents_are_told(tokenizer):
    def said(texts):
        facts = prove_text(tokenizer, [], np.concatenate(tokenizer.encode_documents(texts))).facts
        return [fact for fact in facts if "repeat" in fact]

    assert said(TEXTS[:9]) == []
    assert said([*TEXTS[:9], TEXTS[2], TEXTS[2]]) == ["WARNING: val: 2 of 11 documents repeat another one; they are scored all the same"]
    twice = np.concatenate([np.append(1, document) for document in tokenizer.encode_documents(TEXTS[:9])]).astype(np.uint16)
    assert any("val: 9 of 18 documents are empty; they" in fact for fact in prove_text(tokenizer, [], twice).facts)
    assert said([*(f"number {n}" for n in range(200)), "number 5"])[0].startswith("val: 1 of 201 documents repeat")


def test_markers_that_are_ordinary_pieces_or_bytes_are_found_in_the_text(tokenizer):
    marked = [text[:600].replace("a", "\ue001a") for text in TEXTS[:20]]
    other = [text.replace("\ue001", mark) for text, mark in zip(marked, "\U000f0001\ufdd0" * 10, strict=True)]
    control = [text.replace("\ue001", "\x01") for text in marked]
    for one, texts in ((tokenizer, marked), (Tokenizer(train_bpe(marked, 400)), marked), (tokenizer, other), (tokenizer, control)):
        with pytest.raises(GolfError, match=r"private-use or control characters, \d+\.\d % of its bytes"):
            prove_text(one, [], np.concatenate(one.encode_documents(texts)))
    found = prove_text(tokenizer, [], np.concatenate(tokenizer.encode_documents(["an icon \uf0e0", *TEXTS[:20]])))
    assert any(fact.startswith("WARNING: 1 private-use or control characters") for fact in found.facts)


def test_text_without_capitals_is_told(tokenizer):
    """Folded, or transformed with marks that look like text."""
    for change in (str.lower, lambda text: re.sub("[A-Z]", lambda capital: f"<cap>{capital[0].lower()}", text)):
        facts = prove_text(tokenizer, [], np.concatenate(tokenizer.encode_documents([change(text) for text in TEXTS[:20]]))).facts
        assert any(re.match("WARNING: [0-9,]+ small letters of validation and hardly a capital", fact) for fact in facts)


def test_lossy_normalisation_is_named():
    folding = trained(normalization_rule_name="nmt_nfkc_cf")
    assert len(folding.changes()) == 4 and "case is folded" in folding.changes()


def test_any_other_loss_is_named(tmp_path):
    (tmp_path / "rules.tsv").write_text("E9\t65\nDF\t73 73\n")
    assert trained(normalization_rule_tsv=str(tmp_path / "rules.tsv")).changes()[-1] == "2 other characters are replaced ('\\xdf' by 'ss')"
    suffix = trained(treat_whitespace_as_suffix=True)
    assert suffix.changes()[-1] == "a space is put behind every document and counts 1 byte"
    assert suffix.decode(suffix.encode("two words")) == "two words "


def test_text_without_spaces_trains_a_tokenizer_that_has_one():
    own = Tokenizer(train_bpe(["天地玄黄宇宙洪荒" * 500], 280))
    assert own.decode(own.encode("天 地  a")) == "天 地  a"
    check_tables(own, np.concatenate(own.encode_documents(["天 地  a"])))


def test_bad_text_is_told_as_itself_while_a_tokenizer_is_trained(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\xff")
    with pytest.raises(GolfError, match=r"^\S*a.txt:2: not UTF-8 text \(byte 5\)$"):
        train_bpe(read_documents([tmp_path / "a.txt"]), 300)


def test_unknown_characters_are_refused():
    without = trained(byte_fallback=False)
    with pytest.raises(GolfError, match="unknown tokens"):
        prove_text(without, [], np.concatenate(without.encode_documents(["plain", "a 日 b"])))
    with pytest.raises(GolfError, match="unknown tokens"):  # not "another tokenizer" where no document is without
        prove_text(without, [], np.concatenate(without.encode_documents(["c 日", "a 日 b"])))
    whole = trained()
    with pytest.raises(GolfError, match="byte pieces write every text without one: not its text"):
        prove_text(whole, [], np.array([whole.bos_id, 40, whole.processor.unk_id(), 41], np.uint16))


@pytest.mark.parametrize(
    "options",
    [
        {"split_by_whitespace": False},
        {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
        {"treat_whitespace_as_suffix": True, "add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    ],
)
def test_models_with_spaces_inside_pieces_are_counted(options):
    model = trained(**options)
    texts = [*TEXTS[:20], "the end of  the\n    end"]
    tokens = np.concatenate(model.encode_documents(texts))
    assert prove_text(model, [], tokens).val_bytes == sum(len(model.decode(model.encode(text)).encode()) for text in texts)


@pytest.mark.parametrize("change", [lambda d: np.append(d, 2), lambda d: d[:-3], lambda d: d])
def test_validation_text_in_training_is_refused(tokenizer, split, change):
    leak = np.concatenate([change(np.array([1, *tokenizer.encode(TEXTS[0])])), [1, 40]]).astype(np.uint16)
    val = np.concatenate(tokenizer.encode_documents(TEXTS[:5]))
    with pytest.raises(GolfError, match="1 of 5 validation documents are training documents"):
        prove_text(tokenizer, [split[0][0][-1:], leak], val)


def test_a_common_header_is_told_and_not_refused(tokenizer):
    """Source files begin with the same licence; 512 tokens of it, or half of a document, would be trained on."""
    licence, bodies = TEXTS[0][:600], [part for text in TEXTS for part in cut(text) if len(part) > 5000]
    train, val = [licence + body for body in bodies[:3]], [licence + body for body in bodies[3:7]]
    found = prove_text(tokenizer, [np.concatenate(tokenizer.encode_documents(train))], np.concatenate(tokenizer.encode_documents(val)))
    assert found.overlap == Overlap(4, 3, 0, 4)
    assert found.facts[-1].startswith("WARNING: overlap: 0 of 4 validation documents are in training, 4 more begin as one there")


def test_validation_text_inside_training_documents_is_found(tokenizer, monkeypatch):
    """Joined, split over two, with something before it; not what shares a licence, or a paragraph that many have, or is short."""
    licence, other, *parts = [part for text in TEXTS for part in cut(text) if len(part) > 2500]
    quoted = [f"{number} {parts[3][:500]} end of {number}" for number in range(12)]
    held_out = [parts[0][:2000], parts[1][:700], licence[:900] + parts[2][:1500], "as short as this", quoted[0]]
    joined, split = other + parts[0][:2000] + other, ["#!" + parts[1][:400], parts[1][390:700] + other]
    train = [joined, *split, other + licence[:900], "not as short as this"]

    def overlap(train, inside=True):
        return find_overlap(*map(tokenizer.encode_documents, (train, held_out)), tokenizer, inside=inside)

    assert overlap(train) == Overlap(5, 5, 2, 0)
    assert overlap([*train, other + parts[2][:1500]]).leaked == 3
    assert overlap([*train, *quoted[1:]]).leaked == 2
    assert overlap([*train, other + quoted[0]]).leaked == 3
    assert overlap([]) == Overlap(5, 0, 0, 0)
    monkeypatch.setattr("golf_jax.data.overlap.BLOCK", 300)  # as in long text
    assert overlap(train) == Overlap(5, 5, 2, 0) and overlap(train, inside=False) == Overlap(5, 5, 0, 0)


def test_a_window_is_found_at_every_position_and_lines_of_dashes_are_none():
    text = np.random.default_rng(0).integers(300, 500, 500_000, np.uint16)
    documents = [text[start : start + 64] for start in range(0, 499_000, 7919)] + [text[-64:], np.full(300, 7, np.uint16)]
    windows = _Windows(documents)
    windows.look(np.concatenate([text, np.full(9999, 7, np.uint16)]))
    assert windows.found().tolist() == [True] * (len(documents) - 1) + [False]


def test_less_overlap_than_is_refused_is_told(tokenizer, split):
    parts = [part for text in TEXTS for part in cut(text)]
    val = np.concatenate(tokenizer.encode_documents([f"{number} {part}" for number in range(8) for part in parts[:30]] + [parts[30]]))
    found = prove_text(tokenizer, split[0], val, seconds=60)
    assert found.overlap and found.overlap.leaked == 1 and "WARNING: overlap: 1 of 241" in found.facts[-1]


def test_control_tokens_inside_and_text_without_bytes_are_told(tokenizer, split):
    found = prove_text(tokenizer, [], np.concatenate([np.append(d, 2) for d in tokenizer.encode_documents(TEXTS[:4])]))
    assert any(fact.startswith("WARNING: 4 control tokens besides BOS") for fact in found.facts)
    with pytest.raises(GolfError, match="has no bytes"):
        prove_text(tokenizer, [], np.ones(500, np.uint16))


def test_pieces_that_never_occur_are_told_bytes_aside(tokenizer):
    tokens = np.concatenate(tokenizer.encode_documents(["abab " * 20_000]))
    assert vocabulary_use(tokenizer, tokens).startswith("WARNING: vocabulary: ")
    assert not vocabulary_use(tokenizer, np.tile(np.arange(259, 512), 100)).startswith("WARNING")


def test_identity_names_what_differs(tmp_path, tokenizer, split):
    def now():
        return identify(tokenizer.sha256, find_shards(tmp_path / "train_*.bin"), find_shards(tmp_path / "val_*.bin"))

    write_shard(tmp_path / "train_0.bin", split[0][0])
    write_shard(tmp_path / "val_0.bin", split[1])
    before = json.loads(json.dumps(now()))
    assert difference(before, now()) == ""
    assert "tokenizer" in difference(before, {**now(), "tokenizer": "0" * 64})
    write_shard(tmp_path / "train_0.bin", np.roll(split[0][0], 1))
    assert difference(before, now()) == "train shard train_0.bin: another content, sha256" and now()["digest"] != before["digest"]
    (tmp_path / "train_0.bin").rename(tmp_path / "train_1.bin")
    assert "train_0.bin" in difference(before, now())
    assert len(load_val_tokens(tmp_path / "val_0.bin")) == len(open_shard(tmp_path / "val_0.bin"))


@pytest.mark.parametrize("limit", [WHOLE_BYTES, 0])
def test_what_lies_between_the_samples_is_hashed_as_long_as_that_is_quick(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(identity, "WHOLE_BYTES", limit)
    path = write_shard(tmp_path / "train_0.bin", np.arange(2 * SAMPLES * SAMPLE_BYTES) % 1000)
    before, times = identify("", [path], []), path.stat()
    with path.open("r+b") as file:
        file.seek(3 * SAMPLE_BYTES)  # behind the second sample
        file.write(b"\x09\x01")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert difference(before, identify("", [path], [])) == ("train shard train_0.bin: another sha256" if limit else "")


def test_long_texts_are_cut_without_loss():
    for text in ("x" * 50_000, "word " * 20_000, "line\n" * 20_000, "a\n \n" * 20_000, "\n" * 200_000):
        parts = list(cut(text))
        assert "".join(parts) == text and len(parts) > 2 and max(map(len, parts)) <= 16_384


def test_files_as_people_have_them(tmp_path):
    (tmp_path / "a.JSONL").write_bytes(b'\xef\xbb\xbf{"content": "one"}\r\n{"content": "two"}\r\n')
    (tmp_path / "b.ndjson").write_text('{"content": "three"}\n')
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\x16\7")
    (tmp_path / "c.py").write_text("x = 1\r\n")
    files, skipped = find_files([tmp_path])
    assert list(read_documents(files, "content")) == ["one", "two", "three"]
    assert [path.name for path in skipped] == ["._a.jsonl", "c.py"]
    assert list(read_documents(find_files([tmp_path], "*.py")[0])) == ["x = 1\r\n"]
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(GolfError, match="deep.jsonl:1"):
        list(read_documents([tmp_path / "deep.jsonl"]))


def test_whatever_is_left_out_of_a_directory_is_named(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/one.txt").write_text("one")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/two.txt").write_text("two")
    os.mkfifo(tmp_path / "there/pipe.txt")
    for name, target in (("broken.txt", "nowhere"), ("folder", "elsewhere"), ("linked.txt", "elsewhere/two.txt")):
        (tmp_path / "there" / name).symlink_to(tmp_path / target)
    found, skipped = find_files([tmp_path / "there"])
    assert [path.name for path in found] == ["linked.txt", "one.txt"]
    assert [path.name for path in skipped] == ["broken.txt", "folder", "pipe.txt"]


def test_the_cache_has_a_place(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("GOLF_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg/golf_jax"
    monkeypatch.setenv("GOLF_JAX_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("GOLF_JAX_CACHE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_directory().parent == tmp_path and "GOLF_JAX_CACHE" in capsys.readouterr().err
    assert cache_directory().parent == tmp_path and not capsys.readouterr().err  # once in a command


def test_a_cache_that_can_be_read_only_is_told_once(tmp_path, monkeypatch, capsys):
    """The file with which that is found out has another name each time."""
    tried = iter(("one", "two"))

    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(dir / next(tried)))

    monkeypatch.delenv("GOLF_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert cache_directory() == cache_directory()
    assert capsys.readouterr().err.count(f"({tmp_path / 'xdg/golf_jax'}: Read-only file system)") == 1


def test_room_that_was_never_written_to_is_no_text(tokenizer, split):
    """A download that had reserved its room and ended early has the right size and header; a lost page may be anywhere."""
    hole = np.zeros(1 << 12, np.uint16)
    with pytest.raises(GolfError, match="training text: the 2,048 tokens from .* are all 0: part of the file was never written"):
        prove_text(tokenizer, [np.concatenate([split[0][0][:9999], hole, split[0][0][9999:]])], split[1])
    with pytest.raises(GolfError, match="validation text: the 2,048 tokens"):
        prove_text(tokenizer, [], np.concatenate([split[1], hole]))
    with pytest.raises(GolfError, match="validation text: the 65,536 tokens"):
        prove_text(tokenizer, [], np.concatenate([split[1], np.full(3 << 16, 300, np.uint16)]))


class Long(np.ndarray):
    """Tokens that count what is read of them."""

    read = 0

    def __getitem__(self, part):
        Long.read += 1
        return np.asarray(super().__getitem__(part))


def test_a_shard_in_which_no_document_ends_costs_no_more_time_than_others(tokenizer, split, monkeypatch):
    """4 GB of a single document, or of none: reading stops when the time is over, and what could not be proved is told or refused."""
    shard = np.random.default_rng(0).integers(300, 500, 1 << 24, np.uint16).view(Long)
    now = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(proof, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with pytest.raises(GolfError, match="training text: no document start"):
        prove_text(tokenizer, [shard], split[1], seconds=2)
    shard[0] = 1
    facts = prove_text(tokenizer, [shard], split[1], seconds=2).facts
    assert any(fact.startswith("WARNING: train: no whole document in what was read") for fact in facts)
    assert Long.read < 30
