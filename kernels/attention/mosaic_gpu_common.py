"""What the Mosaic GPU kernels share: the tile geometry, matrix products, shared-memory buffers, the copy pipeline.

Also the differences between jax 0.10 and 0.11 (`OLD_API`) and between the GPU and its interpreter (`add_dot`).
"""

import math
from typing import Any, NamedTuple

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
LOWEST = -1e30  # start of a running maximum: finite, so that a block without any visible key changes nothing
OLD_API = not hasattr(plgpu, "InterpretGPUParams")  # jax 0.10: load needs an index, refs have no .T


class Documents(NamedTuple):
    """The document mask: the segment of each query, and how far each tile of keys is seen. int32."""

    first: Any
    """[B,T], never decreasing: the first key that a query sees."""
    full: Any
    """[B,tiles]: queries from the tile's own on and before this one see all of its keys, up to their own position."""
    seen: Any
    """[B,tiles]: queries before this one see at least one of its keys."""

    @classmethod
    def of(cls, first_BT: jax.Array) -> "Documents":
        starts = jnp.arange(0, first_BT.shape[1], TILE, dtype=jnp.int32)
        queries = jax.vmap(lambda first, key: jnp.searchsorted(first, key, side="right", method="compare_all"), (0, None))
        return cls(first_BT, *(queries(first_BT, key).astype(jnp.int32) for key in (starts, starts + (TILE - 1))))


def first_keys(documents: Documents | None, batch, tile):
    """First keys that the first and the last query of a tile see."""
    if documents is None:
        return jnp.int32(0), jnp.int32(0)
    return documents.first[batch, tile * TILE], documents.first[batch, tile * TILE + (TILE - 1)]


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
    """total + a @ b with `total` and `a` in registers; the interpreter of jax 0.11 has no such matrix instruction."""
    if interpret:
        return total + jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b_ref))(  # pyright: ignore[reportReturnType]
        plgpu.WGMMAAccumulatorRef.init(total)
    )


def num_stages(head_dim: int, blocks: int) -> int:
    """Blocks in flight, within 227 KiB of shared memory."""
    return min(3 if head_dim <= 64 else 2, blocks)


def zeros(shape):
    return plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), plgpu.Layout.WGMMA)


def full_rows(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def iota(shape, axis, start):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) + start


def columns(x, shape):
    """[rows] -> [rows, n]"""
    return lax.broadcast_in_dim(x, shape, [0])


def along(x, v):
    """(x . v) / |v|^2 of each row, what x has of v: x - this * v is orthogonal to v. Finite, and x stays as it is, at v = 0."""
    return jnp.sum(x * v, axis=1) / jnp.maximum(jnp.sum(v * v, axis=1), EPS * EPS)


def tile_buffer(shape, dtype):
    """Shared memory for matrix operands, swizzled for the tensor cores."""
    width = min(shape[-1], 64)
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
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
    options: dict[str, Any] = {}
    if interpret:
        options["interpret"] = plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue]
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("batch", "head", "tile"),
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
