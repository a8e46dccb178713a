"""Causal grouped-query attention with a fused XSA epilogue for NVIDIA Hopper, in Pallas Mosaic GPU.

Three kernels, each of two compute warpgroups (64 rows each) and one warpgroup that only issues TMA copies:
- forward: FlashAttention over key blocks, the diagonal one last; it holds the tile's own values, so the epilogue
  y = o - (o.u) u costs no further read and acts on the fp32 o. Saves y, the log-sum-exp and c = o.u; never o.
- dq: takes dy, forms do = dy - (dy.u) u in its prologue and delta = o.do = y.dy (true because y = P o, do = P dy for the
  projector P = 1 - u u^T), and hands do, delta and a = dy.u to the next kernel.
- dkv: a key block against all queries that see it, all heads of the group in one program: no atomics, deterministic.
  The XSA part of dv, -(a y + c do) / |v| summed over the heads, is added there.

Layouts: q [B,T,H,K], k and v [B,T,G,K], row statistics [B,H,T] fp32 (log-sum-exp in base 2). The pipeline and the
register budget follow jax.experimental.pallas.ops.gpu.attention_mgpu (FlashAttention-3), which has no causal backward.
Checked in the GPU interpreter and by ahead-of-time compilation (benchmarks/aot_compile.py).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of one compute warpgroup: the M of a Hopper matrix instruction
WARPGROUPS = 2
TILE = ROWS * WARPGROUPS  # rows of one program; sequences are padded to a multiple
LOG2E = math.log2(math.e)
EPS = 1e-12
HEAD_DIMS = (32, 64, 128)
_OLD_API = not hasattr(plgpu, "InterpretGPUParams")  # jax 0.10: load needs an index, refs have no .T


def xsa_attention(q_BTHK, k_BTGK, v_BTGK, *, xsa: bool, interpret: bool = False) -> jax.Array:
    """As `kernels.attention.xsa_attention`; bf16 or fp16, head_dim 64 or 128, T padded with zeros to a multiple of 128.

    The padding is exact: no query sees a later key, and padded queries have dy = 0. `interpret` simulates the GPU on
    any platform (jax >= 0.11; slow, for tests).
    """
    head_dim, T = q_BTHK.shape[-1], q_BTHK.shape[1]
    if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"attention backend 'pallas' on a GPU needs bfloat16 or float16, got {q_BTHK.dtype}: use 'xla'")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"attention backend 'pallas' on a GPU needs head_dim in {HEAD_DIMS}, got {head_dim}: use 'xla'")
    if interpret and _OLD_API:
        raise ValueError("the GPU interpreter of Pallas needs jax 0.11 (Python 3.12)")
    pad = ((0, 0), (0, -T % TILE), (0, 0), (0, 0))
    return _attention(*(jnp.pad(x, pad) for x in (q_BTHK, k_BTGK, v_BTGK)), xsa, interpret)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q, k, v, xsa, interpret):
    return _forward(q, k, v, xsa, interpret)[0]


def _forward_rule(q, k, v, xsa, interpret):
    y, lse, c = _forward(q, k, v, xsa, interpret)
    return y, (q, k, v, y, lse, c)


def _backward_rule(xsa, interpret, residuals, dy):
    q, k, v, y, lse, c = residuals
    dq, delta, do, a = _backward_dq(q, k, v, y, dy, lse, xsa, interpret)
    return dq, *_backward_dkv(q, k, v, y, dy if do is None else do, lse, delta, a, c, interpret)


_attention.defvjp(_forward_rule, _backward_rule)


# --- what the kernels share ------------------------------------------------------------------------------------------


def _transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0)) if _OLD_API else ref.T


def _load(ref, layout):
    return plgpu.load(ref, (), layout=layout) if _OLD_API else plgpu.load(ref, layout=layout)


def _load_rows(ref):
    """A [ROWS,K] tile as fp32 registers."""
    return _load(ref, plgpu.Layout.WGMMA).astype(jnp.float32)


def _dot(a_ref, b_ref):
    """a @ b of two shared-memory tiles, fp32."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a_ref, b_ref)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[1]), jnp.float32))


