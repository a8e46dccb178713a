"""The layers of a stack, their gradients too, and the maps of packed weights: natively as by XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golf_jax.config import ModelConfig
from golf_jax.kernels.cross_entropy import softcap_cross_entropy
from golf_jax.kernels.maps import linear, narrowing, packs, squared_leaky_mlp, unstack, weight_gradient
from golf_jax.kernels.native import library
from golf_jax.model.gpt import mlp

needs_compiler = pytest.mark.skipif(not library.compiler(), reason="no C++ compiler on this machine")


@needs_compiler
@pytest.mark.parametrize("shape", [(3,), (1, 7), (11, 5, 16), (4, 2, 3, 8)])
def test_native_layers_are_those_of_xla(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)

    def weighed(x: jax.Array, backend: str) -> jax.Array:
        return sum(jnp.sum(jnp.sin(part) * (i + 1)) for i, part in enumerate(unstack(x, backend=backend)))  # pyright: ignore

    step = jax.jit(jax.value_and_grad(weighed), static_argnums=1)
    for here, there in zip(jax.jit(lambda x: unstack(x, backend="native"))(x), unstack(x), strict=True):
        assert here.shape == shape[1:] and np.array_equal(here, there)
    for here, there in zip(step(x, "native"), step(x, "xla"), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-6)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 7, 64, 150])
@pytest.mark.parametrize("width", [16, 32, 48, 64, 80, 192, 208])
def test_a_packed_map_is_the_product(rows, width):
    x, stack = normal(0, rows, 33), normal(1, 3, 33, width)
    for w, part in zip(unstack(stack, backend="native", packed=True), stack, strict=True):
        np.testing.assert_allclose(jax.jit(linear)(x, w), x @ part, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("rows", [5, 64, 200])
def test_a_packed_mlp_is_that_of_its_layers(rows):
    x, r, up, down = normal(0, rows, 32), 0.5 + jax.random.uniform(jax.random.key(1), (rows,)), normal(2, 2, 32, 144), normal(3, 2, 144, 48)
    packed = (unstack(w, backend="native", packed=True) for w in (up, down))
    for u, d, up_IF, down_FO in zip(*packed, up, down, strict=True):
        exact = [np.asarray(value, np.float64) for value in (x, r[:, None], up_IF, down_FO)]
        hidden = np.square(np.maximum(y := exact[1] * (exact[0] @ exact[2]), 0.25 * y))
        error = np.abs(squared_leaky_mlp(x, r, u, d, 0.25) - hidden @ exact[3])
        assert np.all(error < 2e-6 * (hidden @ np.abs(exact[3])))  # float32: terms cancel


@needs_compiler
def test_packed_rows_of_several_calls_at_a_time():
    x, (w,) = normal(0, 3, 20, 32), unstack(stack := normal(1, 1, 32, 48), backend="native", packed=True)
    np.testing.assert_allclose(jax.vmap(lambda x: linear(x, w))(x), x @ stack[0], atol=1e-4)


def test_what_is_packed(monkeypatch):
    """Maps whose outputs fill vectors, where the processor has wide ones; else XLA's products are as fast."""
    monkeypatch.setattr(library, "WIDE", True)
    shapes = (2, 8, 32), (2, 8, 24), (2, 32)
    assert [packs("native", jnp.zeros(shape)) for shape in shapes] == [True, False, False]
    assert not packs("xla", jnp.zeros(shapes[0]))
    monkeypatch.setattr(library, "WIDE", False)
    assert not packs("native", jnp.zeros(shapes[0]))


@needs_compiler
def test_several_stacks_at_a_time():
    x = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)
    for here, there in zip(jax.vmap(lambda x: unstack(x, backend="native"))(x), jax.vmap(unstack)(x), strict=True):
        assert np.array_equal(here, there)


def test_native_is_for_float32():
    with pytest.raises(ValueError, match="needs float32, got bfloat16"):
        unstack(jnp.zeros((2, 3), jnp.bfloat16), backend="native")


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 3), (3, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_a_narrowing_map_has_the_gradients_of_the_product(inputs, outputs, dtype, tolerance):
    sizes = (2, 6, inputs), (2, inputs, outputs), (2, 6, outputs)
    x, w, dy = (jax.random.normal(jax.random.key(i), size, dtype) for i, size in enumerate(sizes))
    (y, back), (expected, back_of_it) = jax.vjp(jax.vmap(narrowing), x, w), jax.vjp(jnp.matmul, x, w)
    for got, want in zip((y, *back(dy)), (expected, *back_of_it(dy)), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=0, atol=tolerance)


def test_training_has_it_in_the_mlp_and_the_head():
    """With attention `xla` the MLP stays what forward mode can differentiate."""
    x, up, down = jnp.ones((1, 4, 8)), jnp.ones((8, 16)), jnp.ones((16, 8))

    def turned(f, *args):
        return "optimization_barrier" in jax.jit(jax.grad(lambda *given: f(*given).sum(), argnums=(0, 1))).lower(*args).as_text()

    def layer(attention):
        config = ModelConfig(attention=attention, dtype="float32")
        return lambda up, down: mlp(config, {"up": up, "down": down}, x)

    assert {attention: turned(layer(attention), up, down) for attention in ("native", "xla")} == {"native": True, "xla": False}
    assert turned(lambda x, table: softcap_cross_entropy(x, table, jnp.zeros(4, jnp.int32), softcap=30.0), x[0], jnp.ones((32, 8)))


def test_only_a_cpu_turns_the_product_of_a_narrowing_map():
    x, dy = jnp.zeros((4, 8)), jnp.zeros((4, 3))
    texts = {
        platform: jax.jit(weight_gradient).trace(x, dy).lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda")
    }
    assert {platform: "optimization_barrier" in text for platform, text in texts.items()} == {"cpu": True, "cuda": False}
    assert "tensor<3x8xf32>" in texts["cpu"] and "tensor<3x8xf32>" not in texts["cuda"]
