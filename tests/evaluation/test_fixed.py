"""Standard and sliding evaluation against the reference sums of the five PRs, and against themselves on other meshes."""

import pytest
from evaluation.golden_models import Portable

from golf_jax.config import EvalConfig
from golf_jax.evaluation import evaluate_sliding, evaluate_standard
from golf_jax.mesh import make_mesh

RULES = {372: "pr372", 562: "tail_min", 638: "tail", 1182: "tail", 2005: "exact"}
PRS = sorted(RULES)


@pytest.fixture(scope="module", params=PRS)
def case(request, golden):
    portable = Portable(request.param, golden)
    portable.eval = EvalConfig(stride=8, windows=RULES[request.param], batch_rows=4)
    return portable


def check(result, expected):
    nll, tokens, count = expected
    assert (result.score.tokens, result.score.bytes) == (tokens, count)
    assert result.score.nll_nats == pytest.approx(nll, rel=1e-5)


def test_standard_sums_equal_the_reference(case):
    result = evaluate_standard(case.config, case.params, case.tokens, case.tables, seq_len=32, mesh=make_mesh(1), eval=case.eval)
    check(result, case.sums("standard"))
    assert result.facts.exactly_once and result.facts.legal and not result.partial
    assert result.score.bpb == pytest.approx(float(case.z["standard/bpb"]), abs=1e-5)


def test_sliding_sums_equal_the_reference(case):
    result = evaluate_sliding(case.config, case.params, case.tokens, case.tables, seq_len=32, mesh=make_mesh(1), eval=case.eval)
    check(result, case.sums("sliding"))
    facts = result.facts
    assert facts.covered + facts.duplicates == result.score.tokens
    assert facts.exactly_once == (case.eval.windows == "exact")


def test_ragged_stream_equals_the_reference(case):
    tokens = case.tokens[: int(case.z["sliding_ragged/tokens_used"])]
    result = evaluate_sliding(case.config, case.params, tokens, case.tables, seq_len=32, mesh=make_mesh(1), eval=case.eval, truncated=False)
    check(result, case.sums("sliding_ragged"))