def _add_dot(total, a, b_ref, interpret):
    """total + a @ b with `total` and `a` in registers; the interpreter of jax 0.11 has no such matrix instruction."""
    if interpret:
        return total + jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b_ref))(plgpu.ACC.init(total))


def _stages(head_dim: int, blocks: int) -> int:
    """Blocks in flight, within 227 KiB of shared memory."""
    return min(3 if head_dim <= 64 else 2, blocks)


def _zeros(shape):
    return plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), plgpu.Layout.WGMMA)


def _full_rows(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _iota(shape, axis, start):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) + start


def _columns(x, shape):
    """[rows] -> [rows, n]"""
    return lax.broadcast_in_dim(x, shape, [0])


def _inverse_norm(v):
    """1 / max(|v|, EPS) of each row: finite at v = 0, where u = v * this = 0."""
    return lax.rsqrt(jnp.maximum(jnp.sum(v * v, axis=1), EPS * EPS))


def _tiles(shape, dtype):
    """Shared memory for matrix operands, swizzled for the tensor cores."""
    width = min(shape[-1], 64)
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _statistics(*shape):
    return plgpu.SMEM(shape, jnp.float32)


def _stage_loop(steps, stages, produce, wait_until_free):
    """The copy side of a ring of `stages` slots: fill each slot once it is free, then see every slot freed."""

    @pl.loop(0, steps + stages)
    def _(step):
        slot = lax.rem(step, jnp.int32(stages))
        pl.when(step >= stages)(lambda: wait_until_free(slot))
        pl.when(step < steps)(lambda: produce(step, slot))


def _launch(body, *operands, out_type, scratch, grid, interpret):
    params = plgpu.InterpretGPUParams() if interpret else None
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("batch", "head", "tile"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({"interpret": params} if interpret else {}),
    )(*operands)


