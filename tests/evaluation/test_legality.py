"""The measurements of C1 and C2 find what they are for."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation.flips import changed_before_flip
from evaluation.reference_models import Portable, Tiny

from golf_jax.evaluation import Facts, legality
from golf_jax.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

FACTS = Facts(targets=10, covered=10, duplicates=0, order_violations=0, updates=0, causal=True, normalization_error=1e-7)


@pytest.fixture
def compiled_anew():
    """For tests that put something else in the place of a function: no program from before it, and none left after it."""
    legality.checking_program.cache_clear()
    yield
    legality.checking_program.cache_clear()


def check_model(case):
    return legality.check_model(case.model, case.tokens, make_mesh(1), case.seq_len)


@pytest.mark.parametrize("pr", [1182])
def test_models_are_causal_and_normalized(references, pr):
    case = Portable(pr, references)
    causal, error = check_model(case)
    assert causal and error < 1e-5


def test_a_look_ahead_is_found(monkeypatch, compiled_anew):
    tiny, real = Tiny(), legality.hidden

    def leaks(config, params, tokens, **keywords):
        x = real(config, params, tokens, **keywords)
        return x.at[:, :-1].add(1e-3 * x[:, 1:])

    monkeypatch.setattr(legality, "hidden", leaks)
    causal, _ = check_model(tiny)
    assert not causal


def test_an_unnormalized_score_is_found(monkeypatch, compiled_anew):
    tiny, real = Tiny(), legality.softcap_cross_entropy
    monkeypatch.setattr(legality, "softcap_cross_entropy", lambda *a, **k: real(*a, **k) - 0.01)
    _, error = check_model(tiny)
    assert error == pytest.approx(0.01, rel=1e-2)


def test_what_is_not_a_number_is_not_normalized():
    tiny = Tiny()
    tiny.params["tok_emb"][3, 5] = np.nan
    causal, error = check_model(tiny)
    facts = replace(FACTS, normalization_error=error)
    assert not causal and np.isnan(error) and not facts.legal and "VIOLATED" in facts.lines()[1]


def test_a_flip_without_effect_proves_nothing():
    with pytest.raises(ValueError, match="no power"):
        changed_before_flip(lambda tokens: np.zeros(9, np.float32), np.zeros(10, np.uint16), [3], 40)


@pytest.mark.parametrize(
    ("change", "line"),
    [({"causal": False}, 0), ({"normalization_error": 1e-3}, 1), ({"normalization_error": float("nan")}, 1), ({"order_violations": 2}, 2)],
)
def test_every_violation_makes_the_result_illegal(change, line):
    facts = replace(FACTS, **change)
    assert FACTS.legal and not facts.legal
    assert "VIOLATED" in facts.lines()[line] and not any("VIOLATED" in x for x in FACTS.lines())


def test_repeats_and_gaps_are_reported_apart():
    facts = replace(FACTS, covered=9, duplicates=3)
    assert facts.legal and not facts.exactly_once
    assert "1 never, 3 scores repeated" in facts.lines()[3]
