"""Test-time training per document: its lists, its order as recorded facts, its legality measured, and the reference run."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from evaluation.flips import changed_before_flip
from evaluation.reference_models import Tiny
from tiny_recipes import tiny as made

from golf_jax.config import DocumentsConfig, GolfError, ModelConfig, PackedConfig, TiltConfig
from golf_jax.data.sidecar import Sidecar
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation import METHODS, Stream, packed
from golf_jax.evaluation.documents import Work, target_order
from golf_jax.evaluation.legality import tilt_breaks_order
from golf_jax.evaluation.queue import BOS, Documents, Queue
from golf_jax.interop.checks.evaluation import check_eval, check_ttt
from golf_jax.interop.checks.units import check_units
from golf_jax.interop.reference import Set
from golf_jax.mesh import make_mesh
from golf_jax.model import Model, init_params, nll, resolve
from golf_jax.progress import Progress

pytestmark = pytest.mark.usefixtures("quick_compilation")

TTT = DocumentsConfig(
    rank=2, alpha=4.0, lr=0.02, chunk=4, seq_len=8, batch=3, prefix=4, global_lr=0.1, global_chunk=24, ranks=2, tilt=TiltConfig(order=3)
)
RECORD = replace(TTT, tilt=replace(TTT.tilt, state="corpus"))
LENGTHS = (9, 14, 6, 21, 12, 17, 30)  # tokens, BOS included


def documents_case() -> Tiny:
    """Seven documents; a passage of a short early one is quoted in the last and longest, which is scored first."""
    case, rng = Tiny(), np.random.default_rng(3)
    documents = [np.append(BOS, rng.integers(2, 40, n - 1)) for n in LENGTHS]
    documents[6][20:26] = documents[0][2:8]
    case.tokens = np.concatenate([*documents, [BOS, 5]]).astype(np.uint16)[: sum(LENGTHS)]
    return case


@pytest.fixture(scope="module")
def tiny():
    return documents_case()


def run(tiny, ttt, devices=1, tokens=None):
    tokens = tiny.tokens if tokens is None else tokens
    stream = Stream(tokens, Sidecar(np.ones(len(tokens), np.int64)), 8, keep_scores=True)
    return METHODS["documents"](tiny.model, stream, make_mesh(devices), ttt)


@pytest.fixture(scope="module")
def legal(tiny):
    return run(tiny, TTT)


@pytest.fixture(scope="module")
def as_run(tiny):
    return run(tiny, RECORD)


def predicted(tiny):
    documents = Documents.of(tiny.tokens)
    return target_order(documents, Queue.of(documents, TTT.batch))


def test_every_target_is_scored_once_before_an_update_sees_it(tiny, legal):
    facts = legal.facts
    assert facts.exactly_once and facts.order_violations == 0 and facts.updates > 10 and legal.score.tokens == len(tiny.tokens) - 1
    assert sorted(predicted(tiny)) == list(range(facts.targets))
    assert len(legal.trace.loss) == len(legal.trace.lr) > 0 and legal.trace.lr[-1] < legal.trace.lr[0]


def test_the_record_order_breaks_c1_and_says_so_and_the_queue_order_does_not(legal, as_run):
    assert legal.facts.legal and legal.facts.causal and legal.facts.normalized
    assert not as_run.facts.legal and as_run.facts.causal is False
    assert "ILLEGAL" in as_run.line() and "C1 causal: VIOLATED" in as_run.lines()[1]
    assert as_run.score.nll_nats != legal.score.nll_nats


def test_a_text_without_repeats_does_not_make_the_record_legal(tiny):
    tokens = tiny.tokens.copy()
    tokens[tokens != BOS] = 2 + np.arange(np.count_nonzero(tokens != BOS)) % 38  # contexts of 15 tokens hardly repeat across documents
    result = run(tiny, replace(RECORD, tilt=replace(RECORD.tilt, order=16)), tokens=tokens)
    assert result.facts.causal is False and not result.facts.legal


def flips(tiny):
    """A token of the short early document that the long late one quotes, and one in the middle of the long one."""
    return [4, sum(LENGTHS[:6]) + 12]


def test_flipped_tokens_change_no_earlier_score_of_the_legal_engine(tiny):
    scores = lambda tokens: run(tiny, TTT, tokens=tokens).scores  # noqa: E731
    assert changed_before_flip(scores, tiny.tokens, flips(tiny), 40, predicted(tiny)) == 0


@pytest.mark.slow
def test_flipped_tokens_find_the_record_in_both_orders(tiny):
    scores = lambda tokens: run(tiny, RECORD, tokens=tokens).scores  # noqa: E731
    assert changed_before_flip(scores, tiny.tokens, flips(tiny)[:1], 40, predicted(tiny)) > 0  # by the tilt
    assert changed_before_flip(scores, tiny.tokens, flips(tiny)[1:], 40) > 0  # by the global phase


def test_the_measurement_of_a_tilts_order_has_power():
    rng = np.random.default_rng(0)
    tokens = np.append(BOS, rng.integers(2, 40, 300))
    backwards = np.arange(300)[::-1]
    peeks = lambda tokens, order: np.append(tokens[2:], 0)  # noqa: E731
    assert tilt_breaks_order(peeks, tokens, np.arange(300)) > 0 and tilt_breaks_order(peeks, tokens, backwards) == 0


@pytest.mark.slow
def test_any_number_of_devices_gives_the_same_scores(tiny, legal):
    other = run(tiny, TTT, devices=2)
    np.testing.assert_allclose(other.scores, legal.scores, atol=2e-4)
    assert run(tiny, TTT).score == legal.score


@pytest.mark.slow
def test_adapters_and_the_global_phase_change_scores(tiny, legal):
    still = run(tiny, replace(TTT, lr=0.0, global_lr=0.0))
    one = run(tiny, replace(TTT, global_lr=0.0))
    first = np.flatnonzero(still.scores == one.scores)
    assert 0 < len(first) < len(still.scores)  # first chunks are scored before a step
    assert not np.array_equal(one.scores, legal.scores)


def test_documents_may_be_empty_or_longer_than_the_window(tiny):
    """Nothing but a BOS, one token, five windows; the last batch is not full."""
    words = lambda n: np.random.default_rng(n).integers(2, 40, n)  # noqa: E731
    tokens = np.concatenate([[BOS, BOS, BOS], words(1), [BOS], words(40), [BOS], words(3), [BOS, BOS], words(2)]).astype(np.uint16)
    result = run(tiny, TTT, tokens=tokens)
    assert result.facts.exactly_once and result.facts.legal and result.score.tokens == len(tokens) - 1
    assert result.early is not None and 0.01 <= result.early[0] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("width", "heads", "kv", "layers"), [(24, 3, 1, 5), (40, 4, 4, 7)])
def test_without_steps_every_document_scores_as_alone(width, heads, kv, layers):
    """Chunks, windows, queue and adapters leave a model of any shape as it is; recurrence, lanes, gates and smear included."""
    shape = dict(width=width, num_heads=heads, num_kv_heads=kv, num_layers=layers, two_lanes_from=layers - 1, vocab_size=40, rope_dims=2)
    config = resolve(replace(made("pr2135").model, **shape, gate_window=5, boundary_token=BOS), "cpu")
    rng = np.random.default_rng(0)
    start_at = init_params(config, jax.random.key(0))
    params = {n: np.asarray(p) + 0.2 * rng.standard_normal(p.shape).astype(np.float32) for n, p in start_at.items()}
    tokens, still = documents_case().tokens, replace(TTT, lr=0.0, prefix=0, seq_len=32, chunk=5, global_chunk=32, tilt=TiltConfig())
    stream = Stream(tokens, Sidecar(np.ones(len(tokens), np.int64)), 8, keep_scores=True)
    scores = METHODS["documents"](Model(config, params), stream, make_mesh(2), still).scores
    documents = Documents.of(tokens)
    for start, length in zip(documents.start, documents.length, strict=True):
        x = tokens[start : start + length].astype(np.int32)[None]
        alone = np.asarray(jax.jit(functools.partial(nll, config))(params, x[:, :-1], x[:, 1:]))[0]
        np.testing.assert_allclose(scores[start : start + length - 1], alone, atol=2e-4)


def test_work_counts_every_pass_of_every_row(tiny):
    """Chunks of 4 in windows of 4 and 8, three rows: tokens of the compiled widths, and the head's share for each chunk."""
    work = Work(tiny.model, TTT, rows=3)
    layers, head = 2 * (2 * 16 * (16 + 8 + 32)), 16 * 40
    assert work.chunks(np.array([5, 9])) == pytest.approx([3 * (w + 4 * head / layers) for w in (4, 8, 8)])
    progress = Progress(None, "", 1000, before=7.0)
    progress.at(9)
    assert progress.early is None
    progress.at(10)
    assert progress.early is not None and progress.early[0] == 0.01 and progress.early[1] >= 7


