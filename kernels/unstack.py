"""The layers of a stack as arrays of their own.

For XLA:CPU each is a program to compile, as its place in the stack is a constant in it, and so is whatever takes it in: a quarter of the
compilation of a step. `native` (kernels/attention/native.cc) makes them in one call per stack, which nothing is fused into.
"""

import jax
import jax.numpy as jnp

from golf_jax.kernels.attention import native


def unstack(x: jax.Array, *, backend: str = "xla") -> list[jax.Array]:
    """[L, ...] -> L arrays [...]; float32 with backend `native`, reverse mode only; any other is `lax.split`, whose transpose is one
    concatenation: indexing would add a padded stack per layer."""
    if backend != "native":
        return [part[0] for part in jax.lax.split(x, (1,) * x.shape[0], axis=0)]
    if x.dtype != jnp.float32:
        raise ValueError(f"unstack with backend 'native' needs float32, got {x.dtype}")
    native.ready()
    return _unstack(x)


@jax.custom_vjp
def _unstack(x: jax.Array) -> list[jax.Array]:
    part = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return list(jax.ffi.ffi_call(native.TARGETS["unstack"], [part] * x.shape[0], vmap_method="sequential")(x))


_unstack.defvjp(lambda x: (_unstack(x), None), lambda _, parts: (jnp.stack(parts),))
