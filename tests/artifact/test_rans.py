"""The entropy coder: lossless for any codes, near the entropy, better than the compressors where rows differ, and safe to decode."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_jax.artifact import ArtifactError
from golf_jax.artifact.compressors import COMPRESSORS
from golf_jax.artifact.rans import PROB_BITS, _normalize, decode, encode


def joined(matrices):
    return b"".join(m.tobytes() for m in matrices)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_lossless(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    matrices = []
    for _ in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.tuples(st.integers(0, 40), st.integers(1, 60)))
        spread = data.draw(st.sampled_from([0, 1, 20, 127]))
        matrices.append(rng.integers(-spread - 1 if spread == 127 else -spread, spread + 1, shape).astype(np.int8))
    if not sum(m.size for m in matrices):
        return
    assert decode(encode(matrices), [m.shape for m in matrices]) == joined(matrices)


def gaussian(rows, columns, row_spread, column_spread):
    rng = np.random.default_rng(0)
    sigma = 5 * np.exp(row_spread * rng.standard_normal((rows, 1)) + column_spread * rng.standard_normal((1, columns)))
    return np.clip(np.rint(sigma * rng.standard_normal((rows, columns))), -31, 31).astype(np.int8)


@pytest.mark.parametrize("row_spread, column_spread, gain", [(0, 0, 0.0), (0.3, 0, 0.01), (0.3, 0.3, 0.02)])
def test_beats_the_compressors_on_weight_codes(row_spread, column_spread, gain):
    codes = gaussian(1536, 512, row_spread, column_spread)
    ours = len(encode([codes]))
    theirs = min(len(COMPRESSORS[name].compress(codes.tobytes(), level)) for name, level in (("zstd", 22), ("lzma", 9), ("brotli", 9)))
    assert ours < theirs * (1 - gain)


def test_equal_rows_cost_their_entropy():
    codes = gaussian(1024, 1024, 0, 0)
    counts = np.bincount(codes.view(np.uint8).ravel())
    counts = counts[counts > 0]
    entropy = (counts * np.log2(codes.size / counts)).sum() / 8
    assert len(encode([codes])) < 1.005 * entropy


def test_histograms_sum_up_and_keep_rare_symbols():
    for counts in ([10**7] + [1] * 255, [0] * 256, [1] * 256, [0] * 255 + [5], [3, 10**6, 7] + [0] * 253):
        freq = _normalize(np.array(counts))
        assert freq.sum() == 1 << PROB_BITS
        assert (freq[np.array(counts) > 0] > 0).all()


def test_damaged_streams_are_refused_or_decode_to_the_right_size():
    matrices = [gaussian(20, 30, 0.3, 0), gaussian(7, 9, 0, 0)]
    data, shapes = encode(matrices), [m.shape for m in matrices]
    rng = np.random.default_rng(1)
    for cut in range(0, len(data), 3):
        with pytest.raises(ArtifactError):
            decode(data[:cut], shapes)
    for i in range(len(data)):
        altered = bytearray(data)
        altered[i] ^= int(rng.integers(1, 256))
        try:
            assert len(decode(bytes(altered), shapes)) == sum(m.size for m in matrices)
        except ArtifactError:
            pass
    with pytest.raises(ArtifactError):
        decode(data, [(20, 30), (7, 10)])
