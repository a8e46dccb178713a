"""The evaluation checks of golf_jax.reproduce on the full reference directories, where they are at hand."""

import numpy as np
import pytest

from golf_jax.interop.checks import evaluation
from golf_jax.interop.checks.base import Context

PRS = ["pr372", "pr562", "pr638", "pr1182", "pr2005"]


def context(shared, recipe):
    return Context(recipe, shared / "golden" / recipe)


def passed(results):
    return [f"{r.name}: {r.max_rel:.1e} > {r.tolerance} at {r.worst}" for r in results if not r.ok] == []


@pytest.mark.parametrize("recipe", PRS)
def test_window_lists(shared, recipe):
    z = context(shared, recipe).file("eval")
    assert passed([evaluation.check_windows(context(shared, recipe), z, "eval", 128, 16)])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PRS)
def test_sums(shared, recipe):
    assert passed(evaluation.check_eval(context(shared, recipe)))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["pr562", "pr1182", "pr2005"])
def test_test_time_training(shared, recipe):
    assert passed(evaluation.check_ttt(context(shared, recipe)))


@pytest.mark.slow
def test_hessians(shared):
    assert passed(evaluation.check_hessians(context(shared, "pr2005")))


def test_a_wrong_sum_is_noticed(golden, monkeypatch):
    ctx = Context("pr638", golden / "pr638.npz")
    real = evaluation.sums
    monkeypatch.setattr(evaluation, "sums", lambda z, tag: real(z, tag) * np.array([1 + 2e-5, 1, 1]))
    monkeypatch.setattr(evaluation, "_cases", lambda *_: [evaluation.Case("standard", "standard")])
    assert [r.ok for r in evaluation.check_eval(ctx)] == [False, True]
