"""GPTQ with the full Hessian and SDClip (PR 2005, after Frantar et al. 2022): columns rounded one after the other, each error spread
over the columns still to come by the Cholesky factor of the inverse Hessian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from golf_jax.config import GolfError

BLOCK = 128
DAMPING = 0.01


@jax.jit
def accumulate_hessian(x_BTD: jax.Array) -> jax.Array:
    """Sum of x x^T over all tokens, [..., D] any float dtype -> [D, D] float32: one batch's share of the Hessian of a linear map.

    Its scale does not matter to `gptq_codes`. Sum it over batches (and over passes of a looped layer).
    """
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(jnp.float32)
    return jnp.matmul(x_ND.T, x_ND, precision=jax.lax.Precision.HIGHEST)


def gptq_codes(w_RC: np.ndarray, hessian_CC: np.ndarray, scale_R: np.ndarray, high: int) -> np.ndarray:
    """GPTQ codes int8 [R, C] in -high..high for given row scales, float16 [R].

    One compilation per shape. Raises GolfError if the Hessian is not a finite positive semi-definite matrix.
    """
    columns = w_RC.shape[1]
    if hessian_CC.shape != (columns, columns):
        raise GolfError(f"GPTQ: Hessian of shape {hessian_CC.shape} for a matrix with {columns} columns")
    if not np.isfinite(hessian_CC).all():
        raise GolfError("GPTQ: the Hessian holds NaN or infinity")
    codes_RC, ok = _solve(jnp.asarray(w_RC), jnp.asarray(hessian_CC), jnp.asarray(scale_R.astype(np.float32)), high)
    if not ok:
        raise GolfError("GPTQ: the Hessian is not positive definite even after damping; collect it from more tokens")
    return np.asarray(codes_RC)


@functools.partial(jax.jit, static_argnames="high")
def _solve(w_RC, hessian_CC, scale_R, high):
    columns = w_RC.shape[1]
    diagonal_C = jnp.diagonal(hessian_CC)
    dead_C = diagonal_C == 0
    diagonal_C = jnp.where(dead_C, 1.0, diagonal_C)
    diagonal_C = diagonal_C + DAMPING * jnp.mean(diagonal_C)
    order_C = jnp.argsort(-diagonal_C, stable=True)
    hessian_CC = jnp.fill_diagonal(hessian_CC, diagonal_C, inplace=False)[order_C][:, order_C]
    w_CR = jnp.where(dead_C, 0.0, w_RC).T[order_C]

    # U upper with H^-1 = U^T U. With J the reversal and J H J = L L^T it is U = J L^-1 J: one factorization, no explicit inverse.
    lower_CC = jnp.linalg.cholesky(hessian_CC[::-1, ::-1])
    eye_CC = jnp.eye(columns, dtype=jnp.float32)
    upper_CC = jax.lax.linalg.triangular_solve(lower_CC, eye_CC, left_side=True, lower=True)[::-1, ::-1]

    # Pad to whole blocks with columns that are zero and see nobody.
    padding = -columns % BLOCK
    w_CR = jnp.pad(w_CR, ((0, padding), (0, 0)))
    upper_CC = jnp.pad(upper_CC, ((0, padding), (0, padding))) + jnp.diag((jnp.arange(columns + padding) >= columns).astype(jnp.float32))
    safe_R = jnp.where(scale_R > 0, scale_R, 1.0)

    def column(j, carry):
        block_BR, codes_BR, errors_BR, upper_BB = carry
        w_R = block_BR[j]
        code_R = jnp.where(scale_R > 0, jnp.clip(jnp.round(w_R / safe_R), -high, high), 0.0)
        error_R = (w_R - code_R * scale_R) / upper_BB[j, j]
        block_BR = block_BR - upper_BB[j][:, None] * error_R  # rows above j of U are zero: finished columns stay
        return block_BR, codes_BR.at[j].set(code_R.astype(jnp.int8)), errors_BR.at[j].set(error_R), upper_BB

    def block(w_CR, start):
        upper_BC = jax.lax.dynamic_slice_in_dim(upper_CC, start, BLOCK)
        upper_BB = jax.lax.dynamic_slice_in_dim(upper_BC, start, BLOCK, axis=1)
        block_BR = jax.lax.dynamic_slice_in_dim(w_CR, start, BLOCK)
        carry = (block_BR, jnp.zeros(block_BR.shape, jnp.int8), jnp.zeros_like(block_BR), upper_BB)
        _, codes_BR, errors_BR, _ = jax.lax.fori_loop(0, BLOCK, column, carry)
        # Columns of this block change too, but nobody reads them again.
        return w_CR - jnp.matmul(upper_BC.T, errors_BR, precision=jax.lax.Precision.HIGHEST), codes_BR

    _, codes_NBR = jax.lax.scan(block, w_CR, jnp.arange(0, columns + padding, BLOCK))
    codes_CR = codes_NBR.reshape(-1, w_RC.shape[0])[:columns]
    codes_RC = codes_CR[jnp.argsort(order_C)].T
    return codes_RC, jnp.isfinite(upper_CC).all()
