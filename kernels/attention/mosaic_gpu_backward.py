"""The backward kernels of the Hopper attention; `mosaic_gpu.py` says how they share the work."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from golf_jax.kernels.attention.mosaic_gpu_common import LOG2E, along, first_keys, iota, num_stages
from golf_jax.kernels.mosaic_gpu import (
    ROWS,
    TILE,
    WARPGROUPS,
    add_dot,
    columns,
    dot,
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


def _backward_block(head_dim: int) -> int:
    """Rows of the streamed blocks: head_dim 128 needs its registers for the accumulators."""
    return TILE if head_dim <= 64 else ROWS


def backward_dq(q, k, v, gate, gain, documents, y, dy, lse, xsa, interpret):
    """dq, delta = y.dy [B,H,T], do (None without xsa and gate), with xsa a = dy.v / |v|^2 [B,H,T], with gain dq.q / gain [B,H,T].

    gate: after the sigmoid.
    """
    B, T, H, K = q.shape
    group, tiles, scale = H // k.shape[2], T // TILE, K**-0.5
    width = _backward_block(K)
    per_tile = TILE // width
    stages = num_stages(K, tiles * per_tile)
    changed = xsa or gate is not None  # do is not dy

    def xsa_attention_dq(q_ref, k_ref, v_ref, gate_ref, gain_ref, documents, y_ref, dy_ref, lse_ref, *rest):
        dq_ref, delta_ref, do_ref, a_ref, dot_ref, q_smem, y_smem, do_smem, own_v_smem, k_smem, v_smem, *scratch = rest
        gate_smem, first_smem, lse_smem, delta_smem, a_smem, *barriers = scratch
        own_ready, k_ready, v_ready, k_free, v_free = barriers
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        tile = tiles - 1 - lax.axis_index("tile")
        kv_head = lax.div(head, jnp.int32(group))
        first_key, last_border = first_keys(documents, batch, tile)
        begin = lax.div(first_key, jnp.int32(width))
        head_scale = scale if gain is None else scale * gain_ref[head]

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
            if gate is not None:
                plgpu.copy_gmem_to_smem(gate_ref.at[batch, head, rows], gate_smem.at[warpgroup], ready)
            if documents is not None:
                plgpu.copy_gmem_to_smem(documents.first.at[batch, rows], first_smem.at[warpgroup], ready)
            plgpu.barrier_wait(ready)

            dy = load_rows(own_do)
            delta = jnp.sum(load_rows(y_smem.at[warpgroup]) * dy, axis=1)
            delta_smem[warpgroup] = delta
            if xsa:
                own_v = load_rows(own_v_smem.at[warpgroup])
                a = along(dy, own_v)
                a_smem[warpgroup] = a
                dy = dy - columns(a, dy.shape) * own_v
            if gate is not None:
                dy = dy * columns(load(gate_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1)), dy.shape)
            if changed:
                own_do[...] = dy.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(delta_smem.at[warpgroup], delta_ref.at[batch, head, rows])
            if changed:
                plgpu.copy_smem_to_gmem(own_do, do_ref.at[batch, rows, head])
            if xsa:
                plgpu.copy_smem_to_gmem(a_smem.at[warpgroup], a_ref.at[batch, head, rows])
            log_total = load(lse_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1))

            def mask_documents(scores, step):
                first = load(first_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1))
                return jnp.where(iota(scores.shape, 1, step * width) >= columns(first, scores.shape), scores, -jnp.inf)

            def block(step, dq, offset=None):
                slot = lax.rem(step - begin, jnp.int32(stages))
                plgpu.barrier_wait(k_ready.at[slot])
                scores = dot(own_q, transposed(k_smem.at[slot])) * (head_scale * LOG2E)
                if offset is not None:
                    row, column = iota(scores.shape, 0, warpgroup * ROWS), iota(scores.shape, 1, offset)
                    scores = jnp.where(row >= column, scores, -jnp.inf)
                if documents is not None:
                    border = step * width < last_border
                    scores = lax.cond(border, lambda x: mask_documents(x, step), lambda x: x, scores)
                p = jnp.exp2(scores - columns(log_total, scores.shape))
                plgpu.barrier_wait(v_ready.at[slot])
                dp = dot(own_do, transposed(v_smem.at[slot]))
                plgpu.barrier_arrive(v_free.at[slot])
                ds = p * (dp - columns(delta, dp.shape))
                dq = add_dot(dq, ds.astype(q.dtype), k_smem.at[slot], interpret)
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            full = tile * per_tile
            dq = lax.fori_loop(begin, full, block, zeros((ROWS, K)))
            for i in range(per_tile):
                dq = block(full + i, dq, offset=i * width)
            if gain is not None:
                plgpu.wait_smem_to_gmem(0)  # delta has left its place
                delta_smem[warpgroup] = jnp.sum(dq * load_rows(own_q), axis=1) * scale
            own_q[...] = (dq * head_scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_q, dq_ref.at[batch, rows, head])
            if gain is not None:
                plgpu.copy_smem_to_gmem(delta_smem.at[warpgroup], dot_ref.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            def produce(step, slot):
                rows = pl.ds((begin + step) * width, width)
                plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], k_smem.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], v_smem.at[slot], v_ready.at[slot])

            def wait_until_free(slot):
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

            stage_loop((tile + 1) * per_tile - begin, stages, produce, wait_until_free)

        specialize(compute, copy)

    row_statistics = jax.ShapeDtypeStruct((B, H, T), jnp.float32)
    like_q = jax.ShapeDtypeStruct(q.shape, q.dtype)
    own, streamed = tile_buffer((WARPGROUPS, ROWS, K), q.dtype), tile_buffer((stages, width, K), q.dtype)
    return launch(
        xsa_attention_dq, q, k, v, gate, gain, documents, y, dy, lse,
        out_type=[like_q, row_statistics, like_q if changed else None, *(row_statistics if x else None for x in (xsa, gain is not None))],
        scratch=[
            *[own] * 3,
            own if xsa else None,
            *[streamed] * 2,
            None if gate is None else statistics_buffer(WARPGROUPS, ROWS),
            None if documents is None else statistics_buffer(WARPGROUPS, ROWS, dtype=jnp.int32),
            *[statistics_buffer(WARPGROUPS, ROWS)] * 2,
            statistics_buffer(WARPGROUPS, ROWS) if xsa else None,
            plgpu.Barrier(num_arrivals=4 + xsa + (gate is not None) + (documents is not None), num_barriers=WARPGROUPS),
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            *[plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)] * 2,
        ],
        grid={"batch": B, "head": H, "tile": tiles},
        interpret=interpret,
    )  # fmt: skip


def backward_dkv(q, k, v, gain, documents, y, do, lse, delta, a, c, interpret):
    """dk, dv and with gain dk.k and dv.v [2,B,G,T]; with a and c (None without xsa) dv holds the epilogue's part.

    Inside documents dk.k alone [1,B,G,T]: else ptxas spills.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    group, tiles, scale, xsa = H // G, T // TILE, K**-0.5, a is not None
    width = _backward_block(K)
    per_tile = TILE // width
    blocks = tiles * per_tile
    stages = num_stages(K, blocks)
    num_dots = 2 if documents is None else 1

    def xsa_attention_dkv(q_ref, k_ref, v_ref, gain_ref, documents, y_ref, do_ref, lse_ref, delta_ref, a_ref, c_ref, *rest):
        dk_ref, dv_ref, dot_ref, dot_smem, *scratch = rest
        k_smem, v_smem, q_smem, do_smem, first_smem, lse_smem, delta_smem, *scratch = scratch
        own_y_smem, own_do_smem, a_smem, c_smem, own_ready, q_ready, do_ready, free, own_free = scratch
        batch, kv_head, tile = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("tile")
        first = tile * per_tile  # of the query blocks that see this tile

        def num_blocks():
            """Of queries that see this tile; each side asks for itself, as what both keep ptxas spills."""
            if documents is None:
                return blocks - first
            return lax.div(documents.seen[batch, tile] + (width - 1), jnp.int32(width)) - first

        def compute(warpgroup):
            per_head = num_blocks()
            full = 0 if documents is None else lax.div(documents.full[batch, tile], jnp.int32(width)) - first
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            own_k, own_v, ready = k_smem.at[warpgroup], v_smem.at[warpgroup], own_ready.at[warpgroup]
            plgpu.copy_gmem_to_smem(k_ref.at[batch, rows, kv_head], own_k, ready)
            plgpu.copy_gmem_to_smem(v_ref.at[batch, rows, kv_head], own_v, ready)
            if xsa:  # `ready` counts four later on
                plgpu.barrier_arrive(ready)
                plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(ready)
            if xsa:  # from here on it tells of y, do, a and c of a head: ptxas spills where barriers are more
                plgpu.barrier_arrive(own_free)

            def mask(scores, offset):
                row, column = iota(scores.shape, 0, warpgroup * ROWS), iota(scores.shape, 1, offset)
                return jnp.where(row <= column, scores, -jnp.inf)

            def mask_documents(scores, slot):
                key = iota(scores.shape, 0, tile * TILE + warpgroup * ROWS)
                seen_from = load(first_smem.at[slot], plgpu.Layout.WGMMA.reduce(0))
                return jnp.where(key >= lax.broadcast_in_dim(seen_from, scores.shape, [1]), scores, -jnp.inf)

            def add_epilogue(dv):
                """The query head's share of -(a y + c do)."""
                plgpu.barrier_wait(ready)
                for scalars, tiles in ((a_smem, own_y_smem), (c_smem, own_do_smem)):
                    per_row = load(scalars.at[warpgroup], plgpu.Layout.WGMMA.reduce(1))
                    dv = dv - columns(per_row, dv.shape) * load_rows(tiles.at[warpgroup])
                plgpu.barrier_arrive(own_free)
                return dv

            # One flat loop over heads and blocks, and p is used up before dp is made: else ptxas spills (head_dim 128: 500 and 20 bytes).
            def block(step, carry):
                dk, dv = carry
                slot, index = lax.rem(step, jnp.int32(stages)), lax.rem(step, per_head)
                head_scale = scale if gain is None else scale * gain_ref[kv_head * group + lax.div(step, per_head)]
                plgpu.barrier_wait(q_ready.at[slot])
                scores = dot(own_k, transposed(q_smem.at[slot])) * (head_scale * LOG2E)
                scores = lax.cond(index < per_tile, lambda x: mask(x, index * width), lambda x: x, scores)
                if documents is not None:
                    scores = lax.cond(index >= full, lambda x: mask_documents(x, slot), lambda x: x, scores)
                log_total = load(lse_smem.at[slot], plgpu.Layout.WGMMA.reduce(0))
                p = jnp.exp2(scores - lax.broadcast_in_dim(log_total, scores.shape, [1]))
                plgpu.barrier_wait(do_ready.at[slot])
                dv = add_dot(dv, p.astype(q.dtype), do_smem.at[slot], interpret)
                dp = dot(own_v, transposed(do_smem.at[slot]))
                row_delta = load(delta_smem.at[slot], plgpu.Layout.WGMMA.reduce(0))
                ds = p * (dp - lax.broadcast_in_dim(row_delta, dp.shape, [1]))
                if gain is not None:
                    ds = ds * head_scale
                dk = add_dot(dk, ds.astype(q.dtype), q_smem.at[slot], interpret)
                plgpu.barrier_arrive(free.at[slot])
                if xsa:
                    dv = lax.cond(index == per_head - 1, add_epilogue, lambda x: x, dv)
                return dk, dv

            dk, dv = lax.fori_loop(0, group * per_head, block, (zeros((ROWS, K)), zeros((ROWS, K))))
            if gain is None:
                dk = dk * scale
            else:
                dot_smem[0, warpgroup] = jnp.sum(dk * load_rows(own_k), axis=1)
                if num_dots == 2:
                    dot_smem[1, warpgroup] = jnp.sum(dv * load_rows(own_v), axis=1)
            own_k[...] = dk.astype(q.dtype)
            own_v[...] = dv.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_k, dk_ref.at[batch, rows, kv_head])
            plgpu.copy_smem_to_gmem(own_v, dv_ref.at[batch, rows, kv_head])
            if gain is not None:
                for i in range(num_dots):
                    plgpu.copy_smem_to_gmem(dot_smem.at[i, warpgroup], dot_ref.at[i, batch, kv_head, rows])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            per_head = num_blocks()

            def produce(step, slot):
                h = lax.div(step, per_head)
                block = lax.rem(step, per_head)
                head, rows = kv_head * group + h, pl.ds((first + block) * width, width)
                plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_smem.at[slot], q_ready.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, rows], lse_smem.at[slot], q_ready.at[slot])
                if documents is not None:
                    plgpu.copy_gmem_to_smem(documents.first.at[batch, rows], first_smem.at[slot], q_ready.at[slot])
                plgpu.copy_gmem_to_smem(do_ref.at[batch, rows, head], do_smem.at[slot], do_ready.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, rows], delta_smem.at[slot], do_ready.at[slot])
                if xsa:
                    pl.when(block == per_head - 1)(lambda: produce_own(head))

            def produce_own(head):
                plgpu.barrier_wait(own_free)
                for i in range(WARPGROUPS):
                    rows = pl.ds(tile * TILE + i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(y_ref.at[batch, rows, head], own_y_smem.at[i], own_ready.at[i])
                    plgpu.copy_gmem_to_smem(do_ref.at[batch, rows, head], own_do_smem.at[i], own_ready.at[i])
                    plgpu.copy_gmem_to_smem(a_ref.at[batch, head, rows], a_smem.at[i], own_ready.at[i])
                    plgpu.copy_gmem_to_smem(c_ref.at[batch, head, rows], c_smem.at[i], own_ready.at[i])

            stage_loop(group * per_head, stages, produce, lambda slot: plgpu.barrier_wait(free.at[slot]))
            if xsa:
                plgpu.barrier_wait(own_free)

        specialize(compute, copy)

    own, streamed = tile_buffer((WARPGROUPS, ROWS, K), q.dtype), tile_buffer((stages, width, K), q.dtype)
    row_dots = None if gain is None else jax.ShapeDtypeStruct((num_dots, B, G, T), jnp.float32)
    return launch(
        xsa_attention_dkv, q, k, v, gain, documents, y, do, lse, delta, a, c,
        out_type=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype), row_dots],
        scratch=[
            None if gain is None else statistics_buffer(num_dots, WARPGROUPS, ROWS),
            *[own] * 2,
            *[streamed] * 2,
            None if documents is None else statistics_buffer(stages, width, dtype=jnp.int32),
            *[statistics_buffer(stages, width)] * 2,
            *([own, own] if xsa else [None, None]),
            *([statistics_buffer(WARPGROUPS, ROWS)] * 2 if xsa else [None, None]),
            plgpu.Barrier(num_arrivals=4 if xsa else 2, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=2 if documents is None else 3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS) if xsa else None,
        ],
        grid={"batch": B, "head": G, "tile": tiles},
        interpret=interpret,
    )  # fmt: skip
