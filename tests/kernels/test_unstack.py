"""The layers of a stack: natively as by XLA, their gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golf_jax.kernels.attention import native
from golf_jax.kernels.unstack import unstack

needs_compiler = pytest.mark.skipif(not native.compiler(), reason="no C++ compiler on this machine")


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


@needs_compiler
def test_several_stacks_at_a_time():
    x = jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4)
    for here, there in zip(jax.vmap(lambda x: unstack(x, backend="native"))(x), jax.vmap(unstack)(x), strict=True):
        assert np.array_equal(here, there)


def test_native_is_for_float32():
    with pytest.raises(ValueError, match="needs float32, got bfloat16"):
        unstack(jnp.zeros((2, 3), jnp.bfloat16), backend="native")
