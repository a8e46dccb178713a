"""Standard and sliding evaluation: the reference sums of the five PRs, the naive scorer, and other meshes and batches."""

import re
from dataclasses import replace

import numpy as np
import pytest
from evaluation.golden_models import Portable, Tiny
from evaluation.naive import score

from golf_jax.config import EvalConfig, GolfError
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation import evaluate_sliding, evaluate_standard
from golf_jax.evaluation.windows import sliding_windows, standard_windows
from golf_jax.mesh import make_mesh

RULES = {372: "pr372", 562: "tail_min", 638: "tail", 1182: "tail", 2005: "exact"}
TINY = EvalConfig(stride=4, windows="tail", batch_rows=4)


@pytest.fixture(scope="module", params=sorted(RULES))
def case(request, golden):
    portable = Portable(request.param, golden)
    portable.eval = EvalConfig(stride=8, windows=RULES[request.param], batch_rows=4)
    return portable


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


def run(function, case, settings, seq_len=32, devices=1, **keywords):
    tokens = keywords.pop("tokens", case.tokens)
    common = dict(seq_len=seq_len, mesh=make_mesh(devices), eval=settings)
    return function(case.config, case.params, tokens, case.tables, **common, **keywords)


def check(result, expected):
    nll, tokens, count = expected
    assert (result.score.tokens, result.score.bytes) == (tokens, count)
    assert result.score.nll_nats == pytest.approx(nll, rel=1e-5)


def test_standard_sums_equal_the_reference(case):
    result = run(evaluate_standard, case, case.eval)
    check(result, case.sums("standard"))
    assert result.facts.exactly_once and result.facts.legal and not result.partial
    assert result.score.bpb == pytest.approx(float(case.z["standard/bpb"]), abs=1e-5)


def test_sliding_sums_equal_the_reference(case):
    result = run(evaluate_sliding, case, case.eval)
    check(result, case.sums("sliding"))
    facts = result.facts
    assert facts.covered + facts.duplicates == result.score.tokens
    assert facts.exactly_once == (case.eval.windows == "exact")


def test_ragged_stream_equals_the_reference(case):
    tokens = case.tokens[: int(case.z["sliding_ragged/tokens_used"])]
    check(run(evaluate_sliding, case, case.eval, tokens=tokens, truncated=False), case.sums("sliding_ragged"))


@pytest.mark.parametrize("rule", ["pr372", "tail", "exact"])
def test_both_paths_equal_the_naive_scorer(tiny, rule):
    tokens = tiny.tokens[: 16 * 6 + 1]
    w = sliding_windows(rule, len(tokens) - 1, 16, 4)
    naive = score(tiny.config, tiny.params, tokens, tiny.tables, zip(w.start, w.length, w.score_from, strict=True))
    check(run(evaluate_sliding, tiny, replace(TINY, windows=rule), 16, tokens=tokens), naive)
    w = standard_windows(len(tokens) - 1, 16)
    naive = score(tiny.config, tiny.params, tokens, tiny.tables, zip(w.start, w.length, w.score_from, strict=True))
    check(run(evaluate_standard, tiny, TINY, 16, tokens=tokens), naive)


def test_devices_and_batches_do_not_matter(tiny):
    base = run(evaluate_sliding, tiny, TINY, 16, keep_scores=True)
    for devices, rows in ((8, 4), (3, 5)):
        other = run(evaluate_sliding, tiny, replace(TINY, batch_rows=rows), 16, devices=devices, keep_scores=True)
        assert (other.score.tokens, other.score.bytes, other.facts) == (base.score.tokens, base.score.bytes, base.facts)
        assert other.score.nll_nats == pytest.approx(base.score.nll_nats, rel=1e-6)
        np.testing.assert_allclose(other.scores, base.scores, rtol=1e-5, atol=1e-5)


def test_a_second_run_compiles_nothing(tiny):
    run(evaluate_standard, tiny, TINY, 16)
    again = run(evaluate_standard, tiny, TINY, 16)
    assert again.seconds["compile"] < 0.5


def test_partial_results_say_so(tiny):
    result = run(evaluate_sliding, tiny, TINY, 16, max_targets=100)
    assert result.partial and result.facts.targets == 96
    assert result.line().startswith("sliding PARTIAL(25%) val_loss:")
    assert result.projected_seconds == pytest.approx(result.seconds["score"] * 4)


def test_the_score_line_carries_nats_tokens_and_bytes(tiny):
    result = run(evaluate_standard, tiny, TINY, 16)
    found = re.fullmatch(r"standard val_loss:(\S+) val_bpb:(\S+) nats:(\S+) tokens:(\d+) bytes:(\d+)", result.line())
    loss, bpb, nats, tokens, count = map(float, found.groups())
    assert loss == pytest.approx(nats / tokens) and bpb == pytest.approx(nats / np.log(2) / count)


def test_progress_is_projected_once(tiny):
    lines = []
    run(evaluate_sliding, tiny, replace(TINY, batch_rows=2), 16, log=lines.append)
    assert len(lines) == 1 and re.match(r"sliding: \d+ of 96 windows in .* projected", lines[0])


def test_text_without_bytes_is_an_error(tiny):
    tiny = Tiny(33)
    tiny.tables = ByteTables(np.zeros(40, np.int16), np.zeros(40, bool), np.zeros(40, bool))
    with pytest.raises(GolfError, match="0 bytes"):
        run(evaluate_standard, tiny, TINY, 16).line()
