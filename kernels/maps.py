"""The layers of a stack as arrays of their own, and the linear maps of evaluation, on a CPU in C++ (kernels/native/maps.h).

For XLA:CPU each layer is a program to compile, as its place in the stack is a constant in it, and so is whatever takes it in: a quarter
of the compilation of a step. `native` makes them in one call per stack, which nothing is fused into. What is not trained it packs in
the order in which tiles of registers read them: products are then a tenth faster, and the MLP's hidden state is never in memory.
Beside them the map of training whose weight's gradient XLA:CPU is slow to compute as it stands.
Shapes: L layers, M rows, I inputs, O outputs, F hidden.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.kernels.native import library


class Packed(NamedTuple):
    """A matrix [I, O], O a multiple of 16, in the order of `linear` and `mlp`. It has no gradient."""

    w_IO: jax.Array


def packs(backend: str, stack: jax.Array) -> bool:
    """Whether `unstack` can pack the layers of a stack."""
    return backend == "native" and library.WIDE and stack.ndim == 3 and stack.shape[-1] % 16 == 0


def unstack(x: jax.Array, *, backend: str = "xla", packed: bool = False) -> list[jax.Array] | list[Packed]:
    """[L, ...] -> L arrays [...]; float32 with backend `native`, reverse mode only; any other is `lax.split`, whose transpose is one
    concatenation: indexing would add a padded stack per layer. packed: only where `packs`."""
    if backend != "native":
        return [part[0] for part in jax.lax.split(x, (1,) * x.shape[0], axis=0)]
    if x.dtype != jnp.float32:
        raise ValueError(f"unstack with backend 'native' needs float32, got {x.dtype}")
    library.ready()
    return [Packed(part) for part in _layers(x, True)] if packed else _unstack(x)


def _layers(x: jax.Array, packed: bool) -> list[jax.Array]:
    part = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return list(jax.ffi.ffi_call(library.TARGETS["unstack"], [part] * x.shape[0], vmap_method="sequential")(x, packed=packed))


@jax.custom_vjp
def _unstack(x: jax.Array) -> list[jax.Array]:
    return _layers(x, False)


_unstack.defvjp(lambda x: (_unstack(x), None), lambda _, parts: (jnp.stack(parts),))


def weight_gradient(x_MI: jax.Array, dy_MO: jax.Array, **ways: Any) -> jax.Array:
    """x.T dy [I, O], on a CPU as the transpose of dy.T x where O is smaller: XLA:CPU takes half the time for that if O is 128.

    ways: of `jnp.matmul`.
    """
    if x_MI.shape[1] <= dy_MO.shape[1]:
        return jnp.matmul(x_MI.T, dy_MO, **ways)
    return jax.lax.platform_dependent(
        x_MI,
        dy_MO,
        cpu=lambda x, dy: jax.lax.optimization_barrier(jnp.matmul(dy.T, x, **ways)).T,  # else XLA turns the product again
        default=lambda x, dy: jnp.matmul(x.T, dy, **ways),
    )


@jax.custom_vjp
def narrowing(x_MI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x w with the `weight_gradient` above; reverse mode only."""
    return x_MI @ w_IO


narrowing.defvjp(
    lambda x_MI, w_IO: (x_MI @ w_IO, (x_MI, w_IO)),
    lambda given, dy_MO: (dy_MO @ given[1].T, weight_gradient(given[0], dy_MO)),
)


def linear(x_MI: jax.Array, w: Packed) -> jax.Array:
    """x w, float32 [M, O]."""
    out = jax.ShapeDtypeStruct((x_MI.shape[0], w.w_IO.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(library.TARGETS["linear"], out, vmap_method="sequential")(x_MI, w.w_IO)


def squared_leaky_mlp(x_MI: jax.Array, r_M: jax.Array, up: Packed, down: Packed, slope: float) -> jax.Array:
    """(leaky_relu(r x up))^2 down, float32 [M, O]; up [I, F], down [F, O]."""
    out = jax.ShapeDtypeStruct((x_MI.shape[0], down.w_IO.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call(library.TARGETS["mlp"], out, vmap_method="sequential")
    return call(x_MI, r_M, up.w_IO, down.w_IO, slope=np.float32(slope))
