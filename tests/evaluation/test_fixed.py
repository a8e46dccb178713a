"""Standard and sliding evaluation: the reference sums of the five PRs, the naive scorer, and other meshes and batches."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from evaluation.naive import score
from evaluation.reference_models import Portable, Tiny
from tiny_recipes import some

from golf_jax import progress
from golf_jax.ahead import all_made, compiling_ahead
from golf_jax.config import EvalConfig, GolfError, ScoreFirstConfig, SlidingConfig
from golf_jax.data.text import Text
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation import METHODS, Facts, Result, Score, Stream, score_ahead
from golf_jax.evaluation import score as score_by_methods
from golf_jax.evaluation.windows import sliding_windows, standard_windows
from golf_jax.mesh import make_mesh
from golf_jax.model import Model

pytestmark = pytest.mark.usefixtures("quick_compilation")

RULES = {372: "pr372", 562: "tail_min", 638: "tail", 1182: "tail", 2005: "exact"}
TINY = SlidingConfig(stride=4, windows="tail")


@pytest.fixture(scope="module", params=some(sorted(RULES), 2005))
def case(request, references):
    portable = Portable(request.param, references)
    portable.sliding = SlidingConfig(stride=8, windows=RULES[request.param])
    return portable


@pytest.fixture(scope="module")
def tiny():
    return Tiny()


def run(method, case, settings=None, devices=1, log=None, stream=None):
    return METHODS[method](case.model, stream or case.stream(), make_mesh(devices), settings, log)


def check(result, expected):
    nll, tokens, count = expected
    assert (result.score.tokens, result.score.bytes) == (tokens, count)
    assert result.score.nll_nats == pytest.approx(nll, rel=1e-5)


def test_standard_sums_equal_the_reference(case):
    result = run("standard", case)
    check(result, case.sums("standard"))
    assert result.facts.exactly_once and result.facts.legal and not result.partial


def test_sliding_sums_equal_the_reference(case):
    result = run("sliding", case, case.sliding)
    check(result, case.sums("sliding"))
    facts = result.facts
    assert facts.covered + facts.duplicates == result.score.tokens
    assert facts.exactly_once == (case.sliding.windows == "exact")


def test_ragged_stream_equals_the_reference(case):
    tokens = case.tokens[: case.refs.case("eval/sliding_ragged").settings["tokens"]]
    stream = Stream(tokens, case.tables, case.seq_len, 4)
    check(run("sliding", case, case.sliding, stream=stream), case.sums("sliding_ragged"))


@pytest.mark.parametrize("rule", ["pr372", "tail", "exact"])
def test_both_paths_equal_the_naive_scorer(tiny, rule):
    tokens = tiny.tokens[: 16 * 6 + 1]
    stream = Stream.of(tokens, tiny.tables, 16, 4)
    w = sliding_windows(rule, len(tokens) - 1, 16, 4)
    naive = score(tiny.config, tiny.params, tokens, tiny.tables, zip(w.start, w.length, w.score_from, strict=True))
    check(run("sliding", tiny, replace(TINY, windows=rule), stream=stream), naive)
    w = standard_windows(len(tokens) - 1, 16)
    naive = score(tiny.config, tiny.params, tokens, tiny.tables, zip(w.start, w.length, w.score_from, strict=True))
    check(run("standard", tiny, stream=stream), naive)


def test_devices_and_batches_do_not_matter(tiny):
    kept = replace(tiny.stream(), keep_scores=True)
    base = run("sliding", tiny, TINY, stream=kept)
    for devices, rows in ((8, 4), (3, 5), (1, 0)):
        other = run("sliding", tiny, TINY, devices, stream=replace(kept, rows=rows))
        assert (other.score.tokens, other.score.bytes, other.facts) == (base.score.tokens, base.score.bytes, base.facts)
        assert other.score.nll_nats == pytest.approx(base.score.nll_nats, rel=1e-6)
        np.testing.assert_allclose(other.scores, base.scores, rtol=1e-5, atol=1e-5)


def test_a_second_run_compiles_nothing(tiny):
    run("standard", tiny)
    again = run("standard", tiny)
    assert again.seconds["compile"] < 0.5


def test_partial_results_say_so(tiny):
    result = run("sliding", tiny, TINY, stream=tiny.stream(max_targets=100))
    assert result.partial and result.facts.targets == 96
    assert result.line().startswith("sliding PARTIAL(25%) val_loss:")
    assert result.projected_seconds == pytest.approx(result.seconds["score"] * 4)


def test_the_score_line_carries_nats_tokens_and_bytes(tiny):
    result = run("standard", tiny)
    found = re.fullmatch(r"standard val_loss:(\S+) val_bpb:(\S+) nats:(\S+) tokens:(\d+) bytes:(\d+)", result.line())
    loss, bpb, nats, tokens, count = map(float, found.groups())
    assert loss == pytest.approx(nats / tokens) and bpb == pytest.approx(nats / np.log(2) / count)


def test_long_work_tells_how_far_it_is(tiny, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    lines = []
    run("sliding", tiny, TINY, log=lines.append, stream=tiny.stream(rows=2))
    told = [line for line in lines if line != "compiling ..."]
    assert re.fullmatch(r"sliding: windows 2 of 96 in \S+ s, \d+ s projected", told[0]) and len(told) < 96


def test_automatic_rows_follow_the_platform_and_the_length(tiny):
    mesh, stream = make_mesh(1), tiny.stream(rows=0)
    rows = {seq_len: replace(stream, seq_len=seq_len).batch_rows(mesh) for seq_len in (16, 256, 2048)}
    assert rows == {16: 64, 256: 4, 2048: 1}
    assert replace(stream, rows=7).batch_rows(mesh) == 7


def test_the_first_batch_compiles_the_program_of_all(tiny):
    mesh, stream = make_mesh(2), tiny.stream(rows=3)
    first = stream.first_batch(mesh)
    assert first.targets == 2 * 3 * 16 and first.share == pytest.approx(6 / 24)
    METHODS["standard"](tiny.model, first, mesh, None)
    assert METHODS["standard"](tiny.model, stream, mesh, None).seconds["compile"] < 0.5


def test_a_score_that_is_not_a_number_is_never_returned():
    tiny = Tiny()
    tiny.params["tok_emb"][39, 0] = np.inf
    with pytest.raises(GolfError, match=r"the score of target \d+, in the window of 16 tokens from \d+ on, is nan"):
        run("standard", tiny)


def test_no_json_holds_what_json_cannot_say():
    facts = Facts(10, 10, 0, 0, 0, causal=False, normalization_error=float("nan"))
    result = Result("standard", Score(float("inf"), 10, 10), facts, {"compile": 0.0, "score": 1.0, "train": 0.0})
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["val_bpb"] is None and found["facts"]["normalization_error"] is None and found["legal"] is False


def test_text_without_bytes_is_an_error(tiny):
    tiny = Tiny(33)
    tiny.tables = ByteTables(np.zeros(40, np.int16), np.zeros(40, bool), np.zeros(40, bool))
    with pytest.raises(GolfError, match="0 bytes"):
        run("standard", tiny).line()


def test_what_is_compiled_ahead_is_all_that_scoring_runs(tiny, monkeypatch):
    stream, mesh = Stream.of(tiny.tokens[: 16 * 5 + 1], tiny.tables, 16, 2), make_mesh(2)
    shapes = {name: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype) for name, x in reversed(tiny.params.items())}
    text = Text("", "", stream.tokens, None, tiny.tables, 0)  # pyright: ignore[reportArgumentType]
    eval = EvalConfig(batch_rows=2, sliding=TINY, score_first=ScoreFirstConfig(epochs=1, chunk_tokens=32, stride=4))
    with compiling_ahead(1):
        score_ahead(Model(tiny.config, shapes), text, mesh, eval, seq_len=16)
        all_made()
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: pytest.fail("was compiled after that"))
    results = list(score_by_methods(tiny.model, text, mesh, eval, seq_len=16))
    assert [r.mode for r in results] == ["standard", "sliding", "score_first"]
