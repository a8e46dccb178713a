"""The splash attention that ships with jax (TPU, Pallas), followed by the XSA epilogue."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from golf_jax.kernels.attention.xsa import exclude_self_value

LANES = 128  # sequences are padded to a multiple
BLOCKS = (512, 256, 128)  # the largest that divides the padded sequence


def xsa_attention(q_BTHK, k_BTGK, v_BTGK, *, xsa: bool, first_BS=None, interpret: bool = False) -> jax.Array:
    """As `kernels.attention.xsa_attention`; bf16 or fp32, head_dim 64 or a multiple of 128.

    Padding with zeros is exact: no query sees a later key. The start of a segment
    serves as its id. `interpret` runs the kernel as plain XLA on any platform.
    """
    T, H, K = q_BTHK.shape[1:]
    if q_BTHK.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"attention backend 'pallas' on a TPU needs bfloat16 or float32, got {q_BTHK.dtype}: use 'xla'")
    if K != 64 and K % LANES:
        raise ValueError(f"attention backend 'pallas' on a TPU needs head_dim 64 or a multiple of 128, got {K}: use 'xla'")
    padded = T + -T % LANES
    block = next(size for size in BLOCKS if padded % size == 0)
    attention = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((padded, padded))] * H),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        interpret=interpret,
    )
    pad = ((0, 0), (0, 0), (0, padded - T), (0, 0))
    heads_first = (jnp.pad(x.swapaxes(1, 2), pad) for x in (q_BTHK * jnp.asarray(K**-0.5, q_BTHK.dtype), k_BTGK, v_BTGK))
    segments = None
    if first_BS is not None:
        ids_BT = jnp.pad(first_BS, ((0, 0), (0, padded - T)))
        segments = splash.SegmentIds(ids_BT, ids_BT)
    o_BHTK: jax.Array = jax.vmap(attention)(*heads_first, segments)  # pyright: ignore[reportAssignmentType]
    o_BTHK = o_BHTK.swapaxes(1, 2)[:, :T]
    return exclude_self_value(o_BTHK, v_BTGK) if xsa else o_BTHK
