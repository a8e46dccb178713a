"""Test-time training against the reference runs of PRs 562, 1182 and 2005, and its legality as observed facts."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from evaluation.golden_models import Portable

from golf_jax.config import EvalConfig, TTTConfig
from golf_jax.evaluation import evaluate_ttt
from golf_jax.mesh import make_mesh
from golf_jax.model import to_tensors

SGD = TTTConfig(kind="score_first", optimizer="sgd", chunk_tokens=64, ranks=1)
SETTINGS = {
    1182: EvalConfig(stride=8, windows="tail", batch_rows=4, ttt=replace(SGD, lr=0.002, epochs=4)),
    2005: EvalConfig(stride=8, windows="exact", batch_rows=4, ttt=replace(SGD, lr=0.005, epochs=3)),
}


@functools.cache
def portable(pr, golden):
    return Portable(pr, golden)


def run(case, settings, devices=1, tokens=None, **keywords):
    tokens = case.tokens if tokens is None else tokens
    return evaluate_ttt(case.config, case.params, tokens, case.tables, seq_len=32, mesh=make_mesh(devices), eval=settings, **keywords)


@pytest.mark.parametrize(("pr", "tag"), [(1182, "ttt"), (1182, "ttt_noqat"), (2005, "ttt")])
def test_score_first_equals_the_reference_run(pr, tag, golden):
    case, settings = portable(pr, golden), SETTINGS[pr]
    fake_quant = pr == 1182 and tag == "ttt"
    settings = replace(settings, ttt=replace(settings.ttt, fake_quant=fake_quant))
    result, params = run(case, settings)
    z, trace = case.z, result.trace
    nll, tokens, count = case.sums(tag)
    assert (result.score.tokens, result.score.bytes) == (tokens, count)
    loose = 1e-3 if fake_quant else 1e-5
    assert result.score.nll_nats == pytest.approx(nll, rel=loose)
    np.testing.assert_allclose(trace.chunks[:, 0], z[f"{tag}/chunk_nll_sum"], rtol=loose)
    np.testing.assert_allclose(trace.loss, z[f"{tag}/step_loss"], atol=5e-2 if fake_quant else 1e-4)
    np.testing.assert_array_equal(trace.chunks[:, 1], z["ttt/chunk_token_count"])
    np.testing.assert_array_equal(trace.chunks[:, 2], z["ttt/chunk_byte_count"])
    check_final(case, params, tag, 2e-2 if not fake_quant else 5e-2)


def check_final(case, params, tag, tolerance):
    after, before = to_tensors(case.config, params), to_tensors(case.config, case.params)
    checked = 0
    for key in case.z:
        if key.startswith(f"{tag}/final/") and (name := key.split("/final/")[1]) in after and "q_gain" not in name:
            moved = case.z[key] - before[name]
            error = np.linalg.norm(after[name] - case.z[key]) / np.linalg.norm(moved)
            assert error < tolerance, (name, error)
            checked += 1
    assert checked
