"""Hessians of every quantized matrix from calibration batches: what GPTQ needs (docs/recipes/pr2005.md, section 5.2)."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from golf_jax.config import GolfError, ModelConfig
from golf_jax.mesh import AXIS, REPLICATED, ROWS, put, replicate
from golf_jax.model import hidden, leaves
from golf_jax.quant.gptq import accumulate_hessian

# Which leaves read the activation that a tap of the forward pass names.
READERS = {"attn_in": ("q", "k", "v"), "o_in": ("o",), "mlp_in": ("up",), "down_in": ("down",)}


def calibrated(config: ModelConfig) -> dict[str, str]:
    """Names of the tensors that `collect_hessians` gives a Hessian -> the activation that they read."""
    table = leaves(config)
    names = {table["tok_emb"].tensor: "final_norm"}
    for layer in range(config.num_layers):
        for kind, readers in READERS.items():
            names |= {table[name].tensor.format(i=layer): f"{layer}/{kind}" for name in readers}
    return names


def _batch_hessians(config: ModelConfig, params: dict[str, jax.Array], tokens_BT: jax.Array, real_B: jax.Array) -> dict[str, jax.Array]:
    """Sum of x x^T per tap ("3/attn_in", "final_norm") over this device's rows; rows that only pad the batch count nothing."""
    sums: dict[str, jax.Array] = {}

    def tap(name: str, x_BTD: jax.Array) -> None:
        parts = name.split("/")
        if name != "final_norm" and (len(parts) != 3 or parts[2] not in READERS):
            return
        key = name if name == "final_norm" else f"{parts[1]}/{parts[2]}"  # without the step: passes of a looped layer add up
        h = accumulate_hessian(x_BTD * real_B[:, None, None].astype(x_BTD.dtype))
        sums[key] = sums[key] + h if key in sums else h

    hidden(config, params, tokens_BT.astype(jnp.int32), tap=tap)
    return jax.lax.psum(sums, AXIS)


def collect_hessians(config: ModelConfig, params: dict[str, Any], batches: Iterable[np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
    """H = (1 / batches) * sum of x x^T over all tokens, float32 [in, in], for every matrix of a block and the token table.

    config: without `auto`. batches: inputs [rows, T] of equal shape; depth recurrence is on, its passes add up. Keys are tensor names
    (`blocks.3.attn.c_q.weight`); matrices with the same input share one array. Raises GolfError without a batch.
    """
    on_mesh, devices = replicate(mesh, params), mesh.shape[AXIS]

    sharded = jax.shard_map(
        lambda p, x, real: _batch_hessians(config, p, x, real),
        mesh=mesh,
        in_specs=(REPLICATED, ROWS, ROWS),
        out_specs=REPLICATED,
        check_vma=False,
    )
    add = lambda total, *batch: jax.tree.map(jnp.add, total, sharded(*batch))  # noqa: E731
    step = jax.jit(add, donate_argnums=0)
    total, count = None, 0
    for batch in batches:
        rows = -(-len(batch) // devices) * devices
        padded = np.zeros((rows, batch.shape[1]), np.uint16)
        padded[: len(batch)] = batch
        real = (np.arange(rows) < len(batch)).astype(np.float32)
        if total is None:
            shapes = jax.eval_shape(sharded, on_mesh, padded, real)
            total = {n: put(mesh, np.zeros(s.shape, np.float32), REPLICATED) for n, s in shapes.items()}
        total = step(total, on_mesh, put(mesh, padded), put(mesh, real))
        count += 1
    if total is None:
        raise GolfError("calibration: no batch of tokens; quant.gptq_batches must be positive")
    host = {name: np.asarray(h) / count for name, h in total.items()}
    return {name: host[tap] for name, tap in calibrated(config).items()}
