"""What evaluation makes of the parameters once: the same scores, from maps packed where that is faster."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_recipes import tiny

from golf_jax.config import GolfError
from golf_jax.evaluation.scorer import scoring_program, shapes_of, weights_program
from golf_jax.kernels.maps import Packed
from golf_jax.kernels.native import library
from golf_jax.mesh import make_mesh
from golf_jax.model import hidden, init_params, nll, weights_of

TOKENS = np.arange(20).reshape(2, 10)


def varied(config):
    fresh = init_params(config, jax.random.key(0))
    return {name: x + 0.2 * jax.random.normal(jax.random.key(i), x.shape) for i, (name, x) in enumerate(fresh.items())}


needs_wide = pytest.mark.skipif(not library.WIDE or not library.compiler(), reason="no AVX-512 or no C++ compiler on this machine")


@pytest.mark.parametrize(
    ("name", "backend"),
    [("pr372", "xla"), *(pytest.param(name, "native", marks=needs_wide) for name in ("pr372", "pr638", "pr2005", "pr2135"))],
)
def test_scores_are_those_of_the_parameters(name, backend):
    """PR 372 evaluates with fake quantization. The head gates of some recipes are too few to be packed."""
    config = replace(tiny(name).model, num_heads=2, num_kv_heads=1, attention=backend)  # head_dim 16
    params = varied(config)
    once = jax.jit(lambda p: weights_of(config, p, packed=True))(params)
    maps = [w for layer in once.layers for w in layer.values() if isinstance(w, Packed)]
    assert bool(maps) == (backend == "native")
    for last in (None, 4):
        targets = TOKENS[:, ::-1] if last is None else TOKENS[:, :last]
        got, expected = (jax.jit(lambda p, last=last: nll(config, p, TOKENS, targets, last=last))(p) for p in (once, params))  # noqa: B023
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@needs_wide
def test_scoring_prepares_the_weights_once():
    """The program of the batches takes the packed maps and makes nothing of the parameters itself."""
    config = replace(tiny("pr638").model, num_heads=2, num_kv_heads=1, attention="native")
    mesh, shapes = make_mesh(1), shapes_of(init_params(config, jax.random.key(0)))
    rows, seq_len, last, looping = 1, 8, None, False
    texts = {
        "once": weights_program(config, mesh, shapes).as_text(),
        "per batch": scoring_program(config, mesh, shapes, rows, seq_len, last, looping).as_text(),
    }
    calls = {call: [when for when, text in texts.items() if call in text] for call in ("golf_unstack", "golf_linear", "golf_mlp")}
    assert calls == {"golf_unstack": ["once"], "golf_linear": ["per batch"], "golf_mlp": ["per batch"]}


def test_what_looks_inside_the_forward_pass_needs_the_parameters():
    config = tiny("pr638").model
    params = varied(config)
    for given in ({"tap": lambda name, x: None}, {"fake_quant": 1.0}, {"branch": lambda what, x, y: y}):
        hidden(replace(config, attention="xla"), params, TOKENS, **given)
        with pytest.raises(TypeError, match="need the parameters themselves"):
            hidden(replace(config, attention="xla"), weights_of(replace(config, attention="xla"), params), TOKENS, **given)


def test_the_leaves_are_those_of_the_model():
    config = replace(tiny("pr638").model, attention="xla")
    with pytest.raises(GolfError, match="leaf 'q' is missing"):
        weights_of(config, {name: x for name, x in varied(config).items() if name != "q"})