def _specialize(compute, copy):
    """Run `compute(warpgroup)` in the compute warpgroups and `copy()` in the last one, with registers to match."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        copy()


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward(q, k, v, xsa, interpret):
    """y, log2-sum-exp [B,H,T] and c = o.u [B,H,T] (None without xsa)."""
    B, T, H, K = q.shape
    group, tiles, scale = H // k.shape[2], T // TILE, K**-0.5 * LOG2E
    stages = _stages(K, tiles)

    def body(q_ref, k_ref, v_ref, y_ref, lse_ref, c_ref, *scratch):
        q_smem, k_smem, v_smem, lse_smem, c_smem, q_ready, k_ready, v_ready, k_free, v_free = scratch
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        tile = tiles - 1 - lax.axis_index("tile")  # the longest rows first: no long tail
        kv_head = lax.div(head, jnp.int32(group))

        def compute(warpgroup):
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            own = q_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], own, q_ready.at[warpgroup])
            plgpu.barrier_wait(q_ready.at[warpgroup])

            def block(step, carry, diagonal=False):
                o, largest, total = carry
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(k_ready.at[slot])
                scores = _dot(own, _transposed(k_smem.at[slot])) * scale
                plgpu.barrier_arrive(k_free.at[slot])
                if diagonal:
                    row, column = _iota(scores.shape, 0, warpgroup * ROWS), _iota(scores.shape, 1, 0)
                    scores = jnp.where(row >= column, scores, -jnp.inf)
                new_largest = jnp.maximum(largest, scores.max(axis=1))
                decay = jnp.exp2(largest - new_largest)
                p = jnp.exp2(scores - _columns(new_largest, scores.shape))
                total = total * decay + p.sum(axis=1)
                p16 = p.astype(q.dtype)
                plgpu.barrier_wait(v_ready.at[slot])
                o = _add_dot(o * _columns(decay, o.shape), p16, v_smem.at[slot], interpret)
                if not diagonal:
                    plgpu.barrier_arrive(v_free.at[slot])
                return o, new_largest, total

            carry = _zeros((ROWS, K)), _full_rows(-jnp.inf), _full_rows(0)
            o, largest, total = block(tile, lax.fori_loop(0, tile, block, carry), diagonal=True)
            y = o / _columns(total, o.shape)
            slot = lax.rem(tile, jnp.int32(stages))
            if xsa:
                own_v = _load_rows(v_smem.at[slot, pl.ds(warpgroup * ROWS, ROWS)])
                inverse = _inverse_norm(own_v)
                c = jnp.sum(y * own_v, axis=1) * inverse
                y = y - _columns(c * inverse, y.shape) * own_v
                c_smem[warpgroup] = c
            plgpu.barrier_arrive(v_free.at[slot])
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
                rows = pl.ds(step * TILE, TILE)
                plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], k_smem.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], v_smem.at[slot], v_ready.at[slot])

            def wait_until_free(slot):
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

            _stage_loop(tile + 1, stages, produce, wait_until_free)

        _specialize(compute, copy)

    row_statistics = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    return _launch(
        body, q, k, v,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), row_statistics, row_statistics if xsa else None],
        scratch=[
            _tiles((WARPGROUPS, ROWS, K), q.dtype),
            _tiles((stages, TILE, K), q.dtype),
            _tiles((stages, TILE, K), q.dtype),
            _statistics(WARPGROUPS, ROWS),
            _statistics(WARPGROUPS, ROWS) if xsa else None,
            plgpu.Barrier(num_barriers=WARPGROUPS),
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            *[plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)] * 2,
        ],
        grid=(B, H, tiles),
        interpret=interpret,
    )  # fmt: skip


# --- backward --------------------------------------------------------------------------------------------------------


def _backward_block(head_dim: int) -> int:
    """Rows of the streamed blocks: head_dim 128 needs its registers for the accumulators."""
    return TILE if head_dim <= 64 else ROWS


def _backward_dq(q, k, v, y, dy, lse, xsa, interpret):
    """dq, delta = y.dy [B,H,T], and with xsa do and a = dy.u [B,H,T] (else None)."""
    B, T, H, K = q.shape
    group, tiles, scale = H // k.shape[2], T // TILE, K**-0.5
    width = _backward_block(K)
    per_tile = TILE // width
    stages = _stages(K, tiles * per_tile)

    def body(q_ref, k_ref, v_ref, y_ref, dy_ref, lse_ref, dq_ref, delta_ref, do_ref, a_ref, *scratch):
        q_smem, y_smem, do_smem, own_v_smem, k_smem, v_smem, lse_smem, delta_smem, a_smem, *barriers = scratch
        own_ready, k_ready, v_ready, k_free, v_free = barriers
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        tile = tiles - 1 - lax.axis_index("tile")
        kv_head = lax.div(head, jnp.int32(group))

        def compute(warpgroup):
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            ready = own_ready.at[warpgroup]
            own_q, own_do = q_smem.at[warpgroup], do_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(y_ref.at[batch, rows, head], y_smem.at[warpgroup], ready)
            plgpu.copy_gmem_to_smem(dy_ref.at[batch, rows, head], own_do, ready)
            plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], own_q, ready)
            plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, rows], lse_smem.at[warpgroup], ready)
            if xsa:
                plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], own_v_smem.at[warpgroup], ready)
            plgpu.barrier_wait(ready)

            dy = _load_rows(own_do)
            delta = jnp.sum(_load_rows(y_smem.at[warpgroup]) * dy, axis=1)
            delta_smem[warpgroup] = delta
            if xsa:
                own_v = _load_rows(own_v_smem.at[warpgroup])
                inverse = _inverse_norm(own_v)
                a = jnp.sum(dy * own_v, axis=1) * inverse
                a_smem[warpgroup] = a
                own_do[...] = (dy - _columns(a * inverse, dy.shape) * own_v).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(delta_smem.at[warpgroup], delta_ref.at[batch, head, rows])
            if xsa:
                plgpu.copy_smem_to_gmem(a_smem.at[warpgroup], a_ref.at[batch, head, rows])
                plgpu.copy_smem_to_gmem(own_do, do_ref.at[batch, rows, head])
            log_total = _load(lse_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1))

            def block(step, dq, offset=None):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(k_ready.at[slot])
                scores = _dot(own_q, _transposed(k_smem.at[slot])) * (scale * LOG2E)
                if offset is not None:
                    row, column = _iota(scores.shape, 0, warpgroup * ROWS), _iota(scores.shape, 1, offset)
                    scores = jnp.where(row >= column, scores, -jnp.inf)
                p = jnp.exp2(scores - _columns(log_total, scores.shape))
                plgpu.barrier_wait(v_ready.at[slot])
                dp = _dot(own_do, _transposed(v_smem.at[slot]))
                plgpu.barrier_arrive(v_free.at[slot])
                ds = p * (dp - _columns(delta, dp.shape))
                dq = _add_dot(dq, ds.astype(q.dtype), k_smem.at[slot], interpret)
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            full = tile * per_tile
            dq = lax.fori_loop(0, full, block, _zeros((ROWS, K)))
            for i in range(per_tile):
                dq = block(full + i, dq, offset=i * width)
            own_q[...] = (dq * scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_q, dq_ref.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def produce(step, slot):
                rows = pl.ds(step * width, width)
                plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], k_smem.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], v_smem.at[slot], v_ready.at[slot])

            def wait_until_free(slot):
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

            _stage_loop((tile + 1) * per_tile, stages, produce, wait_until_free)

        _specialize(compute, copy)

    row_statistics = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    like_q = jax.ShapeDtypeStruct(q.shape, q.dtype)
    own, streamed = _tiles((WARPGROUPS, ROWS, K), q.dtype), _tiles((stages, width, K), q.dtype)
    return _launch(
        body, q, k, v, y, dy, lse,
        out_type=[like_q, row_statistics, *([like_q, row_statistics] if xsa else [None, None])],
        scratch=[
            *[own] * 3,
            own if xsa else None,
            *[streamed] * 2,
            *[_statistics(WARPGROUPS, ROWS)] * 2,
            _statistics(WARPGROUPS, ROWS) if xsa else None,
            plgpu.Barrier(num_arrivals=5 if xsa else 4, num_barriers=WARPGROUPS),
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            *[plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)] * 2,
        ],
        grid=(B, H, tiles),
        interpret=interpret,
    )  # fmt: skip


def _backward_dkv(q, k, v, y, do, lse, delta, a, c, interpret):
    """dk and dv; with a and c (None without xsa) dv holds the epilogue's part."""
    B, T, H, K = q.shape
    G = k.shape[2]
    group, tiles, scale, xsa = H // G, T // TILE, K**-0.5, a is not None
    width = _backward_block(K)
    per_tile = TILE // width
    blocks = tiles * per_tile
    stages = _stages(K, blocks)

    def body(q_ref, k_ref, v_ref, y_ref, do_ref, lse_ref, delta_ref, a_ref, c_ref, dk_ref, dv_ref, *scratch):
        k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, *scratch = scratch
        own_y_smem, own_do_smem, a_smem, c_smem, kv_ready, q_ready, do_ready, free, own_ready, own_free = scratch
        batch, kv_head, tile = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        first = tile * per_tile  # of the query blocks that see this tile
        per_head = blocks - first

        def compute(warpgroup):
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            own_k, own_v, ready = k_smem.at[warpgroup], v_smem.at[warpgroup], kv_ready.at[warpgroup]
            plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], own_k, ready)
            plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], own_v, ready)
            plgpu.barrier_wait(ready)


            def mask(scores, offset):
                row, column = _iota(scores.shape, 0, warpgroup * ROWS), _iota(scores.shape, 1, offset)
                return jnp.where(row <= column, scores, -jnp.inf)

            def add_epilogue(dv):
                """The query head's share of -(a y + c do) / |v|."""
                plgpu.barrier_wait(own_ready)
                inverse = _inverse_norm(_load_rows(own_v))
                along = _load(a_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1)) * inverse
                dv = dv - _columns(along, dv.shape) * _load_rows(own_y_smem.at[warpgroup])
                along = _load(c_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1)) * inverse
                dv = dv - _columns(along, dv.shape) * _load_rows(own_do_smem.at[warpgroup])
                plgpu.barrier_arrive(own_free)
                return dv

            # One flat loop over heads and blocks: with nested or peeled loops ptxas spills (head_dim 128: 500 bytes).
            def block(step, carry):
                dk, dv = carry
                slot, index = lax.rem(step, jnp.int32(stages)), lax.rem(step, per_head)
                plgpu.barrier_wait(q_ready.at[slot])
                scores = _dot(own_k, _transposed(q_smem.at[slot])) * (scale * LOG2E)
                scores = lax.cond(index < per_tile, lambda x: mask(x, index * width), lambda x: x, scores)
                log_total = _load(lse_smem.at[slot], plgpu.Layout.WGMMA.reduce(0))
                p = jnp.exp2(scores - lax.broadcast_in_dim(log_total, scores.shape, [1]))
                plgpu.barrier_wait(do_ready.at[slot])
                dp = _dot(own_v, _transposed(do_smem.at[slot]))
                row_delta = _load(delta_smem.at[slot], plgpu.Layout.WGMMA.reduce(0))
                ds = p * (dp - lax.broadcast_in_dim(row_delta, dp.shape, [1]))
                dv = _add_dot(dv, p.astype(q.dtype), do_smem.at[slot], interpret)
                dk = _add_dot(dk, ds.astype(q.dtype), q_smem.at[slot], interpret)
                plgpu.barrier_arrive(free.at[slot])
                if xsa:
                    dv = lax.cond(index == per_head - 1, add_epilogue, lambda x: x, dv)
                return dk, dv

            dk, dv = lax.fori_loop(0, group * per_head, block, (_zeros((ROWS, K)), _zeros((ROWS, K))))
            own_k[...] = (dk * scale).astype(q.dtype)
            own_v[...] = dv.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_k, dk_ref.at[batch, rows, kv_head])
            plgpu.copy_smem_to_gmem(own_v, dv_ref.at[batch, rows, kv_head])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def produce(step, slot):
                h = lax.div(step, per_head)
                block = lax.rem(step, per_head)
                head, rows = kv_head * group + h, pl.ds((first + block) * width, width)
                plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem.at[slot], q_ready.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, rows], lse_smem.at[slot], q_ready.at[slot])
                plgpu.copy_gmem_to_smem(do_ref.at[batch, rows, head], do_smem.at[slot], do_ready.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, rows], delta_smem.at[slot], do_ready.at[slot])
                if xsa:
                    pl.when(block == per_head - 1)(lambda: produce_own(h, head))

            def produce_own(h, head):
                pl.when(h > 0)(lambda: plgpu.barrier_wait(own_free))
                for i in range(WARPGROUPS):
                    rows = pl.ds(tile * TILE + i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(y_ref.at[batch, rows, head], own_y_smem.at[i], own_ready)
                    plgpu.copy_gmem_to_smem(do_ref.at[batch, rows, head], own_do_smem.at[i], own_ready)
                    plgpu.copy_gmem_to_smem(a_ref.at[batch, head, rows], a_smem.at[i], own_ready)
                    plgpu.copy_gmem_to_smem(c_ref.at[batch, head, rows], c_smem.at[i], own_ready)

            _stage_loop(group * per_head, stages, produce, lambda slot: plgpu.barrier_wait(free.at[slot]))
            if xsa:
                plgpu.barrier_wait(own_free)

        _specialize(compute, copy)

    own, streamed = _tiles((WARPGROUPS, ROWS, K), q.dtype), _tiles((stages, width, K), q.dtype)
    return _launch(
        body, q, k, v, y, do, lse, delta, a, c,
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        scratch=[
            *[own] * 2,
            *[streamed] * 2,
            *[_statistics(stages, width)] * 2,
            *([own, own] if xsa else [None, None]),
            *([_statistics(WARPGROUPS, ROWS)] * 2 if xsa else [None, None]),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            *[plgpu.Barrier(num_arrivals=2, num_barriers=stages)] * 2,
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=4 * WARPGROUPS) if xsa else None,
            plgpu.Barrier(num_arrivals=WARPGROUPS) if xsa else None,
        ],
        grid=(B, G, tiles),
        interpret=interpret,
    )  # fmt: skip
