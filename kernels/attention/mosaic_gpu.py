"""Causal grouped-query attention with a fused XSA epilogue for NVIDIA Hopper, in Pallas Mosaic GPU.

Three kernels, each of two compute warpgroups (64 rows each) and one warpgroup that only issues TMA copies:
- forward: FlashAttention over key blocks, the diagonal one last; it holds the tile's own values, so the epilogue
  y = g (o - c v), c = o.v / |v|^2, g = sigmoid(gate), costs no further read and acts on the fp32 o. Saves y, the log-sum-exp
  and c; never o.
- dq: takes dy, forms do = g (dy - a v), a = dy.v / |v|^2, in its prologue and delta = o.do = y.dy (true because y = g P o,
  do = g P dy for the projector P = 1 - v v^T / |v|^2), and hands do, delta and a to the next kernel. The gate's gradient is
  delta (1 - g): nothing is divided by a gate that may be zero.
- dkv: a key block against all queries that see it, all heads of the group in one program: no atomics, deterministic.
  The XSA part of dv, -(a y + c do) summed over the heads, is added there.
With factors the scores of a head are multiplied by its gain, and dq and dkv also give dq.q, dk.k and dv.v of each row, which is all that
the gradients of gain, norms and of anything else that scales q, k and v need: no further pass over them.
With a document mask (`first`) each kernel visits only the blocks that share a document, and masks only those on a border.

Layouts: q [B,T,H,K], k and v [B,T,G,K], gate and row statistics [B,H,T] fp32 (log-sum-exp in base 2). The pipeline and the
register budget follow jax.experimental.pallas.ops.gpu.attention_mgpu (FlashAttention-3), which has no causal backward.
Checked in the GPU interpreter and by ahead-of-time compilation (benchmarks/aot_compile.py).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from golf_jax.kernels.attention.mosaic_gpu_backward import backward_dkv, backward_dq
from golf_jax.kernels.attention.mosaic_gpu_common import LOG2E, LOWEST, Documents, along, first_keys, iota, num_stages
from golf_jax.kernels.mosaic_gpu import (
    OLD_API,
    ROWS,
    TILE,
    WARPGROUPS,
    add_dot,
    columns,
    dot,
    full_rows,
    launch,
    load,
    load_rows,
    specialize,
    stage_loop,
    statistics_buffer,
    tile_buffer,
    transposed,
    zeros,
)

HEAD_DIMS = (32, 64, 128)


def xsa_attention(q_BTHK, k_BTGK, v_BTGK, *, xsa: bool, first_BS=None, gate_BSH=None, factors=None, interpret: bool = False) -> jax.Array:
    """As `kernels.attention.xsa_attention`; bf16 or fp16, head_dim 32, 64 or 128, T padded with zeros to a multiple of 128.

    The padding is exact: no query sees a later key, and padded queries have dy = 0. `interpret` simulates the GPU on
    any platform (jax >= 0.11; slow, for tests).
    """
    head_dim, T = q_BTHK.shape[-1], q_BTHK.shape[1]
    if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention backend 'pallas' on a GPU needs bfloat16 or float16, got {q_BTHK.dtype}: use 'xla'")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"attention backend 'pallas' on a GPU needs head_dim in {HEAD_DIMS}, got {head_dim}: use 'xla'")
    if interpret and OLD_API:
        raise ValueError("the GPU interpreter of Pallas needs jax 0.11 (Python 3.12)")
    pad = ((0, 0), (0, -T % TILE), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, pad) for x in (q_BTHK, k_BTGK, v_BTGK))
    documents = None if first_BS is None else Documents.of(jnp.pad(first_BS, pad[:2], constant_values=T))
    rows = lambda x: jnp.pad(x.astype(jnp.float32), pad[:3]).swapaxes(1, 2)  # noqa: E731
    gate = None if gate_BSH is None else rows(gate_BSH)
    if factors is not None:
        factors = (factors[0].astype(jnp.float32), *map(rows, factors[1:]))
    y: jax.Array = _attention(q, k, v, gate, factors, documents, xsa, interpret)  # pyright: ignore[reportAssignmentType]
    return y[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, gate, factors, documents, xsa, interpret) -> jax.Array:
    return forward(q, k, v, _open(gate), factors and factors[0], documents, xsa, interpret)[0]


def _open(gate):
    return None if gate is None else jax.nn.sigmoid(gate)


def _forward_rule(q, k, v, gate, factors, documents, xsa, interpret):
    gain = factors and factors[0]
    y, lse, c = forward(q, k, v, _open(gate), gain, documents, xsa, interpret)
    return y, (q, k, v, gate, gain, documents, y, lse, c)


def _backward_rule(xsa, interpret, residuals, dy):
    q, k, v, gate, gain, documents, y, lse, c = residuals
    opened = _open(gate)
    dq, delta, do, a, q_dot = backward_dq(q, k, v, opened, gain, documents, y, dy, lse, xsa, interpret)
    dk, dv, dots = backward_dkv(q, k, v, gain, documents, y, dy if do is None else do, lse, delta, a, c, interpret)
    dfactors = None
    if gain is not None:
        v_dot = dots[1] if len(dots) == 2 else jnp.sum(dv.astype(jnp.float32) * v.astype(jnp.float32), -1).swapaxes(1, 2)
        dfactors = jnp.sum(q_dot, (0, 2)), gain[:, None] * q_dot, dots[0], v_dot
    return dq, dk, dv, None if opened is None else delta * (1 - opened), dfactors, None


_attention.defvjp(_forward_rule, _backward_rule)


def forward(q, k, v, gate, gain, documents, xsa, interpret):
    """y, log2-sum-exp [B,H,T] and c = o.v / |v|^2 [B,H,T] (None without xsa)."""
    B, T, H, K = q.shape
    group, tiles, scale = H // k.shape[2], T // TILE, K**-0.5 * LOG2E
    stages = num_stages(K, tiles)

    def xsa_attention_forward(q_ref, k_ref, v_ref, gate_ref, gain_ref, documents, y_ref, lse_ref, c_ref, *scratch):
        q_smem, k_smem, v_smem, gate_smem, first_smem, lse_smem, c_smem, q_ready, k_ready, v_ready, k_free, v_free = scratch
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        tile = tiles - 1 - lax.axis_index("tile")  # the longest rows first: no long tail
        kv_head = lax.div(head, jnp.int32(group))
        first_key, last_border = first_keys(documents, batch, tile)
        begin = lax.div(first_key, jnp.int32(TILE))
        head_scale = scale if gain is None else scale * gain_ref[head]

        def compute(warpgroup):
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            own = q_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], own, q_ready.at[warpgroup])
            if gate is not None:
                plgpu.copy_gmem_to_smem(gate_ref.at[batch, head, rows], gate_smem.at[warpgroup], q_ready.at[warpgroup])
            if documents is not None:
                plgpu.copy_gmem_to_smem(documents.first.at[batch, rows], first_smem.at[warpgroup], q_ready.at[warpgroup])
            plgpu.barrier_wait(q_ready.at[warpgroup])

            def mask_documents(scores, step):
                first = load(first_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1))
                return jnp.where(iota(scores.shape, 1, step * TILE) >= columns(first, scores.shape), scores, -jnp.inf)

            def block(step, carry, diagonal=False):
                o, largest, total = carry
                slot = lax.rem(step - begin, jnp.int32(stages))
                plgpu.barrier_wait(k_ready.at[slot])
                scores = dot(own, transposed(k_smem.at[slot])) * head_scale
                plgpu.barrier_arrive(k_free.at[slot])
                if diagonal:
                    row, column = iota(scores.shape, 0, warpgroup * ROWS), iota(scores.shape, 1, 0)
                    scores = jnp.where(row >= column, scores, -jnp.inf)
                if documents is not None:
                    border = step * TILE < last_border
                    scores = lax.cond(border, lambda x: mask_documents(x, step), lambda x: x, scores)
                new_largest = jnp.maximum(largest, scores.max(axis=1))
                decay = jnp.exp2(largest - new_largest)
                p = jnp.exp2(scores - columns(new_largest, scores.shape))
                total = total * decay + p.sum(axis=1)
                p16 = p.astype(q.dtype)
                plgpu.barrier_wait(v_ready.at[slot])
                o = add_dot(o * columns(decay, o.shape), p16, v_smem.at[slot], interpret)
                if not diagonal:
                    plgpu.barrier_arrive(v_free.at[slot])
                return o, new_largest, total

            carry = zeros((ROWS, K)), full_rows(LOWEST), full_rows(0)
            o, largest, total = block(tile, lax.fori_loop(begin, tile, block, carry), diagonal=True)
            y = o / columns(total, o.shape)
            slot = lax.rem(tile - begin, jnp.int32(stages))
            if xsa:
                own_v = load_rows(v_smem.at[slot, pl.ds(warpgroup * ROWS, ROWS)])
                c = along(y, own_v)
                y = y - columns(c, y.shape) * own_v
                c_smem[warpgroup] = c
            plgpu.barrier_arrive(v_free.at[slot])
            if gate is not None:
                y = y * columns(load(gate_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1)), y.shape)
            own[...] = y.astype(q.dtype)
            lse_smem[warpgroup] = largest + jnp.log(total) * LOG2E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own, y_ref.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[batch, head, rows])
            if xsa:
                plgpu.copy_smem_to_gmem(c_smem.at[warpgroup], c_ref.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def produce(step, slot):
                rows = pl.ds((begin + step) * TILE, TILE)
                plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], k_smem.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], v_smem.at[slot], v_ready.at[slot])

            def wait_until_free(slot):
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

            stage_loop(tile + 1 - begin, stages, produce, wait_until_free)

        specialize(compute, copy)

    row_statistics = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    return launch(
        xsa_attention_forward, q, k, v, gate, gain, documents,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), row_statistics, row_statistics if xsa else None],
        scratch=[
            tile_buffer((WARPGROUPS, ROWS, K), q.dtype),
            tile_buffer((stages, TILE, K), q.dtype),
            tile_buffer((stages, TILE, K), q.dtype),
            None if gate is None else statistics_buffer(WARPGROUPS, ROWS),
            None if documents is None else statistics_buffer(WARPGROUPS, ROWS, dtype=jnp.int32),
            statistics_buffer(WARPGROUPS, ROWS),
            statistics_buffer(WARPGROUPS, ROWS) if xsa else None,
            plgpu.Barrier(num_arrivals=1 + (gate is not None) + (documents is not None), num_barriers=WARPGROUPS),
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            *[plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)] * 2,
        ],
        grid={"batch": B, "head": H, "tile": tiles},
        interpret=interpret,
    )  # fmt: skip
