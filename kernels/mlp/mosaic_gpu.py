"""The MLP's second map with the activation inside, for NVIDIA Hopper, in Pallas Mosaic GPU.

m = (leaky_relu(r u))^2 W, r > 0 one factor a row: what the map of the unnormalised state and the norm's factor make. The activation and
its gradient never meet memory, where XLA writes and reads them: of the five arrays [N, F] that its passes move two are left, u and its
gradient. Three kernels, each of two compute warpgroups (64 rows each) and one warpgroup that only issues TMA copies:
- forward: blocks of u become the activation in registers, on their way into the product.
- gradient of u: the product dm W^T, whose epilogue multiplies with the derivative; it also sums du.u of each row, all that r's gradient
  needs.
- gradient of W: h^T dm, each block of u overwritten by its activation in shared memory. Some programs share the rows of one tile, each
  with a sum of its own in fp32, added afterwards: no atomics, deterministic.

Shapes: N rows, F hidden, D width. Sums in fp32; the activation is rounded to u's dtype before products, as the plain form rounds it.
Checked in the GPU interpreter and by ahead-of-time compilation (benchmarks/aot_compile.py); never timed on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from golf_jax.kernels.mosaic_gpu import (
    OLD_API,
    ROWS,
    TILE,
    WARPGROUPS,
    add_dot,
    columns,
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

BLOCK = 64  # of the axis that a product contracts: one block in flight per stage
PROGRAMS = 128  # of the weight's gradient, about: one for each multiprocessor (132 in an H100)


def squared_leaky_linear(u_NF: jax.Array, r_N: jax.Array, w_FD: jax.Array, slope: float, interpret: bool = False) -> jax.Array:
    """As `kernels.mlp.squared_leaky_linear`; bf16 or fp16, F and D multiples of 128, N padded to one.

    `interpret` simulates the GPU on any platform (jax >= 0.11; slow, for tests).
    """
    if u_NF.dtype not in (jnp.bfloat16, jnp.float16) or u_NF.dtype != w_FD.dtype or any(size % TILE for size in w_FD.shape):
        got = f"{u_NF.dtype} and {w_FD.dtype}, {' and '.join(map(str, w_FD.shape))}"
        raise ValueError(f"MLP backend 'pallas' needs bfloat16 or float16 and sizes that are multiples of {TILE}, got {got}: use 'xla'")
    if interpret and OLD_API:
        raise ValueError("the GPU interpreter of Pallas needs jax 0.11 (Python 3.12)")
    N = len(u_NF)
    pad = (0, -N % TILE)  # exact: u = 0 has neither an activation nor a gradient
    m_ND: jax.Array = _linear(jnp.pad(u_NF, (pad, (0, 0))), jnp.pad(r_N, pad, constant_values=1), w_FD, slope, interpret)  # pyright: ignore[reportAssignmentType]
    return m_ND[:N]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(u, r, w, slope, interpret) -> jax.Array:
    return forward(u, r, w, slope, interpret)


def _backward_rule(slope, interpret, residuals, dm):
    u, r, w = residuals
    du, dots = backward_u(u, r, w, dm, slope, interpret)
    dw = jnp.sum(backward_w(u, r, dm, slope, interpret), 0).astype(w.dtype)
    return du, jnp.sum(dots, 0) / r, dw


_linear.defvjp(lambda u, r, w, slope, interpret: (forward(u, r, w, slope, interpret), (u, r, w)), _backward_rule)


def _activation(x, slope):
    return jnp.square(jnp.where(x > 0, x, slope * x))


def _width(size: int) -> int:
    """Columns of a program's tile."""
    return 256 if size % 256 == 0 else 128


def _store(x, buffer, out_ref):
    """Registers [ROWS, n] to global memory, by way of [ROWS, k] shared ones."""
    width = buffer.shape[1]
    for begin in range(0, x.shape[1], width):
        plgpu.wait_smem_to_gmem(0)
        buffer[...] = x[:, begin : begin + width].astype(buffer.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_ref.at[:, pl.ds(begin, width)])
    plgpu.wait_smem_to_gmem(0)


