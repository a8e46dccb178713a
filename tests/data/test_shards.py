"""Shards: what is written comes back, and every kind of damage is named."""

import os
import tracemalloc

import numpy as np
import pytest

from golf_jax.config import GolfError
from golf_jax.data.identity import identify, watch
from golf_jax.data.shards import HEADER_BYTES, find_shards, load_val_tokens, open_shard, write_shard


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "val_000000.bin", np.arange(100))


def test_header_and_tokens_have_the_challenges_layout(shard):
    raw = shard.read_bytes()
    assert np.frombuffer(raw[:12], "<i4").tolist() == [20240520, 1, 100] and not any(raw[12:HEADER_BYTES])
    assert np.frombuffer(raw[HEADER_BYTES:], "<u2").tolist() == list(range(100))


def test_a_shard_is_read_in_parts(shard):
    tokens = open_shard(shard)
    assert len(tokens) == 100 and tokens[:].dtype == np.uint16
    for part in (slice(None), slice(3, 8), slice(95, 300), slice(40, 40)):
        assert tokens[part].tolist() == list(range(100))[part]


def test_a_shard_may_be_deleted_or_replaced_while_it_is_read(shard):
    tokens = open_shard(shard)
    write_shard(shard, np.zeros(100, int))
    assert tokens[:].tolist() == list(range(100))
    shard.unlink()
    assert tokens[5:7].tolist() == [5, 6]


@pytest.mark.parametrize("damage", [lambda file: file.truncate(HEADER_BYTES + 20), lambda file: file.write(bytes(HEADER_BYTES + 200))])
def test_a_shard_truncated_or_overwritten_while_it_is_read_is_an_error(shard, damage):
    os.utime(shard, ns=(0, 0))
    tokens = open_shard(shard)
    with open(shard, "r+b") as file:
        damage(file)
    for part in (slice(0, 5), slice(90, 100)):
        with pytest.raises(GolfError, match="val_000000.bin: was truncated or altered while in use"):
            tokens[part]


@pytest.mark.parametrize("whole", [False, True])
def test_a_shard_that_is_touched_is_still_read_and_one_rewritten_under_its_old_time_is_not(tmp_path, whole):
    """As `rsync --inplace -t` leaves it; without the SHA-256 of a file only a sample tells."""
    tokens = np.arange(3_000_000) % 1000
    path = write_shard(tmp_path / "train_000000.bin", tokens)
    (entry,) = identify("", [path], [])["train"]
    watch([shard := open_shard(path)], [entry if whole else {k: v for k, v in entry.items() if k != "sha256"}])
    path.chmod(0o600)
    os.link(path, tmp_path / "also")
    assert shard[7:9].tolist() == [7, 8]
    before = path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + (70_000 if whole else 5))  # between the samples, or in one
        file.write(b"aa")
    os.utime(path, ns=(before, before))
    for part in (slice(0, 5), slice(90, 100)):
        with pytest.raises(GolfError, match="train_000000.bin: was truncated or altered while in use"):
            shard[part]


def test_a_directory_is_answered_with_globs(tmp_path):
    with pytest.raises(GolfError, match=rf"{tmp_path}: a directory; give a glob of its shards, .*/\*train_\*.bin' or .*/\*val_\*.bin'$"):
        load_val_tokens(str(tmp_path))


def test_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(GolfError, match="not a regular file"):
        open_shard(tmp_path / "pipe.bin")


def test_a_shard_of_4_gb_that_was_never_written_costs_nothing(shard, monkeypatch):
    count = 2**31 - 1
    with open(shard, "r+b") as file:
        file.seek(8)
        file.write(count.to_bytes(4, "little"))
        file.seek(HEADER_BYTES)
        file.truncate(HEADER_BYTES)
        file.truncate(HEADER_BYTES + 2 * count)
    tracemalloc.start()
    with pytest.raises(GolfError, match="val_000000.bin: the 2,048 tokens from 0 on are all 0: part of the file was never written"):
        load_val_tokens(shard)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    monkeypatch.setattr("golf_jax.data.shards.bytearray", lambda size: bytes(size) if size < 1 << 20 else no_memory(), raising=False)
    with pytest.raises(GolfError, match="val_000000.bin: there is too little memory for its 2,147,483,647 tokens"):
        open_shard(shard)[:]


def no_memory():
    raise MemoryError


def test_official_shards_open(shared):
    tokens = open_shard(shared / "data" / "fineweb_sp1024" / "fineweb_val_000000.bin")[:]
    assert tokens[0] == 1 and np.count_nonzero(tokens == 1) == 181


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw[:500], "truncated, 500 bytes where the header"),
        (lambda raw: b"", "truncated, 0 bytes"),
        (lambda raw: raw + b"\0\0", "2 trailing bytes"),
        (lambda raw: b"\1" + raw[1:], "not a token shard"),
        (lambda raw: raw[:4] + b"\2" + raw[5:], "version 2"),
        (lambda raw: raw[:8] + b"\0\0\0\0" + raw[12:], "0 tokens"),
        (lambda raw: raw[:8] + b"\xff\xff\xff\xff" + raw[12:], "-1 tokens"),
    ],
)
def test_damage_is_told_in_one_line_with_the_file(shard, damage, message):
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(GolfError, match=message) as caught:
        open_shard(shard)
    assert str(shard) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_empty_glob(tmp_path):
    with pytest.raises(GolfError, match="No such file"):
        open_shard(tmp_path / "none.bin")
    with pytest.raises(GolfError, match="no shard matches"):
        find_shards(tmp_path / "*.bin")


def test_shards_are_found_in_name_order_and_concatenated(tmp_path):
    for number in (2, 0, 1):
        write_shard(tmp_path / f"val_{number}.bin", np.full(3, number))
    assert load_val_tokens(tmp_path / "val_*.bin").tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_folder_whose_name_looks_like_a_glob_is_itself(tmp_path):
    (tmp_path / "[2024]").mkdir()
    write_shard(tmp_path / "[2024]/val_0.bin", np.arange(9))
    assert [path.name for path in find_shards(tmp_path / "[2024]/val_*.bin")] == ["val_0.bin"]
    write_shard(tmp_path / "val_1.bin", np.arange(9))
    assert [path.name for path in find_shards(tmp_path / "val_[01].bin")] == ["val_1.bin"]


def test_byte_sidecars_are_not_taken_for_tokens(tmp_path, shard):
    write_shard(tmp_path / "val_bytes_000000.bin", np.arange(3))
    assert find_shards(tmp_path / "val_*.bin") == [shard]
    with pytest.raises(GolfError, match="sidecar"):
        find_shards(tmp_path / "val_bytes_*.bin")


def test_tokens_outside_the_vocabulary_are_refused(tmp_path, shard):
    assert load_val_tokens(shard, vocab_size=100).size == 100
    with pytest.raises(GolfError, match="token 99 is outside a vocabulary of 99"):
        load_val_tokens(shard, vocab_size=99)


@pytest.mark.parametrize("tokens", [np.array([-1, 2]), np.array([65536]), np.empty(0, int), np.zeros((2, 2), int), np.ones(3)])
def test_what_is_no_token_array_is_not_written(tmp_path, tokens):
    with pytest.raises(GolfError):
        write_shard(tmp_path / "x.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_a_failing_disk_leaves_the_old_file_and_no_rest(tmp_path, shard, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = shard.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GolfError, match="No space left on device"):
        write_shard(shard, np.arange(50))
    assert [path.name for path in tmp_path.iterdir()] == [shard.name] and shard.read_bytes() == before
