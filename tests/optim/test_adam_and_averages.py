"""AdamW against torch.optim.AdamW's formula, bfloat16 tables, EMA and SWA."""

import jax.numpy as jnp
import numpy as np
import pytest

from golf_jax.optim.adam import scale_by_adam
from golf_jax.optim.averaging import EMAScalars, ema_init, ema_update, swa_init, swa_mean, swa_update


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.95), (0.9, 0.999), (0.0, 0.95)])
def test_direction_is_bias_corrected_adam(b1, b2):
    """In float64. 1 - 0.999^t taken in float32 would be 2e-5 off, and every step 1e-5 too long."""
    rng = np.random.default_rng(0)
    opt, m, v = scale_by_adam(b1, b2, 1e-8), np.zeros((4, 3)), np.zeros((4, 3))
    state = opt.init({"w": jnp.zeros((4, 3))})
    for t in range(1, 5):
        g = rng.standard_normal((4, 3)).astype(np.float32)
        out, state = opt.update({"w": jnp.asarray(g)}, state)
        m, v = b1 * m + (1 - b1) * g.astype(np.float64), b2 * v + (1 - b2) * g.astype(np.float64) ** 2
        want = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        np.testing.assert_allclose(out["w"], want, rtol=1e-6, atol=1e-7)


def test_bfloat16_tables_round_once_per_step():
    """Moments are stored in bfloat16, the direction uses the unrounded float32 ones (docs/recipes/pr638.md, section 4.3)."""
    opt = scale_by_adam(0.9, 0.95, 1e-8)
    state = opt.init({"w": jnp.zeros(1000, jnp.bfloat16)})
    g = jnp.asarray(np.random.default_rng(1).standard_normal(1000), jnp.bfloat16)
    out, state = opt.update({"w": g}, state)
    assert state.mu["w"].dtype == state.nu["w"].dtype == jnp.bfloat16 and out["w"].dtype == jnp.float32
    np.testing.assert_allclose(out["w"], jnp.sign(g), rtol=1e-4)  # rounded moments would be 4e-3 off


def test_ema_starts_at_the_weights_without_correction():
    weights = {"w": jnp.asarray([1.0, 2.0], jnp.bfloat16)}
    ema = ema_init(weights)
    assert ema["w"].dtype == jnp.float32
    ema = ema_update(ema, {"w": jnp.asarray([3.0, 2.0])}, EMAScalars.of(0.9))
    np.testing.assert_allclose(ema["w"], [1.2, 2.0], rtol=1e-6)


def test_swa_is_the_mean_of_what_was_collected():
    states = [{"w": jnp.asarray([float(i)])} for i in range(4)]
    swa = swa_init(states[0])
    for weights, collect in zip(states, (False, True, False, True), strict=True):
        swa = swa_update(swa, weights, jnp.bool_(collect))
    assert int(swa.count) == 2
    assert float(swa_mean(swa)["w"][0]) == 2.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_swa_sums_in_the_weights_own_dtype(dtype):
    swa = swa_init({"w": jnp.zeros(1, dtype)})
    for _ in range(300):
        swa = swa_update(swa, {"w": jnp.ones(1, dtype)}, jnp.bool_(True))
    mean = float(swa_mean(swa)["w"][0])
    assert mean == 1.0 if dtype == jnp.float32 else mean < 0.9  # 256 + 1 is 256 in bfloat16: what the record does too
