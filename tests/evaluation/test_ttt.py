"""Test-time training: the reference runs of PRs 562, 1182 and 2005, any number of devices, and its order as recorded facts."""

from dataclasses import replace

import numpy as np
import pytest
from evaluation.flips import changed_before_flip
from evaluation.reference_models import Tiny
from tiny_recipes import some

from golf_jax.config import AdaptFirstConfig, GolfError, ModelConfig, ScoreFirstConfig, SlidingConfig
from golf_jax.evaluation import METHODS, Stream
from golf_jax.evaluation.adapt_first import adam_rule
from golf_jax.evaluation.adapter import Plan
from golf_jax.interop.checks.evaluation import check_ttt
from golf_jax.interop.reference import Set
from golf_jax.mesh import make_mesh
from golf_jax.model import leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCORE_FIRST = ScoreFirstConfig(stride=4, lr=0.05, epochs=2, chunk_tokens=96, ranks=2, batch_rows=2)
ADAPT_FIRST = AdaptFirstConfig(stride=4, lr=0.01, epochs=2, ranks=3, batch_rows=3, proj_lr_scale=3.0)


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


def run(tiny, ttt, devices=1, tokens=None):
    stream = Stream.of(tiny.tokens if tokens is None else tokens, tiny.tables, 16, 4)
    method = "score_first" if isinstance(ttt, ScoreFirstConfig) else "adapt_first"
    return METHODS[method](tiny.model, replace(stream, keep_scores=True), make_mesh(devices), ttt)


@pytest.fixture(scope="module")
def legal_run(tiny):
    return run(tiny, SCORE_FIRST)


@pytest.fixture(scope="module")
def illegal_run(tiny):
    return run(tiny, ADAPT_FIRST)


@pytest.mark.parametrize(
    ("pr", "name"),
    some([("pr562", "main"), ("pr1182", "main"), ("pr2005", "main"), ("pr562", "plain"), ("pr1182", "plain")], ("pr1182", "main")),
)
def test_the_reference_run_is_reproduced(references, pr, name):
    """Losses and norms of every step, sums of every chunk, weights at the end."""
    case = Set(references / f"{pr}.npz").case(f"ttt/{name}")
    check_ttt(case)
    results = case.results()
    assert len(results) >= 5
    assert [f"{r.name}: {r.max_rel:.1e} at {r.worst}" for r in results if not r.ok] == []


@pytest.mark.parametrize("ttt", [SCORE_FIRST, ADAPT_FIRST], ids=["score_first", "adapt_first"])
def test_devices_do_not_matter(tiny, ttt):
    one, eight = (run(tiny, ttt, devices) for devices in (1, 8))
    assert eight.score.nll_nats == pytest.approx(one.score.nll_nats, rel=1e-6)
    assert (eight.score.tokens, eight.score.bytes, eight.facts) == (one.score.tokens, one.score.bytes, one.facts)
    for name, weights in one.trace.params.items():
        np.testing.assert_allclose(eight.trace.params[name], weights, rtol=1e-4, atol=1e-5, err_msg=name)


def test_score_first_is_legal_and_learns(tiny, legal_run):
    before, result = METHODS["sliding"](tiny.model, tiny.stream(), make_mesh(1), SlidingConfig(stride=4)), legal_run
    assert result.facts.legal and result.facts.exactly_once and result.facts.updates == 3 * 2 * 2
    assert result.score.nll_nats < before.score.nll_nats
    assert "ILLEGAL" not in result.line()
    np.testing.assert_allclose(result.trace.chunks[0, 0], np.nansum(result.scores[:96], dtype=np.float64), rtol=1e-6)


def test_the_order_log_shows_scores_before_updates(legal_run):
    result = legal_run
    scored = np.zeros(result.facts.targets, bool)
    updates = 0
    for event, start, stop in result.trace.order:
        if event == "update":
            assert scored[start:stop].all()
            updates += 1
        scored[start:stop] |= event == "score"
    assert scored.all() and updates == 3


def test_adapt_first_is_marked_illegal_wherever_it_appears(illegal_run):
    result = illegal_run
    facts = result.facts
    assert facts.order_violations == facts.targets and not facts.legal
    assert result.line().startswith("adapt_first ILLEGAL val_loss:")
    assert result.to_dict()["legal"] is False
    assert any(line.startswith("C3") and "VIOLATED" in line for line in result.lines())


