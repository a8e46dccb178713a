"""The arithmetic of the quantizers, in numpy float32: exact on every machine, whatever the accelerator does to divisions.

Shapes: weights are [R, C] (rows = output features, as in the PRs' linear layers), one scale per row.
"""

import numpy as np

F32 = np.float32
F16_TINY = F32(np.finfo(np.float16).smallest_normal)


def torch_quantile(sorted_RC: np.ndarray, q: float) -> np.ndarray:
    """`torch.quantile(x, q, dim=-1)` of rows that are already sorted, [..., C] float32 -> [...] float32.

    The rank is a float32 product; the interpolation rounds once, as the fused multiply-add of torch's lerp does (in float64 here).
    """
    last = sorted_RC.shape[-1] - 1
    rank = F32(q) * F32(last)
    low, high = int(np.floor(rank)), min(int(np.ceil(rank)), last)
    weight = F32(rank - F32(low))
    a, b = sorted_RC[..., low], sorted_RC[..., high]
    base, factor = (a, weight) if weight < 0.5 else (b, weight - F32(1))
    return (base.astype(np.float64) + np.float64(factor) * (b - a).astype(np.float64)).astype(F32)


def sorted_rows(w_RC: np.ndarray) -> np.ndarray:
    """Absolute values of every row in ascending order."""
    return np.sort(np.abs(w_RC), axis=-1)


def to_codes(w_RC: np.ndarray, scale_R: np.ndarray, low: int, high: int) -> np.ndarray:
    """Codes int8 [R, C]: round half to even of w / scale in float32, clamped. Rows of scale zero give zeros."""
    scale_R1 = scale_R.astype(F32)[:, None]
    ratio = np.divide(w_RC, scale_R1, out=np.zeros_like(w_RC), where=scale_R1 > 0)
    return np.clip(np.rint(ratio, out=ratio), low, high, out=ratio).astype(np.int8)


def squared_error(w_RC: np.ndarray, codes_RC: np.ndarray, scale_R: np.ndarray) -> np.ndarray:
    """Squared reconstruction error, float32 [R, C]."""
    return np.square(w_RC - codes_RC.astype(F32) * scale_R.astype(F32)[:, None])


def prune_by_magnitude(w: np.ndarray, fraction: float) -> np.ndarray:
    """Zero the entries below the `fraction` quantile of |w| over the whole tensor (PR 562: 3 %), strictly.

    A bfloat16 tensor is compared with the threshold rounded to bfloat16, as torch does.
    """
    flat = np.sort(np.abs(w.astype(F32)), axis=None)
    threshold = torch_quantile(flat, fraction).astype(w.dtype)
    return np.where(np.abs(w) < threshold, np.zeros((), w.dtype), w)
