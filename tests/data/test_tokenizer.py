"""Tokenizers: byte tables equal the challenge's and the decoded text; the known denominator bugs are errors."""

import dataclasses
import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from golf_jax.config import GolfError
from golf_jax.data.corpus import documents
from golf_jax.data.shards import open_shard
from golf_jax.data.tokenizer import Tokenizer, byte_tables, check_tables, count_bytes, split_documents, train_bpe

ODD_TEXTS = [
    "Hello world.\n\n  Two  spaces, a\ttab.",
    "naïve café, 日本語, 😀, \u200b zero width, e\u0301, \x00\x01, \ufeff",
    " \u2581 \u2581\u2581x \u00a0y",
    "<s> </s> <unk> <pad> <0x41>",
    "１２３ ﬁ ½ … 12345678901234567890",
]


@pytest.fixture(scope="module")
def texts():
    return documents()[:60]


@pytest.fixture(scope="module")
def trained(texts):
    return Tokenizer(train_bpe(texts, 512))


def shard_of(tokenizer, texts):
    return np.concatenate(tokenizer.encode_documents(texts))


def train(texts, vocab_size=400, **options):
    model = io.BytesIO()
    settings = {"model_type": "bpe", "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line),
        model_writer=model,
        vocab_size=vocab_size,
        **settings,
        **options,
    )
    return Tokenizer(model.getvalue())


@pytest.mark.parametrize(("pr", "vocab"), [(372, 1024), (562, 1024), (638, 1024), (1182, 1024), (2005, 8192)])
def test_tables_equal_those_of_the_records(shared, pr, vocab):
    stored = np.load(shared / f"reference/pr{pr}/eval.npz")
    tables = byte_tables(Tokenizer(shared / f"data/tokenizers/fineweb_{vocab}_bpe.model").processor)
    assert tables.base_bytes.dtype == np.int16
    for field, name in zip(dataclasses.astuple(tables), ("base_bytes", "leading_space", "boundary"), strict=True):
        np.testing.assert_array_equal(field, stored[f"data/{name}"])


@pytest.mark.parametrize("vocab", [1024, 8192])
def test_official_validation_text_is_counted_exactly(shared, vocab):
    tokenizer = Tokenizer(shared / f"data/tokenizers/fineweb_{vocab}_bpe.model")
    tokens = open_shard(shared / f"data/fineweb_sp{vocab}/fineweb_val_000000.bin")[:]
    assert tokenizer.vocab_size == vocab and tokenizer.bos_id == 1
    decoded = sum(len(tokenizer.decode(ids).encode()) for ids in split_documents(tokens, 1))
    assert check_tables(tokenizer, tokens) == decoded


def test_both_official_tokenizers_count_the_same_bytes(shared):
    counts = [
        check_tables(
            Tokenizer(shared / f"data/tokenizers/fineweb_{vocab}_bpe.model"),
            open_shard(shared / f"data/fineweb_sp{vocab}/fineweb_val_000000.bin")[:],
        )
        for vocab in (1024, 8192)
    ]
    assert counts[0] == counts[1]


def test_real_and_odd_text_is_counted_exactly(trained, texts):
    tokens = shard_of(trained, [*texts, *ODD_TEXTS])
    assert check_tables(trained, tokens) == sum(len(trained.decode(trained.encode(t)).encode()) for t in [*texts, *ODD_TEXTS])


def test_documents_are_decoded_together_as_one_by_one(trained, texts):
    documents = [*trained.encode_documents(texts), np.array([], np.uint16), np.array([trained.bos_id], np.uint16)]
    assert trained.decode_documents(documents) == [trained.decode(ids) for ids in documents]
    assert trained.decode_documents([]) == [] and trained.decode_documents(documents[-2:-1]) == [""]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(), st.text("a \u2581\t\n\u00a0é1"), st.sampled_from(ODD_TEXTS)), min_size=1, max_size=4))
def test_any_text_is_counted_exactly(trained, random_texts):
    tables = byte_tables(trained.processor)
    for text in random_texts:
        ids = np.array([trained.bos_id, *trained.encode(text)])
        assert count_bytes(tables, ids[:-1], ids[1:]).sum() == len(trained.decode(ids).encode())
    check_tables(trained, shard_of(trained, random_texts))


def test_dummy_prefix_models_lose_their_first_space_on_both_sides(texts):
    tokenizer = train(texts, byte_fallback=True, add_dummy_prefix=True)
    tokens = shard_of(tokenizer, texts)
    assert byte_tables(tokenizer.processor).has_leading_space[tokens[1]]
    assert check_tables(tokenizer, tokens) == sum(len(tokenizer.decode(tokenizer.encode(text)).encode()) for text in texts)


