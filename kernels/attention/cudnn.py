"""cuDNN's fused attention (NVIDIA GPUs, bf16 or fp16) followed by the XSA epilogue."""

import jax
import jax.numpy as jnp

from golf_jax.kernels.attention.xsa import exclude_self_value


def xsa_attention(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, *, xsa: bool) -> jax.Array:
    """As `kernels.attention.xsa_attention`. `implementation="cudnn"` is named: None always means the quadratic path.

    Needs the CUDA plugin's cuDNN when traced (else jax raises "cuDNN is not detected").
    """
    head_dim = q_BTHK.shape[-1]
    if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention backend 'cudnn' needs bfloat16 or float16, got {q_BTHK.dtype}")
    if head_dim % 8 or head_dim > 256:
        raise ValueError(f"attention backend 'cudnn' needs head_dim % 8 == 0 and <= 256, got {head_dim}")
    o_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BTGK, v_BTGK, is_causal=True, scale=head_dim**-0.5, implementation="cudnn")
    return exclude_self_value(o_BTHK, v_BTGK) if xsa else o_BTHK
