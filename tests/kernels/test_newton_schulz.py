"""The steps of Newton-Schulz in C++: those of XLA, rounded at the same places, and taken wherever the optimizer of a recipe can."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_recipes import tiny

from golf_jax.config import load_recipe
from golf_jax.kernels import newton_schulz as kernel
from golf_jax.kernels.native import library
from golf_jax.model import init_params
from golf_jax.optim import newton_schulz
from golf_jax.optim.optimizer import group_scalars
from golf_jax.training.state import optimizer

pytestmark = pytest.mark.skipif(not library.compiler(), reason="no C++ compiler on this machine")
OF_2135 = next(g for g in load_recipe("pr2135").optim.groups if g.kind == "muon").newton_schulz_coefficients


@pytest.fixture
def everywhere(monkeypatch):
    """Also on processors whose products are no faster in C++."""
    monkeypatch.setattr(library, "WIDE", True)
    monkeypatch.setattr(library, "PAIRS", True)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("square_first", [False, True])
@pytest.mark.parametrize("shape", [(3, 16, 48), (64, 64), (2, 2, 48, 80), (112, 32)])
def test_steps_are_those_of_xla(shape, square_first):
    """Panels of one, two and three vectors, a last panel of another width, tall matrices, and coefficients that change."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    for coefficients in (((3.4445, -4.7750, 2.0315),), OF_2135):
        for dtype in (jnp.float32, jnp.bfloat16):
            here, there = (
                newton_schulz(x, len(OF_2135), dtype, coefficients=coefficients, square_first=square_first, backend=backend)
                for backend in ("native", "xla")
            )
            assert here.dtype == there.dtype == dtype and here.shape == shape
            here, there = np.asarray(here, np.float32), np.asarray(there, np.float32)
            if dtype == jnp.float32:
                np.testing.assert_allclose(here, there, rtol=0, atol=3e-6)
            else:  # the sums are float32, in another order: few of them are rounded to another neighbour
                np.testing.assert_allclose(here, there, rtol=0, atol=2**-6)
                assert np.mean(here != there) < 0.05


@pytest.mark.usefixtures("everywhere")
def test_zero_stays_zero_and_what_is_no_number_stays_none():
    for dtype in (jnp.float32, jnp.bfloat16):
        assert not np.any(newton_schulz(jnp.zeros((2, 16, 32)), 5, dtype, backend="native"))
        poisoned = newton_schulz(jnp.ones((2, 16, 32)).at[0, 3, 5].set(jnp.nan), 5, dtype, backend="native")
        np.testing.assert_array_equal(np.isnan(np.asarray(poisoned, np.float32)).all((1, 2)), [True, False])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("attention", "taken"), [("native", True), ("xla", False)])
@pytest.mark.parametrize("numerics", ["as_run", "fp32"])
def test_the_optimizer_of_a_recipe_takes_them(attention, taken, numerics):
    recipe = tiny("pr638")
    recipe = replace(recipe, model=replace(recipe.model, attention=attention, width=32, num_heads=2, num_kv_heads=1), numerics=numerics)
    params = init_params(recipe.model, jax.random.key(0))
    opt = optimizer(recipe, params, 1, None)

    def step(params):
        return opt.update(params, opt.init(params), params, lr_factor=1.0, groups=group_scalars(recipe.optim, 0), clip_norm=1.0)

    assert ("golf_newton_schulz" in jax.jit(step).lower(params).as_text()) == taken


def test_they_are_left_to_xla_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(library, "WIDE", True)
    monkeypatch.setattr(library, "PAIRS", False)
    wide, half = jnp.zeros((16, 32)), jnp.zeros((16, 32), jnp.bfloat16)
    assert kernel.runs("native", wide) and not kernel.runs("native", half) and not kernel.runs("xla", wide)
    assert not kernel.runs("native", jnp.zeros((16, 40)))
