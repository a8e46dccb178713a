"""What the Mosaic GPU kernels share: the tile geometry, matrix products, shared-memory buffers, the copy pipeline.

Also the differences between jax 0.10 and 0.11 (`OLD_API`) and between the GPU and its interpreter (`add_dot`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of one compute warpgroup: the M of a Hopper matrix instruction
WARPGROUPS = 2
TILE = ROWS * WARPGROUPS  # rows of one program; what has rows is padded to a multiple
OLD_API = not hasattr(plgpu, "InterpretGPUParams")  # jax 0.10: load needs an index, refs have no .T


def transposed(ref):
    return plgpu.transpose_ref(ref, (1, 0)) if OLD_API else ref.T


def load(ref, layout):
    return plgpu.load(ref, *([()] if OLD_API else []), layout=layout)


def load_rows(ref):
    """A [ROWS,K] tile as fp32 registers."""
    return load(ref, plgpu.Layout.WGMMA).astype(jnp.float32)


def dot(a_ref, b_ref) -> jax.Array:
    """a @ b of two shared-memory tiles, fp32."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a_ref, b_ref)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a_ref.shape[0], b_ref.shape[1]), jnp.float32))


def add_dot(total, a, b_ref, interpret) -> jax.Array:
    """total + a @ b with `total` in registers and `a` there or in shared memory; the interpreter of jax 0.11 has no such instruction."""
    if interpret:
        return total + jnp.dot(a[...], b_ref[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b_ref))(  # pyright: ignore[reportReturnType]
        plgpu.WGMMAAccumulatorRef.init(total)
    )


def zeros(shape):
    return plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), plgpu.Layout.WGMMA)


def full_rows(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def columns(x, shape):
    """[rows] -> [rows, n]"""
    return lax.broadcast_in_dim(x, shape, [0])


def tile_buffer(shape, dtype):
    """Shared memory for matrix operands, swizzled for the tensor cores."""
    width = min(shape[-1], 128 // jnp.dtype(dtype).itemsize)
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def statistics_buffer(*shape, dtype=jnp.float32):
    return plgpu.SMEM(shape, dtype)


def stage_loop(steps, stages, produce, wait_until_free):
    """The copy side of a ring of `stages` slots: fill each slot once it is free, then see every slot freed."""

    @pl.loop(0, steps + stages)
    def _(step):
        slot = lax.rem(step, jnp.int32(stages))
        pl.when(step >= stages)(lambda: wait_until_free(slot))
        pl.when(step < steps)(lambda: produce(step, slot))


def launch(body, *operands, out_type, scratch, grid, interpret):
    """grid: name -> size; programs that differ in the last name only run side by side."""
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )(*operands)


def specialize(compute, copy):
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
