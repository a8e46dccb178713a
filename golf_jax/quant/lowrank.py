"""LQER (PR 2135): what codes miss of the few tensors that quantization hurts most, as a product of two small coded matrices.

E = W - codes * scales is cut to its largest singular values, A = U Sigma [R, k] and B = V^T [k, C]. A takes 2 bits and one scale, B 4 bits
and a scale per group (docs/recipes/pr2135_quant_eval.md, section 2.5).
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from golf_jax.config import LowRankConfig
from golf_jax.quant.rounding import F32
from golf_jax.quant.schemes import WIDTHS, QTensor, coded_values

FLOOR = F32(1e-10)


def correct(tensors: Mapping[str, np.ndarray], quantized: Mapping[str, QTensor], config: LowRankConfig) -> dict[str, QTensor]:
    """`quantized`, with a correction for the `config.top` coded tensors whose residual is largest; float32 or bfloat16 tensors."""
    result = dict(quantized)
    if config.rank:
        residual = {n: tensors[n].astype(F32) - coded_values(q) for n, q in quantized.items() if q.codes is not None}
        norms = {n: residual_norm(e) for n, e in residual.items()}
        for name in sorted(norms, key=lambda n: -norms[n])[: config.top]:
            a_RK, b_KC = low_rank(residual[name], config.rank)
            result[name] = replace(result[name], lowrank=pack(a_RK, b_KC, config.group))
    return result


def residual_norm(e_RC: np.ndarray) -> float:
    """Frobenius norm in float64."""
    return float(np.sqrt(np.square(e_RC, dtype=np.float64).sum()))


def low_rank(e_RC: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(A = U Sigma [R, k], B = V^T [k, C]) of the largest singular values, float32.

    An SVD leaves the sign of each pair open, and the codes are asymmetric. Here the entry of A of largest magnitude is negative: its codes
    reach one further there. Ties in magnitude: the first.
    """
    u_RN, sigma_N, vt_NC = np.linalg.svd(e_RC.astype(np.float64), full_matrices=False)
    a_RK, b_KC = u_RN[:, :rank] * sigma_N[:rank], vt_NC[:rank]
    extreme_K = np.take_along_axis(a_RK, np.abs(a_RK).argmax(axis=0)[None], 0)[0]
    sign_K = np.where(extreme_K > 0, -1.0, 1.0)
    return (a_RK * sign_K).astype(F32), (b_KC * sign_K[:, None]).astype(F32)


def pack(a_RK: np.ndarray, b_KC: np.ndarray, group: int) -> tuple[QTensor, QTensor]:
    """The factors coded: 2 and 4 bits where `group` divides B, else 4 bits and a symmetric scale per row in both (as the record would)."""
    if b_KC.size % group:
        return tuple(_coded("int4", x, len(x), F32(7), low=-7) for x in (a_RK, b_KC))  # pyright: ignore[reportReturnType]
    return _coded("int2", a_RK, 1, F32(1.5)), _coded("int4", b_KC, b_KC.size // group, F32(7.5))


def _coded(kind: str, x: np.ndarray, groups: int, extreme: np.float32, low: int | None = None) -> QTensor:
    """Every group's largest magnitude lies at `extreme` steps; codes by the float16 scale, half to even, clamped to `kind`."""
    least, most = WIDTHS[kind]
    flat = x.astype(F32).reshape(groups, -1)
    scale = (np.maximum(np.abs(flat).max(axis=1), FLOOR) / extreme).astype(np.float16)
    step = scale.astype(F32)[:, None]
    ratio = np.divide(flat, step, out=np.zeros_like(flat), where=step > 0)
    codes = np.clip(np.rint(ratio), least if low is None else low, most).astype(np.int8)
    return QTensor(kind, "float32", codes=codes.reshape(x.shape), scale=scale)
