"""The steps of Newton-Schulz on a CPU in C++ (kernels/native/newton_schulz.h): one call per batch of matrices.

XLA:CPU makes a kernel of every product, sum and rounding, and computes both halves of the symmetric Gram matrix; here a matrix stays in the
cache for all steps. Shapes: L matrices of M rows and N columns, S steps.
"""

import jax
import jax.numpy as jnp

from golf_jax.kernels.native import library


def runs(backend: str, x: jax.Array) -> bool:
    """Whether `steps` takes x [..., M, N] with this attention backend."""
    fast = {jnp.dtype(jnp.float32): library.WIDE, jnp.dtype(jnp.bfloat16): library.PAIRS}.get(x.dtype, False)
    return backend == "native" and fast and not any(size % 16 for size in x.shape[-2:])


def steps(x_LMN: jax.Array, coefficients_S3: jax.Array, *, square_first: bool) -> jax.Array:
    """x [L, M, N], M <= N, of norm 1 at most, after S steps with (a, b, c) each; rounded where `golf_jax.optim.newton_schulz` rounds."""
    library.ready()
    out = jax.ShapeDtypeStruct(x_LMN.shape, x_LMN.dtype)
    call = jax.ffi.ffi_call(library.TARGETS[f"newton_schulz_{x_LMN.dtype}"], out, vmap_method="sequential")
    return call(x_LMN, coefficients_S3, square_first=square_first)
