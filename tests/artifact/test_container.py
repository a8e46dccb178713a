"""The container gives back what went in, in the same bytes every time, and refuses everything else with one error class."""

import hashlib
import json
import struct
import tracemalloc

import brotli
import ml_dtypes
import numpy as np
import pytest
import zstandard
from reference_quant import RECIPES, quant_case, stored

from golf_jax.artifact import ArtifactError, pack, unpack
from golf_jax.artifact.codecs import exactly
from golf_jax.artifact.compressors import COMPRESSORS as TABLE
from golf_jax.artifact.container import _PREFIX, section_plan
from golf_jax.config import GolfError
from golf_jax.opening import load
from golf_jax.quant import QTensor

COMPRESSORS = {"zstd": 22, "lzma": 6, "brotli": 11, "rans": 11}


def decompress(name, data, size):
    return exactly(TABLE[name].decompress, name, data, size)


def small_model(seed=0):
    rng = np.random.default_rng(seed)

    def coded(kind, limit, rows, columns):
        codes = rng.integers(-limit, limit, (rows, columns)).astype(np.int8)
        return QTensor(kind, "float32", codes=codes, scale=rng.random(rows).astype(np.float16))

    return {
        "skip_weights": QTensor("float16", "float32", values=rng.random((2, 4)).astype(np.float16)),
        "tok_emb.weight": QTensor("bfloat16", "bfloat16", values=rng.random((5, 4)).astype(ml_dtypes.bfloat16)),
        "bigram.scale": QTensor("float32", "float32", values=np.float32(0.25) * np.ones((), np.float32)),
        "blocks.0.mlp.fc.weight": coded("int5", 15, 6, 4),
        "blocks.1.mlp.fc.weight": coded("int5", 15, 6, 4),
        "blocks.0.attn.c_q.weight": coded("int6", 31, 4, 4),
        "bigram.embed.weight": coded("int8", 127, 7, 3),
    }


def assert_same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert (a[name].kind, a[name].dtype, a[name].shape) == (b[name].kind, b[name].dtype, b[name].shape), name
        for part in ("codes", "scale", "values"):
            x, y = getattr(a[name], part), getattr(b[name], part)
            assert (x is None) == (y is None)
            assert x is None or (x.dtype == y.dtype and x.tobytes() == y.tobytes()), name


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_round_trip_keeps_everything_and_is_deterministic(compressor):
    model = small_model()
    header = {"model": {"width": 4, "layers": [1, 2]}, "note": "ü"}
    data = pack(header, model, compressor, COMPRESSORS[compressor])
    assert data == pack(header, small_model(), compressor, COMPRESSORS[compressor])
    back_header, back = unpack(data)
    assert back_header == header
    assert_same(model, back)


def test_empty_tensors_and_empty_model_survive():
    model = {"a": QTensor("float16", "float32", values=np.zeros((0, 3), np.float16))}
    assert_same(model, unpack(pack({}, model, "zstd", 3))[1])
    assert unpack(pack({}, {}, "brotli", 11)) == ({}, {})


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_every_flipped_byte_and_every_truncation_is_refused(compressor):
    data = pack({"a": 1}, small_model(), compressor, COMPRESSORS[compressor])
    rng = np.random.default_rng(1)
    for i in range(len(data)):
        for flip in (1 << int(rng.integers(8)), 0xFF):
            altered = bytearray(data)
            altered[i] ^= flip
            with pytest.raises(ArtifactError):
                unpack(bytes(altered))
        with pytest.raises(ArtifactError):
            unpack(data[:i])


