"""The `pallas` backend: our Mosaic GPU kernels on a GPU, splash attention with the XSA epilogue on a TPU."""

import jax


def platform() -> str:
    """That of the mesh in context (also an abstract one, for compiling ahead of time: `jax.sharding.use_abstract_mesh`), else the
    default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def xsa_attention(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, *, xsa: bool, first_BS=None, gate_BSH=None, factors=None
) -> jax.Array:
    """As `kernels.attention.xsa_attention`, on `platform()`. ValueError on a CPU."""
    where = platform()
    if where in ("gpu", "cuda"):
        from golf_jax.kernels.attention import mosaic_gpu

        return mosaic_gpu.xsa_attention(q_BTHK, k_BTGK, v_BTGK, xsa=xsa, first_BS=first_BS, gate_BSH=gate_BSH, factors=factors)
    if where == "tpu":
        from golf_jax.kernels.attention import splash_tpu

        y_BTHK = splash_tpu.xsa_attention(q_BTHK, k_BTGK, v_BTGK, xsa=xsa, first_BS=first_BS)
        return y_BTHK if gate_BSH is None else y_BTHK * jax.nn.sigmoid(gate_BSH)[..., None]
    raise ValueError(f"attention backend 'pallas' has kernels for GPU and TPU, not for {where!r}: use 'xla'")
