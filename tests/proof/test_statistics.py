"""The tests agree with SciPy's, and the written rule is about the gain above its margin."""

import numpy as np
import pytest
from scipy import stats

from golf_jax.proof.statistics import paired_test, t_test

A, B = [1.8850, 1.8861, 1.8846], [1.8951, 1.8940, 1.8962, 1.8949]


def test_welch():
    ours = t_test(A, B)
    reference = stats.ttest_ind(np.array(B) - 0.005, A, equal_var=False, alternative="greater")
    assert (ours.t, ours.p, ours.degrees) == pytest.approx((reference.statistic, reference.pvalue, reference.df), rel=1e-9)
    assert ours.p < 0.01 < t_test(A, [b - 0.004 for b in B]).p


def test_one_published_number_as_baseline():
    assert t_test(A, [1.895]).p == pytest.approx(stats.ttest_1samp(A, 1.890, alternative="less").pvalue, rel=1e-9)


def test_paired():
    ours = paired_test(dict(zip((1, 2, 3), A, strict=True)), dict(zip((3, 2, 1, 9), B, strict=True)))
    reference = stats.ttest_rel([b - 0.005 for b in (B[2], B[1], B[0])], A, alternative="greater")
    assert (ours.t, ours.p) == pytest.approx((reference.statistic, reference.pvalue), rel=1e-9)


def test_nothing_to_test():
    assert t_test([1.0], B) is None and t_test([1.0, 1.0], [2.0]) is None and paired_test({1: 1.0}, {1: 2.0}) is None
