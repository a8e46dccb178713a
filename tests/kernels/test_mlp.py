"""The MLP's kernels against the definition in float64 (in the GPU interpreter, jax >= 0.11), and that they lower for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from golf_jax.kernels.mlp import mosaic_gpu, squared_leaky_linear, supported_backends

NAMES = ("m", "du", "dr", "dw")
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="the GPU interpreter of Pallas works from jax 0.11 (Python 3.12) on"
)


def inputs(N, F, D, dtype):
    """u with a row and a column of zeros, r, W and the cotangent of m, rounded to dtype."""
    rng = np.random.default_rng(0)
    u, w, dm = (rng.standard_normal(shape) for shape in ((N, F), (F, D), (N, D)))
    u[3] = u[:, 5] = 0
    return [jnp.asarray(u, dtype), jnp.asarray(0.5 + rng.random(N), jnp.float32), *(jnp.asarray(a, dtype) for a in (w, dm))]


def with_gradients(function, u, r, w, dm):
    m, pullback = jax.vjp(function, u, r, w)
    return m, *pullback(dm)


def definition(u, r, w, slope):
    x = u * r[:, None]
    return jnp.square(jnp.where(x > 0, x, slope * x)) @ w


@pytest.mark.parametrize(
    ("N", "F", "D", "dtype", "slope"),
    [
        (200, 128, 256, "bfloat16", 0.5),  # N padded
        (128, 256, 128, "bfloat16", 0.0),
        (640, 384, 128, "float16", 0.5),  # more blocks than pipeline stages, fewer columns than two tiles
        pytest.param(1100, 512, 384, "bfloat16", 0.3, marks=pytest.mark.slow),
    ],
)
@needs_interpreter
def test_forward_and_gradients_match_float64(N, F, D, dtype, slope):
    arrays = inputs(N, F, D, dtype)
    got = with_gradients(functools.partial(mosaic_gpu.squared_leaky_linear, slope=slope, interpret=True), *arrays)
    with jax.enable_x64(True):
        exact = with_gradients(functools.partial(definition, slope=slope), *(np.asarray(a, np.float64) for a in arrays))
        expected = [np.asarray(a) for a in exact]
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert a.dtype == ("float32" if name == "dr" else dtype) and a.shape == b.shape
        tolerance = 1e-6 if name == "dr" else {"bfloat16": 3e-3, "float16": 4e-4}[dtype]
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error < tolerance, f"{name}: relative L2 error {error:.2e}"
    assert not np.asarray(got[2])[3].any()  # nothing flows through a row of zeros


def test_kernels_lower_for_cuda():
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs(200, 256, 128, "bfloat16")]
    run = jax.jit(functools.partial(with_gradients, functools.partial(squared_leaky_linear, slope=0.5)))
    text = run.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert all(kernel in text for kernel in ("mlp_forward", "mlp_backward_u", "mlp_backward_w"))


@pytest.mark.parametrize(
    ("dtype", "F", "D", "message"),
    [("float32", 256, 128, "needs bfloat16 or float16"), ("bfloat16", 192, 128, "multiples of 128, got .*192 and 128: use 'xla'")],
)
def test_what_the_kernels_do_not_have_is_refused(dtype, F, D, message):
    with pytest.raises(ValueError, match=message):
        squared_leaky_linear(*inputs(128, F, D, dtype)[:3], slope=0.5)


def test_backends_of_a_platform():
    assert supported_backends("gpu", 512, 1536, jnp.bfloat16, attention="pallas") == ("xla", "pallas")
    for platform, width, dtype, attention in (
        ("cpu", 512, "bfloat16", "pallas"),
        ("tpu", 512, "bfloat16", "pallas"),
        ("gpu", 192, "bfloat16", "pallas"),
        ("gpu", 512, "float32", "pallas"),
        ("gpu", 512, "bfloat16", "cudnn"),
    ):
        assert supported_backends(platform, width, 1536, jnp.dtype(dtype), attention=attention) == ("xla",)