def test_text_without_documents_is_refused(tiny):
    with pytest.raises(GolfError, match="does not begin with token 1"):
        run(tiny, TTT, tokens=tiny.tokens[1:])
    with pytest.raises(GolfError, match="ends right after a BOS"):
        run(tiny, TTT, tokens=np.append(tiny.tokens, BOS).astype(np.uint16))


def test_packed_streams_leave_out_rows_that_fill_none(tiny):
    tables = ByteTables(np.ones(40, np.int16), np.zeros(40, bool), np.zeros(40, bool))
    stream = Stream.of(tiny.tokens, tables, 8)
    result = METHODS["packed"](tiny.model, replace(stream, keep_scores=True), make_mesh(2), PackedConfig(rows=2, seq_len=8, ranks=3))
    rows = stream.targets // 8
    whole = sum((rows * (r + 1) // 3 - rows * r // 3) // 2 * 2 for r in range(3))
    assert result.facts.covered == 8 * whole < stream.targets and result.facts.legal
    assert result.score.nll_nats == pytest.approx(np.nansum(result.scores, dtype=np.float64))


QUICK_UNITS = (
    "chunk_window doc_queue segments0 segments1 segments2 segments3 segments4 lora_adamw tilt_order16 tilt_order4 tilt_order2 "
    "tilt_distribution ttt_hints ttt_queue "
    "lqer_wide lqer_tall lqer_group16 lqer_symmetric row_order row_order_ties asym_softcap gate_int8_row"
).split()


def misses(check, case):
    check(case)
    return [f"{r.name}: {r.max_rel:.1e} at {r.worst}" for r in case.results() if not r.ok]


@pytest.fixture(scope="module")
def record(references):
    return Set(references / "pr2135_eval.npz")


@pytest.mark.parametrize("name", QUICK_UNITS)
def test_lists_and_formulas_are_the_records(record, name):
    case = record.case(f"units/{name}")
    assert misses(check_units, case) == [] and case.results()


@pytest.mark.slow
@pytest.mark.parametrize(("section", "check"), [("ttt", check_ttt), ("eval", check_eval), ("units", check_units)])
def test_the_reference_run_is_reproduced(record, section, check):
    for case in record.cases(section):
        assert misses(check, case) == []


def test_another_attention_backend_for_the_mask_is_said(monkeypatch):
    """An artifact that names cuDNN, which has no mask of documents, is scored with another, and the log says so."""
    monkeypatch.setattr(packed, "platform", lambda mesh: "gpu")
    said: list[str] = []
    config = packed.inside_documents(ModelConfig(dtype="bfloat16", attention="cudnn"), make_mesh(1), said.append)
    assert config.attention == "pallas" and said == ["attention: cudnn cannot stay inside documents on this machine; scored with pallas"]
    assert packed.inside_documents(config, make_mesh(1), said.append) == config and len(said) == 1
