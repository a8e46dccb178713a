"""Fake quantization against the recorded PyTorch tensors of PR 372, its floors and its straight-through gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golf_jax.kernels.fake_quant import RowScheme, fake_quant

FLOORED = RowScheme(levels=31, lowest=-32, scale_floor=1 / 31)


@pytest.mark.parametrize(("name", "scheme"), [("int6", RowScheme(31, -31, 1e-8)), ("int5", RowScheme(15, -16, 1e-8))])
def test_matches_the_recorded_rows_bit_for_bit(shared, name, scheme):
    with np.load(shared / "reference/pr372/units.npz") as stored:
        w, expected, gradient = (stored[f"fake_quant_{name}/{item}"] for item in ("in/w", "out/w", "out/grad"))
    columns = jnp.arange(w.shape[1], dtype=jnp.float32)
    function = lambda w, axis: fake_quant(w, scheme, axis=axis)  # noqa: E731
    np.testing.assert_array_equal(function(jnp.asarray(w), 1), expected)
    np.testing.assert_array_equal(function(jnp.asarray(w.T), 0).T, expected)
    np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(function(w, 1) * columns))(jnp.asarray(w)), gradient)


def test_strength_is_traced_and_runs_from_the_weight_to_its_grid():
    w = jax.random.normal(jax.random.key(0), (6, 40))
    run = jax.jit(lambda w, s: fake_quant(w, FLOORED, axis=-1, strength=s))
    rounded = run(w, 1.0)
    np.testing.assert_array_equal(run(w, 0.0), w)
    np.testing.assert_allclose(run(w, 0.5), (w + rounded) / 2, rtol=1e-6)
    assert run._cache_size() == 1
    step = jnp.maximum(jnp.abs(w).max(1, keepdims=True), 1) / 31
    codes = rounded / step
    np.testing.assert_allclose(codes, jnp.round(codes), atol=1e-5)
    assert float(jnp.abs(rounded - w).max()) > 0


def test_scale_floor_keeps_small_rows_coarse():
    # Step 1/31 although the row's own would be 0.01/31; 0.5/31 is a tie, rounded to the even code 0.
    np.testing.assert_allclose(fake_quant(jnp.array([[0.01, 0.02, -0.04, 0.5 / 31]]), FLOORED, axis=1) * 31, [[0, 1, -1, 0]], atol=1e-6)


def test_a_scheme_without_a_step_is_refused():
    for bad in (dict(levels=31, lowest=-31), dict(levels=0, lowest=0, scale_floor=1.0), dict(levels=3, lowest=1, scale_floor=1.0)):
        with pytest.raises(ValueError, match="RowScheme needs"):
            RowScheme(**bad)
