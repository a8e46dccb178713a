"""Named quantization schemes: the scale, clip and rounding of each PR.

Tensors are `dict[str, np.ndarray]` by canonical names (`blocks.3.attn.c_q.weight`), linear weights (out, in), one scale per row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from golf_jax.config import GolfError, QuantRule
from golf_jax.quant.rounding import F16_TINY, F32, sorted_rows, squared_error, to_codes, torch_quantile

FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
WIDTHS = {
    "int2": (-2, 1),
    "int4": (-8, 7),
    "int5": (-16, 15),
    "int6": (-32, 31),
    "int7": (-64, 63),
    "int8": (-128, 127),
}  # least and largest code
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT8_QUANTILE = 99.99984 / 100


@dataclass(frozen=True)
class QTensor:
    """One stored tensor: integer codes with scales, perhaps a coded low-rank correction, or float values.

    Every scale counts for equally many consecutive codes in row-major order: a row, a group, the whole matrix.
    """

    kind: str
    """One of WIDTHS (codes are int8 in memory) or of FLOATS."""
    dtype: str
    """What it becomes again when dequantized: float32 or bfloat16."""
    codes: np.ndarray | None = None
    """int8 [R, C]"""
    scale: np.ndarray | None = None
    """float16 [n], n divides R C; n = R: one per row, 1: one for the matrix."""
    values: np.ndarray | None = None
    """Floats of dtype `kind`, any shape; None for codes."""
    lowrank: tuple["QTensor", "QTensor"] | None = None
    """Coded factors [R, k] and [k, C] of a correction that is added to codes times scales (`golf_jax.quant.lowrank`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        stored = self.values if self.codes is None else self.codes
        assert stored is not None
        return stored.shape


@dataclass(frozen=True)
class Scheme:
    """An integer scheme. `make(w_RC float32, step, hessian or None) -> (codes int8 [R, C], scale float16 [R])`.

    step: factor on the scheme's rounding step; where the scheme clips at standard deviations, their number.
    """

    kind: str
    make: Callable[[np.ndarray, float, np.ndarray | None], tuple[np.ndarray, np.ndarray]]
    plain: str = ""
    """Of a scheme that needs a Hessian: the one that rounds to the same scales without."""
    sigmas: float = 0.0
    """Clip in standard deviations of the row, where the scheme has one and the rule names no other."""

    @property
    def needs_hessian(self) -> bool:
        return bool(self.plain)


def _row_max(low: int, high: int):
    """PR 372: scale = rowmax / high in float32, stored as float16 only after the codes are made."""

    def make(w_RC, step, _):
        scale_R = np.maximum(np.abs(w_RC).max(axis=1), F32(1e-8)) / F32(high) * F32(step)
        return to_codes(w_RC, scale_R, low, high), scale_R.astype(np.float16)

    return make


def _row_max_floor(w_RC, step, _):
    """PR 638, int6: scale = float16(max(rowmax / 31, 1/31)); rows below 1 share one coarse step, which is what makes them small."""
    scale_R = np.maximum(np.abs(w_RC).max(axis=1) / F32(31), F32(1 / 31)) * F32(step)
    scale_R = scale_R.astype(np.float16)
    return to_codes(w_RC, scale_R, -32, 31), scale_R


def _row_max_half(w_RC, step, _):
    """PR 2135, int8 for gates (off in its run): scale = float16(rowmax / 127) before coding."""
    scale_R = (np.abs(w_RC).max(axis=1) / F32(127) * F32(step)).astype(np.float16)
    return to_codes(w_RC, scale_R, -127, 127), scale_R


def _percentile(w_RC, step, _):
    """PRs 372, 638, 1182, int8: clip at the 0.9999984 quantile of the row, step at least 1/127, codes with the float32 scale."""
    clip_R = torch_quantile(sorted_rows(w_RC), INT8_QUANTILE)
    scale_R = np.maximum(clip_R / F32(127), F32(1 / 127)) * F32(step)
    clipped_RC = np.clip(w_RC, -clip_R[:, None], clip_R[:, None])
    return to_codes(clipped_RC, scale_R, -127, 127), scale_R.astype(np.float16)


def _row_search(high: int):
    """PR 562 (GPTQ-lite): per row the clip quantile of least squared error; float16 scale before coding, smallest normal as floor."""

    def make(w_RC, step, _):
        sorted_RC = sorted_rows(w_RC)
        best_codes_RC = np.zeros(w_RC.shape, np.int8)
        best_scale_R = np.zeros(w_RC.shape[0], np.float16)
        best_error_R = np.full(w_RC.shape[0], np.inf, F32)
        for q in CLIP_QUANTILES:
            scale_R = np.maximum(torch_quantile(sorted_RC, q) / F32(high), F32(1e-12)) * F32(step)
            scale_R = np.maximum(scale_R.astype(np.float16), F16_TINY.astype(np.float16))
            codes_RC = to_codes(w_RC, scale_R, -high - 1, high)
            error_R = squared_error(w_RC, codes_RC, scale_R).mean(axis=1, dtype=F32)
            better_R = error_R < best_error_R
            best_codes_RC[better_R] = codes_RC[better_R]
            best_scale_R[better_R] = scale_R[better_R]
            best_error_R[better_R] = error_R[better_R]
        return best_codes_RC, best_scale_R

    return make


def _matrix_search(w_RC, step, _):
    """PR 1182, int6: one clip quantile for the whole matrix, step at least 1/31, float16 scale before coding."""
    sorted_RC = sorted_rows(w_RC)
    best, best_error = None, np.inf
    for q in CLIP_QUANTILES:
        scale_R = (np.maximum(torch_quantile(sorted_RC, q) / F32(31), F32(1 / 31)) * F32(step)).astype(np.float16)
        codes_RC = to_codes(w_RC, scale_R, -31, 31)
        error = squared_error(w_RC, codes_RC, scale_R).mean(dtype=F32)
        if error < best_error:
            best, best_error = (codes_RC, scale_R), error
    assert best is not None
    return best


def sd_scale(w_RC: np.ndarray, high: int, sigmas: float) -> np.ndarray:
    """SDClip: float16 [R] = max(sigmas * std(row) / high, 1e-10); the standard deviation divides by C - 1."""
    std_R = w_RC.std(axis=1, ddof=1, dtype=np.float64).astype(F32)
    return np.maximum(F32(sigmas) * std_R / F32(high), F32(1e-10)).astype(np.float16)


def _sd_clip(high: int):
    """The scale of PR 2005 with plain rounding: what GPTQ costs in bytes, known without a Hessian."""

    def make(w_RC, sigmas, _):
        scale_R = sd_scale(w_RC, high, sigmas)
        return to_codes(w_RC, scale_R, -high, high), scale_R

    return make


def _gptq(high: int):
    """PR 2005: full-Hessian GPTQ, clip at `sigmas` standard deviations of the row (PR 2135: by group)."""

    def make(w_RC, sigmas, hessian_CC):
        from golf_jax.quant.gptq import gptq_codes  # jax: only who runs GPTQ pays for its import

        assert hessian_CC is not None
        scale_R = sd_scale(w_RC, high, sigmas)
        return gptq_codes(w_RC, hessian_CC, scale_R, high), scale_R

    return make


SCHEMES: dict[str, Scheme] = {
    "int5_row": Scheme("int5", _row_max(-16, 15)),
    "int6_row": Scheme("int6", _row_max(-31, 31)),
    "int6_row_floor": Scheme("int6", _row_max_floor),
    "int8_row": Scheme("int8", _row_max_half),
    "int8_percentile": Scheme("int8", _percentile),
    "int5_row_search": Scheme("int5", _row_search(15)),
    "int6_row_search": Scheme("int6", _row_search(31)),
    "int6_matrix_search": Scheme("int6", _matrix_search),
    "int6_sdclip": Scheme("int6", _sd_clip(31), sigmas=12.85),
    "int7_sdclip": Scheme("int7", _sd_clip(63), sigmas=15.0),
    "gptq_int6": Scheme("int6", _gptq(31), plain="int6_sdclip", sigmas=12.85),
    "gptq_int7": Scheme("int7", _gptq(63), plain="int7_sdclip", sigmas=15.0),
}


def scheme_of(rule: QuantRule) -> Scheme | None:
    """The integer scheme of a rule, None for one that keeps floats. Raises GolfError for an unknown one."""
    if rule.scheme not in SCHEMES and rule.scheme not in FLOATS:
        raise GolfError(f"quant.rules: unknown scheme {rule.scheme!r}; known: {', '.join([*SCHEMES, *FLOATS])}")
    return SCHEMES.get(rule.scheme)


def check_shape(rule: QuantRule, name: str, shape: tuple[int, ...]) -> None:
    """Raises GolfError if the scheme of `rule` cannot take a tensor of this shape."""
    scheme = scheme_of(rule)
    if rule.sigmas and not (scheme and scheme.sigmas):
        raise GolfError(f"quant.rules: scheme {rule.scheme} has no clip in standard deviations; leave sigmas 0 (pattern {rule.pattern!r})")
    if scheme and (len(shape) != 2 or 0 in shape):
        raise GolfError(f"quant.rules: scheme {rule.scheme} needs a matrix, but {name} has shape {shape}; give it a float rule before")


def apply_rule(rule: QuantRule, name: str, w: np.ndarray, hessian: np.ndarray | None) -> QTensor:
    """One tensor, float32 or bfloat16, stored as `rule` says. Raises GolfError (see `golf_jax.quant.quantize`)."""
    check_shape(rule, name, w.shape)
    scheme = scheme_of(rule)
    with np.errstate(over="ignore"):
        if scheme is None:
            values = w.astype(FLOATS[rule.scheme], order="C")
            if not np.isfinite(values).all():
                raise GolfError(f"{name}: a value exceeds {rule.scheme}; give it a float32 or integer rule in quant.rules")
            return QTensor(rule.scheme, w.dtype.name, values=values)
        if scheme.needs_hessian and hessian is None:
            raise GolfError(f"{name}: scheme {rule.scheme} needs its Hessian, and none was collected")
        step = (rule.sigmas or scheme.sigmas or 1.0) * rule.step
        codes, scale = scheme.make(w.astype(F32, order="C"), step, hessian)
    if not np.isfinite(scale).all():
        raise GolfError(f"{name}: a row scale exceeds float16; the weights are far too large for scheme {rule.scheme}")
    return QTensor(scheme.kind, w.dtype.name, codes=codes, scale=scale)


def dequantize(q: QTensor) -> np.ndarray:
    """The tensor again, float32 or bfloat16 as it was: float32(code) * float32(scale), the correction added, or the stored values."""
    if q.codes is None:
        assert q.values is not None
        return q.values.astype(FLOATS[q.dtype])
    w = coded_values(q)
    if q.lowrank:
        a_RK, b_KC = (coded_values(factor) for factor in q.lowrank)
        w += a_RK @ b_KC
    return w.astype(FLOATS[q.dtype])


def coded_values(q: QTensor) -> np.ndarray:
    """Codes times scales, float32 [R, C], without the correction."""
    assert q.codes is not None and q.scale is not None
    if not q.codes.size:
        return q.codes.astype(F32)
    groups = q.codes.reshape(q.scale.size, -1).astype(F32)
    return (groups * q.scale.astype(F32).reshape(-1, 1)).reshape(q.codes.shape)


def dequantize_all(qtensors: Mapping[str, QTensor]) -> dict[str, np.ndarray]:
    """`dequantize` of every tensor."""
    return {name: dequantize(q) for name, q in qtensors.items()}
