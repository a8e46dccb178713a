"""GPTQ gives the codes of PR 2005 from the stored Hessians, and its Cholesky shortcut is the textbook factor."""

import jax.numpy as jnp
import numpy as np
import pytest
from reference_quant import quant_case, rules

from golf_jax.config import GolfError
from golf_jax.interop.checks.quantization import check_quant
from golf_jax.interop.reference import Set
from golf_jax.quant import quantize
from golf_jax.quant.gptq import accumulate_hessian, gptq_codes
from golf_jax.quant.schemes import sd_scale


def gptq(w, hessian, high, sigmas):
    scale = sd_scale(w, high, sigmas)
    return gptq_codes(w, hessian, scale, high), scale


def test_codes_from_stored_hessians(references):
    case = quant_case("pr2005", references)
    hessians = case.under("hessian/")
    found = quantize({n: case.tensors[n] for n in hessians}, rules(case), hessians)
    assert len(found) == 3
    for name, q in found.items():
        assert q.kind == case.settings["tensors"][name]["kind"]
        np.testing.assert_array_equal(q.codes, case.own[f"codes/{name}"], err_msg=name)
        np.testing.assert_array_equal(q.scale, case.own[f"scale/{name}"], err_msg=name)


@pytest.mark.parametrize("name", ["syn_dead", "syn_clip", "syn_tok", "syn_lowrank"])
def test_synthetic_cases(name, shared):
    """Dead columns, heavy clipping over three column blocks, int7, a rank-deficient Hessian."""
    case = Set(shared / "reference" / "pr2005").case(f"quant/{name}")
    check_quant(case)
    assert case.results() and [r.name for r in case.results() if not r.ok] == []


def textbook_gptq(w_RC, hessian_CC, high, scale_R):
    """Column by column in float64, with the explicit inverse: the definition."""
    h = hessian_CC.astype(np.float64)
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    h += np.eye(len(h)) * 0.01 * np.diag(h).mean()
    order = np.argsort(-np.diag(h), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
    w = np.where(dead, 0, w_RC.astype(np.float64))[:, order]
    codes = np.zeros_like(w)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.rint(w[:, j] / scale_R), -high, high)
        w[:, j:] -= np.outer((w[:, j] - codes[:, j] * scale_R) / upper[j, j], upper[j, j:])
    return codes[:, np.argsort(order)]


@pytest.mark.parametrize("columns", [40, 128, 200])
def test_equals_the_definition_in_float64(columns):
    rng = np.random.default_rng(columns)
    w = rng.standard_normal((12, columns)).astype(np.float32)
    x = rng.standard_normal((4 * columns, columns)).astype(np.float32) * np.linspace(0.5, 2, columns, dtype=np.float32)
    x[:, 3] = 0
    h = np.asarray(accumulate_hessian(x))
    codes, scale = gptq(w, h, 31, 4.0)
    assert (codes == textbook_gptq(w, h, 31, scale.astype(np.float64))).mean() >= 0.999
    assert (codes[:, 3] == 0).all()
    plain = np.clip(np.rint(w / scale.astype(np.float32)[:, None]), -31, 31)
    error = [((w - c * scale.astype(np.float32)[:, None]) @ x.T).std() for c in (codes, plain)]
    assert error[0] < error[1]


def test_hessian_sums_outer_products():
    x = np.random.default_rng(0).standard_normal((2, 5, 7)).astype(np.float32)
    want = sum(np.outer(v, v) for v in x.reshape(-1, 7))
    np.testing.assert_allclose(accumulate_hessian(x), want, rtol=1e-5, atol=1e-5)
    assert accumulate_hessian(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.float32


def test_bad_hessians_are_named():
    w = np.ones((2, 4), np.float32)
    for h, message in [(np.eye(3), "shape"), (np.full((4, 4), np.nan), "NaN"), (-np.eye(4), "not positive definite")]:
        with pytest.raises(GolfError, match=message):
            gptq(w, h.astype(np.float32), 31, 12.85)
