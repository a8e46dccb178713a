"""Window lists: what each rule promises, for any length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf_jax.config import GolfError
from golf_jax.evaluation.windows import chunk_windows, sliding_windows, standard_windows, truncate

SHAPES = st.tuples(st.integers(1, 400), st.integers(1, 6), st.integers(1, 12))  # targets, windows per stride, stride


def scores_per_target(windows, targets):
    counts = np.zeros(targets, int)
    for start, length, score_from in zip(windows.start, windows.length, windows.score_from, strict=True):
        assert start + length <= targets
        counts[start + score_from : start + length] += 1
    return counts


@given(SHAPES)
def test_exact_scores_every_target_once_with_full_context(shape):
    targets, ratio, stride = shape
    seq_len = ratio * stride
    windows = sliding_windows("exact", targets, seq_len, stride)
    assert (scores_per_target(windows, targets) == 1).all()
    assert (windows.score_from[1:] == seq_len - stride).all()


@given(SHAPES)
def test_tail_repeats_only_the_last_stride(shape):
    targets, ratio, stride = shape
    seq_len = ratio * stride
    counts = scores_per_target(sliding_windows("tail", targets, seq_len, stride), targets)
    assert (counts[: max(targets - stride, 0)] == 1).all() and counts.min() >= 1
    shorter = sliding_windows("tail_min", targets, seq_len, stride)
    assert (shorter.length[1:] >= stride).all()


def test_official_counts():
    targets = 62_021_632
    assert len(sliding_windows("pr372", targets, 2048, 64)) == 969_056
    for rule in ("tail", "tail_min"):
        windows = sliding_windows(rule, targets, 2048, 64)
        assert len(windows) == 969_088
        assert int((windows.length - windows.score_from).sum()) == 62_023_616
    windows = sliding_windows("exact", 40_540_160, 2048, 64)
    assert len(windows) == 633_409
    assert int((windows.length - windows.score_from).sum()) == 40_540_160


def test_official_chunks():
    windows, chunk = chunk_windows("exact", 40_540_160, 2048, 64, 32_768)
    counts = np.bincount(chunk)
    assert len(counts) == 1238 and (counts[0], counts[-1]) == (481, 96) and set(counts[1:-1]) == {512}
    windows, chunk = chunk_windows("tail", 62_021_632, 2048, 64, 32_768)
    assert len(windows) == 969_088 and chunk.max() == 1892
    first = windows.start + windows.score_from
    assert (first // 32_768 == chunk).all()


def test_truncation_keeps_whole_rows_and_one_input():
    tokens = np.arange(100, dtype=np.uint16)
    assert len(truncate(tokens, 32)) == 97
    assert len(truncate(tokens, 32, max_targets=40)) == 33
    assert len(truncate(tokens, 32, max_targets=1)) == 33
    with pytest.raises(GolfError, match="one row of 128"):
        truncate(tokens, 128)


def test_standard_rows_are_scored_in_full():
    windows = standard_windows(100, 32)
    assert scores_per_target(windows, 100)[:96].min() == 1 and len(windows) == 3
