"""The MLP's second map with the activation inside the products, in two ways.

- `xla`     the plain form: activation and map are passes of their own (`golf_jax.model.layers`). Any platform, any shape.
- `pallas`  on NVIDIA Hopper, bf16 or fp16, our Mosaic GPU kernels (`mosaic_gpu.py`). They take each row's factor and so go with the
            attention backend `pallas`, with which norms act behind the maps.

`pallas` is opaque to the SPMD partitioner: on more than one device call it inside `jax.shard_map(..., check_vma=False)`.
Shapes: N rows, F hidden, D width.
"""

import jax


def supported_backends(platform: str, width: int, hidden: int, dtype, *, attention: str) -> tuple[str, ...]:
    """What runs on a platform ("cpu", "gpu" or "cuda", "tpu") beside an attention backend, what `auto` takes first: it is `xla`
    everywhere, as no GPU has timed the kernels."""
    fits = jax.numpy.dtype(dtype).itemsize == 2 and width % 128 == hidden % 128 == 0
    return ("xla", "pallas") if platform in ("gpu", "cuda") and attention == "pallas" and fits else ("xla",)


def squared_leaky_linear(u_NF: jax.Array, r_N: jax.Array, w_FD: jax.Array, slope: float) -> jax.Array:
    """(leaky_relu(r u))^2 W in u's dtype [N, D] by the `pallas` kernels; u and W of one dtype, r > 0 float32.

    Differentiable (reverse) in u, r and W. Raises ValueError for shapes and dtypes that the kernels do not have.
    """
    from golf_jax.kernels.mlp import mosaic_gpu

    return mosaic_gpu.squared_leaky_linear(u_NF, r_N, w_FD, slope)
