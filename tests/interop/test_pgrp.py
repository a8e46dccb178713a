"""PR 2135's code frame: written here by its description, read back; damaged ones refused in one line."""

import os
import resource
import struct

import brotli
import numpy as np
import pytest

from golf_jax.config import GolfError
from golf_jax.interop import pgrp


def frame(tensors, remainder=b"rest", method=0):
    head, raw = [pgrp.MAGIC + struct.pack("<II", 2, len(tensors))], []
    for name, codes in sorted(tensors.items()):
        order = pgrp.row_order(codes)
        head.append(struct.pack("<H", len(name)) + name.encode() + struct.pack("<II", *codes.shape) + order.astype("<u2").tobytes())
        raw.append(codes[order].T.tobytes())
    stored = brotli.compress(b"".join(raw))
    return b"".join(head) + struct.pack("<BI", method, len(stored)) + stored + struct.pack("<I", len(remainder)) + remainder


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {f"blocks.{i}.w.q": rng.integers(-31, 32, (7 + i, 5)).astype(np.int8) for i in (0, 2, 10)}


def test_codes_and_remainder_come_back(tensors):
    codes, rest = pgrp.split(frame(tensors))
    assert rest == b"rest" and codes.keys() == tensors.keys()
    assert all(np.array_equal(codes[n], x) for n, x in tensors.items())
    data = frame(tensors)
    assert pgrp.sizes(data)[0] == 3 and sum(pgrp.sizes(data)[2:5]) == len(data) == pgrp.sizes(data)[6]


def test_rows_that_look_alike_lie_together():
    codes = np.array([[0, 0], [9, 9], [1, 0], [9, 8], [1, 1]], np.int8)
    assert pgrp.row_order(codes).tolist() == [0, 2, 4, 3, 1]


def test_damage_is_refused(tensors):
    data = frame(tensors)
    for cut in (8, 20, 60, len(data) - 1):
        with pytest.raises(GolfError):
            pgrp.split(data[:cut])
    with pytest.raises(GolfError, match="permutation"):
        at = data.index(b"blocks.0") + len("blocks.0.w.q") + 8
        pgrp.split(data[:at] + b"\x01\x00" * 2 + data[at + 4 :])


def test_a_missing_lrzip_is_named(tensors, monkeypatch):
    monkeypatch.setattr(pgrp.shutil, "which", lambda name: None)
    with pytest.raises(pgrp.NotInstalled, match="install lrzip"):
        pgrp.split(frame(tensors, method=1))


def test_a_bomb_for_lrzip_ends_at_the_size_of_the_codes(tensors, monkeypatch, tmp_path):
    """An lrzip that would write 1 GB for 165 codes, -d -q -o OUT IN."""
    (tmp_path / "lrzip").write_text('#!/bin/sh\nhead -c 1000000000 /dev/zero > "$4"\n')
    (tmp_path / "lrzip").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begin = resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock
    with pytest.raises(GolfError, match="not a whole lrzip stream"):
        pgrp.split(frame(tensors, method=1))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_oublock - begin < 1000