@pytest.mark.parametrize("bug", ["byte pieces as text", "space twice", "control as text"])
def test_known_denominator_bugs_are_errors(trained, bug):
    tables, size = byte_tables(trained.processor), trained.vocab_size
    if bug == "byte pieces as text":  # PR 1143, 1184
        wrong = np.where([trained.processor.is_byte(i) for i in range(size)], 3, tables.base_bytes)
        tables = dataclasses.replace(tables, base_bytes=wrong)
    elif bug == "space twice":  # issue 1719
        tables = dataclasses.replace(tables, base_bytes=tables.base_bytes + [piece.startswith("\u2581") for piece in trained.pieces])
    else:
        base = tables.base_bytes.copy()
        base[trained.processor.eos_id()] = 4
        tables = dataclasses.replace(tables, base_bytes=base)
    good = trained.encode_documents(["plain text"])[0]
    bad = np.append(trained.encode_documents(["a plain 日 text"])[0], np.uint16(trained.processor.eos_id()))
    check_tables(trained, np.concatenate([good, bad]))
    with pytest.raises(GolfError, match=r"for document [01], its text has"):
        check_tables(trained, np.concatenate([good, bad]), tables)


def test_the_first_differing_document_is_named(trained):
    good, bad = trained.encode_documents(["plain text", "日本"])
    tables = byte_tables(trained.processor)
    base = tables.base_bytes.copy()
    base[bad[1]] = 3
    with pytest.raises(GolfError, match="document 2, its text has 6: '日本'"):
        check_tables(trained, np.concatenate([good, good, bad, bad]), dataclasses.replace(tables, base_bytes=base))


def test_a_vocabulary_without_a_lone_space_is_an_error(texts):
    """Issue 897: with the space piece gone, decoded text and tables agree on 3 bytes for it, and both are wrong."""
    tokenizer = train(texts, byte_fallback=True, add_dummy_prefix=False)
    processor = tokenizer.processor
    space = processor.piece_to_id("\u2581")
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    proto.pieces[space].piece = "\U0001f9ea"
    with pytest.raises(GolfError, match="no piece for a lone space"):
        check_tables(Tokenizer(proto.SerializeToString()), np.array([1, 40, 41]))


def test_unknown_tokens_are_an_error(texts):
    tokenizer = train(texts, byte_fallback=False, add_dummy_prefix=False)
    with pytest.raises(GolfError, match="byte tables count"):
        check_tables(tokenizer, shard_of(tokenizer, ["日 text"]))


def test_broken_characters_are_told_as_that_and_not_as_a_fault_of_the_tables(trained):
    """A last token that is a byte from the middle of a character: no end of the stream, and no text."""
    tokens = shard_of(trained, ["text 日"])
    with pytest.raises(GolfError, match=r"the tokens of document 0 are not text, they decode to broken characters \('.*\\ufffd'\)"):
        check_tables(trained, np.append(tokens[:-3], tokens[-1:]))


def test_a_stream_cut_inside_a_character_passes(trained):
    tokens = trained.encode_documents(["text 日"])[0]
    assert check_tables(trained, tokens[:-1]) == check_tables(trained, tokens) - 3
    assert check_tables(trained, np.concatenate([tokens[2:], tokens])) == check_tables(trained, tokens)


def test_training_is_deterministic_and_follows_the_challenges_settings(trained, texts, capfd):
    model = train_bpe(texts, 512)
    assert model == trained.model and Tokenizer(model).sha256 == trained.sha256
    assert "".join(capfd.readouterr()) == ""
    processor = trained.processor
    assert [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()] == [0, 1, 2, 3]
    assert all(processor.is_byte(token) for token in range(4, 260)) and processor.vocab_size() == 512


def test_too_little_text_and_broken_models_are_refused(tmp_path):
    with pytest.raises(GolfError, match="vocab_size=1024"):
        train_bpe(["a few words"], 1024)
    with pytest.raises(GolfError, match="No such file"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(GolfError, match="bad.model: not a SentencePiece model"):
        Tokenizer(tmp_path / "bad.model")
    with pytest.raises(GolfError, match="SentencePiece|empty"):
        Tokenizer(b"")


def test_a_normalizer_whose_replacements_are_no_text_is_one_line(texts):
    """Bits flipped in the strings behind its trie: SentencePiece opens it, and fails on every character that it replaces."""
    out = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, **settings)
    spec = sentencepiece_model_pb2.ModelProto.FromString(out.getvalue())
    rules = spec.normalizer_spec.precompiled_charsmap
    start = 4 + int.from_bytes(rules[:4], "little")
    spec.normalizer_spec.precompiled_charsmap = rules[:start] + bytes(byte and 0xDA for byte in rules[start:])
    with pytest.raises(GolfError, match=r"tokenizer bad.model: cannot normalize \(.*\): a damaged model"):
        Tokenizer(spec.SerializeToString(), "bad.model").changes()