def reseal(data: bytes) -> bytes:
    """The hash of a forged file made right again."""
    prefix, body = data[: _PREFIX.size], data[_PREFIX.size + 32 :]
    return prefix + hashlib.sha256(prefix + body).digest() + body


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_forged_hashes_still_end_in_the_error_or_a_model(compressor):
    """Behind a valid hash any byte may be anything (rans: every few): ArtifactError or well-formed tensors, no other exception."""
    data = pack({"a": 1}, small_model(), compressor, COMPRESSORS[compressor])
    rng = np.random.default_rng(2)
    refused = 0
    for i in [*range(_PREFIX.size), *range(_PREFIX.size + 32, len(data), 1 + len(data) // 2000)]:
        altered = bytearray(data)
        altered[i] ^= int(rng.integers(1, 256))
        try:
            _, tensors = unpack(reseal(bytes(altered)))
            assert all(np.isfinite(q.scale if q.scale is not None else q.values).all() for q in tensors.values())
        except ArtifactError:
            refused += 1
    assert refused > 20


def forge(table, sections=(), raw_head=None, compressor=0):
    """A file with a valid prefix and hash around any header."""
    head = zstandard.ZstdCompressor().compress(json.dumps(table).encode() if raw_head is None else raw_head)
    size = len(json.dumps(table).encode() if raw_head is None else raw_head)
    body = head + b"".join(sections)
    prefix = _PREFIX.pack(b"GOLF", 1, compressor, _PREFIX.size + 32 + len(body), len(head), size)
    return reseal(prefix + bytes(32) + body)


def table(tensors, lengths, header=None):
    return {"header": header or {}, "tensors": tensors, "sections": lengths}


def test_messages_say_what_is_wrong():
    data = pack({}, small_model(), "zstd", 3)
    scale = zstandard.ZstdCompressor().compress(np.array([np.nan], np.float16).tobytes())
    codes = zstandard.ZstdCompressor().compress(b"\x01")
    bad_code = zstandard.ZstdCompressor().compress(b"\x1f")
    good_scale = zstandard.ZstdCompressor().compress(np.ones(1, np.float16).tobytes())
    one = [["a", "int5", "float32", [1, 1]]]
    cases = {
        "does not begin with GOLF": b"PK" + data[2:],
        "truncated": data[:-1],
        "trailing": data + b"\0",
        "altered": data[:-1] + bytes([data[-1] ^ 1]),
        "version 9": data[:4] + b"\x09" + data[5:],
        "unknown compressor": forge(table([], []), compressor=7),
        "not valid JSON": forge(None, raw_head=b"[" * 100_000),
        "NaN": forge(table(one, [len(codes), len(scale)]), [codes, scale]),
        "outside int5": forge(table(one, [len(bad_code), len(good_scale)]), [bad_code, good_scale]),
        "fewer bytes|instead of": forge(table([["a", "int5", "float32", [2, 1]]], [len(codes), len(good_scale)]), [codes, good_scale]),
        "bad shape": forge(table([["a", "float16", "float32", [-1]]], [])),
        "at most": forge(table([["a", "float32", "float32", [1 << 30, 4]]], [0])),
        "occurs twice": forge(table([["a", "float16", "float32", [1]]] * 2, [1])),
        "unknown kind": forge(table([["a", "int9", "float32", [1, 1]]], [1])),
        "need a matrix": forge(table([["a", "int6", "float32", [4]]], [1])),
        "add up": forge(table(one, [len(codes), 1]), [codes, good_scale]),
        "needs 2": forge(table(one, [len(codes)]), [codes]),
    }
    for message, bad in cases.items():
        with pytest.raises(ArtifactError, match=message):
            unpack(bad)


def test_files_are_named_in_errors(tmp_path):
    path = tmp_path / "x.golf"
    with pytest.raises(GolfError, match="x.golf: cannot be read"):
        load(path)
    path.write_bytes(pack({}, small_model(), "zstd", 3)[:-5])
    with pytest.raises(ArtifactError, match="x.golf: truncated"):
        load(path)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_bomb_is_stopped_at_the_checked_size(compressor):
    """A stream of 64 MiB of zeros behind a table that announces 1000 bytes is refused, and no more than a little is allocated."""
    bomb = TABLE[compressor].compress(bytes(64 << 20), 3)
    if compressor == "zstd":  # also one whose frame header lies about the size
        writer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        with pytest.raises(ArtifactError):
            decompress("zstd", writer.compress(bytes(1 << 20)) + writer.flush(), 1000)
        lying = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 20)))
        at = bytes(lying).index(struct.pack("<I", 1 << 20))
        lying[at : at + 4] = struct.pack("<I", 1000)
        with pytest.raises(ArtifactError):
            decompress("zstd", bytes(lying), 1000)
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError):
            decompress(compressor, bomb, 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_bytes_behind_a_stream_are_refused():
    for name, level in COMPRESSORS.items():
        stream = TABLE[name].compress(b"abc" * 50, level)
        assert decompress(name, stream, 150) == b"abc" * 50
        for bad in (stream + b"\0", stream[:-1], brotli.compress(b"zz")):
            with pytest.raises(ArtifactError):
                decompress(name, bad, 150)


@pytest.mark.parametrize("pr", RECIPES)
def test_no_larger_than_the_prs_own_packing(pr, references):
    case = quant_case(pr, references)
    codes, config = stored(case), case.recipe.quant
    data, theirs = pack({"model": {"width": 24}}, codes, config.compressor, config.level), case.own["artifact"]
    assert len(data) <= len(theirs), (len(data), len(theirs))
    assert_same(codes, unpack(data)[1])


def test_layers_of_one_role_share_a_stream():
    from golf_jax.artifact.container import Entry

    entries = [Entry(f"blocks.{i}.mlp.fc.weight", "int6", "float32", (4, 4)) for i in range(3)]
    labels = [s.label for s in section_plan(entries)]
    assert labels == ["int6 mlp.fc", "scales"]