def forward(u, r, w, slope, interpret):
    """m [N, D]"""
    (N, F), D = u.shape, w.shape[1]
    width, stages = _width(D), 4

    def mlp_forward(u_ref, r_ref, w_ref, m_ref, u_smem, w_smem, r_smem, m_smem, ready, free, r_ready):
        tile, own_columns = lax.axis_index("tile"), pl.ds(lax.axis_index("column") * width, width)

        def compute(warpgroup):
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(r_ref.at[rows], r_smem.at[warpgroup], r_ready.at[warpgroup])
            plgpu.barrier_wait(r_ready.at[warpgroup])
            r = load(r_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1))

            def block(step, m):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[slot])
                x = load_rows(u_smem.at[slot, warpgroup])
                h = _activation(x * columns(r, x.shape), slope).astype(u.dtype)
                m = add_dot(m, h, w_smem.at[slot], interpret)
                plgpu.barrier_arrive(free.at[slot])
                return m

            m = lax.fori_loop(0, F // BLOCK, block, zeros((ROWS, width)))
            _store(m, m_smem.at[warpgroup], m_ref.at[rows, own_columns])

        def copy():
            def produce(step, slot):
                hidden = pl.ds(step * BLOCK, BLOCK)
                for i in range(WARPGROUPS):
                    plgpu.copy_gmem_to_smem(u_ref.at[pl.ds(tile * TILE + i * ROWS, ROWS), hidden], u_smem.at[slot, i], ready.at[slot])
                plgpu.copy_gmem_to_smem(w_ref.at[hidden, own_columns], w_smem.at[slot], ready.at[slot])

            stage_loop(F // BLOCK, stages, produce, lambda slot: plgpu.barrier_wait(free.at[slot]))

        specialize(compute, copy)

    return launch(
        mlp_forward, u, r, w,
        out_type=jax.ShapeDtypeStruct((N, D), u.dtype),
        scratch=[
            tile_buffer((stages, WARPGROUPS, ROWS, BLOCK), u.dtype),
            tile_buffer((stages, BLOCK, width), u.dtype),
            statistics_buffer(WARPGROUPS, ROWS),
            tile_buffer((WARPGROUPS, ROWS, 64), u.dtype),
            plgpu.Barrier(num_arrivals=WARPGROUPS + 1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_barriers=WARPGROUPS),
        ],
        grid={"tile": N // TILE, "column": D // width},
        interpret=interpret,
    )  # fmt: skip


def backward_u(u, r, w, dm, slope, interpret):
    """du [N, F] and the sums of du.u over each tile of columns, fp32 [tiles, N]."""
    (N, F), D = u.shape, w.shape[1]
    width, stages = _width(F), 3

    def mlp_backward_u(u_ref, r_ref, w_ref, dm_ref, du_ref, dot_ref, dm_smem, w_smem, u_smem, r_smem, dot_smem, ready, free, own_ready):
        tile, column = lax.axis_index("tile"), lax.axis_index("column")

        def compute(warpgroup):
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)

            def block(step, dh):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[slot])
                dh = add_dot(dh, dm_smem.at[slot, warpgroup], transposed(w_smem.at[slot]), interpret)
                plgpu.barrier_arrive(free.at[slot])
                return dh

            dh = lax.fori_loop(0, D // BLOCK, block, zeros((ROWS, width)))
            plgpu.barrier_wait(own_ready)
            r = load(r_smem.at[warpgroup], plgpu.Layout.WGMMA.reduce(1))
            dots = None
            for i in range(width // BLOCK):
                x = load_rows(u_smem.at[warpgroup, i])
                slopes = jnp.where(x > 0, 2.0, 2.0 * slope * slope)
                du = slopes * x * columns(r * r, x.shape) * dh[:, i * BLOCK : (i + 1) * BLOCK]
                dots = jnp.sum(du * x, 1) if dots is None else dots + jnp.sum(du * x, 1)
                u_smem[warpgroup, i] = du.astype(u.dtype)
            dot_smem[warpgroup] = dots
            plgpu.commit_smem()
            for i in range(width // BLOCK):
                plgpu.copy_smem_to_gmem(u_smem.at[warpgroup, i], du_ref.at[rows, pl.ds(column * width + i * BLOCK, BLOCK)])
            plgpu.copy_smem_to_gmem(dot_smem.at[warpgroup], dot_ref.at[column, rows])
            plgpu.wait_smem_to_gmem(0)

        def copy():
            for i in range(WARPGROUPS):
                rows = pl.ds(tile * TILE + i * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(r_ref.at[rows], r_smem.at[i], own_ready)
                for j in range(width // BLOCK):
                    plgpu.copy_gmem_to_smem(u_ref.at[rows, pl.ds(column * width + j * BLOCK, BLOCK)], u_smem.at[i, j], own_ready)

            def produce(step, slot):
                contracted = pl.ds(step * BLOCK, BLOCK)
                for i in range(WARPGROUPS):
                    rows = pl.ds(tile * TILE + i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(dm_ref.at[rows, contracted], dm_smem.at[slot, i], ready.at[slot])
                plgpu.copy_gmem_to_smem(w_ref.at[pl.ds(column * width, width), contracted], w_smem.at[slot], ready.at[slot])

            stage_loop(D // BLOCK, stages, produce, lambda slot: plgpu.barrier_wait(free.at[slot]))

        specialize(compute, copy)

    return launch(
        mlp_backward_u, u, r, w, dm,
        out_type=[jax.ShapeDtypeStruct(u.shape, u.dtype), jax.ShapeDtypeStruct((F // width, N), jnp.float32)],
        scratch=[
            tile_buffer((stages, WARPGROUPS, ROWS, BLOCK), u.dtype),
            tile_buffer((stages, width, BLOCK), u.dtype),
            tile_buffer((WARPGROUPS, width // BLOCK, ROWS, BLOCK), u.dtype),
            statistics_buffer(WARPGROUPS, ROWS),
            statistics_buffer(WARPGROUPS, ROWS),
            plgpu.Barrier(num_arrivals=WARPGROUPS + 1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS * (1 + width // BLOCK)),
        ],
        grid={"tile": N // TILE, "column": F // width},
        interpret=interpret,
    )  # fmt: skip


def backward_w(u, r, dm, slope, interpret):
    """dW in parts, fp32 [parts, F, D]: each of some of the rows."""
    (N, F), D = u.shape, dm.shape[1]
    width, stages, blocks = _width(D), 4, N // BLOCK
    tiles = F // TILE * (D // width)
    parts = min(max(PROGRAMS // tiles, 1), blocks)

    def mlp_backward_w(u_ref, r_ref, dm_ref, dw_ref, u_smem, dm_smem, r_smem, dw_smem, ready, free):
        part, tile, own_columns = lax.axis_index("part"), lax.axis_index("tile"), pl.ds(lax.axis_index("column") * width, width)
        begin, end = (lax.div((part + i) * blocks, jnp.int32(parts)) for i in (0, 1))

        def compute(warpgroup):
            def block(step, dw):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[slot])
                own = u_smem.at[slot, warpgroup]
                x, r = load_rows(own), load(r_smem.at[slot], plgpu.Layout.WGMMA.reduce(1))
                own[...] = _activation(x * columns(r, x.shape), slope).astype(u.dtype)
                plgpu.commit_smem()
                dw = add_dot(dw, transposed(own), dm_smem.at[slot], interpret)
                plgpu.barrier_arrive(free.at[slot])
                return dw

            dw = lax.fori_loop(0, end - begin, block, zeros((ROWS, width)))
            rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
            _store(dw, dw_smem.at[warpgroup], dw_ref.at[part, rows, own_columns])

        def copy():
            def produce(step, slot):
                rows = pl.ds((begin + step) * BLOCK, BLOCK)
                for i in range(WARPGROUPS):
                    plgpu.copy_gmem_to_smem(u_ref.at[rows, pl.ds(tile * TILE + i * ROWS, ROWS)], u_smem.at[slot, i], ready.at[slot])
                plgpu.copy_gmem_to_smem(r_ref.at[rows], r_smem.at[slot], ready.at[slot])
                plgpu.copy_gmem_to_smem(dm_ref.at[rows, own_columns], dm_smem.at[slot], ready.at[slot])

            stage_loop(end - begin, stages, produce, lambda slot: plgpu.barrier_wait(free.at[slot]))

        specialize(compute, copy)

    return launch(
        mlp_backward_w, u, r, dm,
        out_type=jax.ShapeDtypeStruct((parts, F, D), jnp.float32),
        scratch=[
            tile_buffer((stages, WARPGROUPS, BLOCK, ROWS), u.dtype),
            tile_buffer((stages, BLOCK, width), u.dtype),
            statistics_buffer(stages, BLOCK),
            tile_buffer((WARPGROUPS, ROWS, 32), jnp.float32),
            plgpu.Barrier(num_arrivals=WARPGROUPS + 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        ],
        grid={"part": parts, "tile": F // TILE, "column": D // width},
        interpret=interpret,
    )  # fmt: skip