def test_flipping_a_token_changes_no_earlier_score(tiny):
    tokens = tiny.tokens[: 16 * 18 + 1]
    changed = changed_before_flip(lambda t: run(tiny, SCORE_FIRST, tokens=t).scores, tokens, (100, 191, 193), 40)
    assert changed == 0
    with_leak = changed_before_flip(lambda t: run(tiny, ADAPT_FIRST, tokens=t).scores, tokens, (191,), 40)
    assert with_leak > 100


def test_the_callers_parameters_survive(tiny):
    kept = {name: value.copy() for name, value in tiny.params.items()}
    after = run(tiny, SCORE_FIRST).trace.params
    for name, value in kept.items():
        np.testing.assert_array_equal(tiny.params[name], value)
    assert any(not np.array_equal(after[name], value) for name, value in kept.items())


def test_learning_rates_follow_the_recipe(legal_run, illegal_run):
    """A half cosine over chunks, or over all steps; constant over the epochs of a chunk."""
    trace = legal_run.trace
    expected = np.repeat([0.05 * 0.5 * (1 + np.cos(np.pi * c / 3)) for c in range(3)], 2 * 2)
    np.testing.assert_allclose(trace.lr, expected, rtol=1e-6)
    trace = illegal_run.trace
    np.testing.assert_allclose(trace.lr, 0.01 * 0.5 * (1 + np.cos(np.pi * np.arange(6) / 6)), rtol=1e-6)


def test_bfloat16_tables_stay_bfloat16(tiny):
    import jax.numpy as jnp

    case = Tiny()
    case.params["tok_emb"] = jnp.asarray(case.params["tok_emb"], jnp.bfloat16)
    after = run(case, SCORE_FIRST).trace.params
    assert after["tok_emb"].dtype == jnp.bfloat16 and after["q"].dtype == jnp.float32


def test_ranks_become_weights():
    ttt = replace(SCORE_FIRST, ranks=4, batch_rows=8)
    plan = Plan.of(150, ttt, devices=8, micro=4)  # 37, 38, 37, 38 sequences in steps of 8: 5 or 6 in the last
    assert plan.sequence.shape == (5, 32)
    np.testing.assert_allclose(plan.weight.sum((1, 2)), 1, rtol=1e-6)
    weight = plan.weight.sum(2)
    last = {int(i): float(w) for i, w in zip(plan.sequence[4], weight[4], strict=True) if w}
    assert len(last) == 5 + 6 + 5 + 6 and last[36] == pytest.approx(1 / 20) and last[74] == pytest.approx(1 / 24)
    assert sorted(int(i) for i, w in zip(plan.sequence.ravel(), weight.ravel(), strict=True) if w) == list(range(150))


def test_every_rank_has_a_loss_of_its_own(tiny, illegal_run):
    """The mean over its own sequences, which the first update finds with the weights as they were; the step's loss is their mean."""
    trace, scores = illegal_run.trace, run(tiny, replace(ADAPT_FIRST, epochs=1, lr=0.0)).trace
    np.testing.assert_allclose(trace.loss, trace.loss_per_rank.mean(1), rtol=1e-6)
    rows = METHODS["standard"](tiny.model, replace(tiny.stream(), keep_scores=True), make_mesh(1)).scores.reshape(-1, 16).mean(1)
    bounds = [len(rows) * r // 3 for r in range(3)]
    np.testing.assert_allclose(scores.loss_per_rank[0], [rows[b : b + 3].mean() for b in bounds], rtol=1e-5)
    np.testing.assert_allclose(trace.loss_per_rank[0], scores.loss_per_rank[0], rtol=1e-6)


def test_a_rank_without_sequences_counts_nothing():
    plan = Plan.of(3, replace(SCORE_FIRST, ranks=8, batch_rows=4), devices=1, micro=4)
    np.testing.assert_allclose(plan.weight[plan.weight > 0], 1 / 3, rtol=1e-6)


def test_learning_rate_groups_of_pr_562():
    config = ModelConfig(bigram_buckets=64, head_gate="linear")
    scales = dict(adam_rule(replace(ADAPT_FIRST, proj_lr_scale=3.0, fc_lr_scale=0.5), config).scales)
    assert {n for n, s in scales.items() if s == 3.0} == {"o", "down", "bigram_proj"}
    assert {n for n, s in scales.items() if s == 0.5} == {"up"}
    assert scales.keys() == leaves(config).keys()


@pytest.mark.parametrize("ttt", [SCORE_FIRST, ADAPT_FIRST], ids=["score_first", "adapt_first"])
def test_a_method_that_the_recipe_leaves_out_is_refused(tiny, ttt):
    with pytest.raises(GolfError, match=r"epochs is 0: this recipe has no \S+ test-time training"):
        run(tiny, replace(ttt, epochs=0))
