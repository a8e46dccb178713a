"""fit_to_cap: never over the budget, close to it, few encodings, and the price is told."""

import lzma
from dataclasses import replace

import numpy as np
import pytest

from golf_jax.artifact.ledger import estimate_bytes
from golf_jax.config import GolfError, QuantConfig, QuantRule
from golf_jax.quant import quantize
from golf_jax.quant.fit import fit_to_cap, relative_error, scale_steps
from golf_jax.quant.schemes import SCHEMES

INTEGER = [name for name, scheme in SCHEMES.items() if not scheme.needs_hessian]


def tensors():
    rng = np.random.default_rng(0)
    w = {f"blocks.{i}.mlp.fc.weight": rng.standard_t(5, (64, 256)).astype(np.float32) for i in range(4)}
    return w | {"skip_weights": rng.random((4, 64)).astype(np.float32)}


def encode(quantized):
    return lzma.compress(b"".join((q.values if q.codes is None else q.codes).tobytes() for q in quantized.values()))


def config(scheme="int6_row"):
    return QuantConfig(rules=(QuantRule("", "float16", max_numel=1000), QuantRule("", scheme)))


@pytest.mark.parametrize("scheme", INTEGER)
@pytest.mark.parametrize("fraction", [0.97, 0.75])
def test_lands_just_under_the_budget(scheme, fraction):
    start = len(encode(quantize(tensors(), config(scheme))))
    budget = int(start * fraction)
    fitted, data, report = fit_to_cap(tensors(), config(scheme), budget, encode, slack=0.01)
    assert data == encode(quantize(tensors(), fitted)) and len(data) == report.encoded_bytes <= budget
    assert report.encoded_bytes >= 0.985 * budget
    assert len(report.trials) <= 8
    assert fitted == scale_steps(config(scheme), report.factor) and report.factor > 1
    assert report.error_after > report.error_before > 0
    assert report.error_after == relative_error(tensors(), quantize(tensors(), fitted))


def test_a_recipe_that_fits_is_left_alone():
    seen = []
    fitted, _, report = fit_to_cap(tensors(), config(), 10**9, lambda q: seen.append(q) or encode(q))
    assert fitted == config() and report.factor == 1.0 and len(seen) == 1
    assert report.error_before == report.error_after


def test_the_callers_score_prices_the_fit():
    start = len(encode(quantize(tensors(), config())))
    scores = iter([1.2, 1.25])
    _, _, report = fit_to_cap(tensors(), config(), int(start * 0.9), encode, score=lambda q: next(scores))
    assert (report.score_before, report.score_after) == (1.2, 1.25)
    assert "bpb 1.20000 -> 1.25000 (+0.05000)" in str(report)


def test_hopeless_budgets_are_refused():
    with pytest.raises(GolfError, match="exceed the budget of 100; give the model fewer parameters"):
        fit_to_cap(tensors(), config(), 100, encode)


def test_float_rules_have_no_step():
    assert scale_steps(config(), 2.0).rules[0].step == 1.0
    assert scale_steps(config(), 2.0).rules[1].step == 2.0
    with pytest.raises(GolfError, match="step must be positive"):
        QuantRule("", "int6_row", step=0.0)


@pytest.mark.parametrize("fraction", [1.3, 0.8])
def test_a_margin_asks_for_the_whole_budget_and_entropy_finds_it(fraction):
    sd = replace(config("int6_sdclip"), margin=0)
    start = len(encode(quantize(tensors(), sd)))
    budget = int(start * fraction)
    fitted, data, report = fit_to_cap(tensors(), sd, budget, encode, estimate=lambda q: estimate_bytes(q, "lzma"), slack=0.01)
    assert 0.985 * budget <= len(data) <= budget and len(report.trials) <= 4
    assert (report.error_after < report.error_before) == (fraction > 1)
    assert fitted == scale_steps(sd, report.factor)


def test_a_finer_step_takes_a_bit_more_before_it_clips():
    sd = QuantConfig(rules=(QuantRule("", "int6_sdclip", sigmas=11.5),))
    finer = scale_steps(sd, 0.5).rules[0]
    assert (finer.scheme, finer.sigmas) == ("int7_sdclip", 11.5)
    w = {"w": np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)}
    wide, narrow = (quantize(w, QuantConfig(rules=(r,)))["w"] for r in (finer, replace(sd.rules[0], step=0.5)))
    np.testing.assert_allclose(wide.scale, narrow.scale, rtol=1e-3)
    assert scale_steps(sd, 0.8).rules[0].scheme == "int6_sdclip"
