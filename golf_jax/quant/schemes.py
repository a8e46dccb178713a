"""Named quantization schemes: the scale, clip and rounding rules of each PR, and first-match rules that assign them to tensors.

Tensors are `dict[str, np.ndarray]` by canonical names (`blocks.3.attn.c_q.weight`), linear weights (out, in), one scale per row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from golf_jax.config import GolfError, QuantConfig, QuantRule
from golf_jax.quant.rounding import F16_TINY, F32, prune_by_magnitude, sorted_rows, squared_error, to_codes, torch_quantile

FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT8_QUANTILE = 99.99984 / 100


@dataclass(frozen=True)
class QTensor:
    """One stored tensor: integer codes with a scale per row, or float values."""

    kind: str
    """int5, int6, int7, int8 (what the scheme is called; codes are int8 in memory), or float32, float16, bfloat16."""
    dtype: str
    """What it becomes again when dequantized: float32 or bfloat16."""
    codes: np.ndarray | None = None
    """int8 [R, C]"""
    scale: np.ndarray | None = None
    """float16 [R]"""
    values: np.ndarray | None = None
    """Floats of dtype `kind`, any shape; None for codes."""

    @property
    def shape(self) -> tuple[int, ...]:
        stored = self.values if self.codes is None else self.codes
        assert stored is not None
        return stored.shape


@dataclass(frozen=True)
class Scheme:
    """An integer scheme. `make(w_RC float32, step, hessian or None) -> (codes int8 [R, C], scale float16 [R])`."""

    kind: str
    make: Callable[[np.ndarray, float, np.ndarray | None], tuple[np.ndarray, np.ndarray]]
    needs_hessian: bool = False


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


def _sd_clip(high: int, sigmas: float):
    """The scale of PR 2005 with plain rounding: what GPTQ costs in bytes, known without a Hessian."""

    def make(w_RC, step, _):
        scale_R = sd_scale(w_RC, high, sigmas * step)
        return to_codes(w_RC, scale_R, -high, high), scale_R

    return make


def _gptq(high: int, sigmas: float):
    """PR 2005: full-Hessian GPTQ, clip at `sigmas` standard deviations of the row."""

    def make(w_RC, step, hessian_CC):
        from golf_jax.quant.gptq import gptq_codes  # jax: only who runs GPTQ pays for its import

        assert hessian_CC is not None
        scale_R = sd_scale(w_RC, high, sigmas * step)
        return gptq_codes(w_RC, hessian_CC, scale_R, high), scale_R

    return make


SCHEMES: dict[str, Scheme] = {
    "int5_row": Scheme("int5", _row_max(-16, 15)),
    "int6_row": Scheme("int6", _row_max(-31, 31)),
    "int6_row_floor": Scheme("int6", _row_max_floor),
    "int8_percentile": Scheme("int8", _percentile),
    "int5_row_search": Scheme("int5", _row_search(15)),
    "int6_row_search": Scheme("int6", _row_search(31)),
    "int6_matrix_search": Scheme("int6", _matrix_search),
    "int6_sdclip": Scheme("int6", _sd_clip(31, 12.85)),
    "int7_sdclip": Scheme("int7", _sd_clip(63, 15.0)),
    "gptq_int6": Scheme("int6", _gptq(31, 12.85), needs_hessian=True),
    "gptq_int7": Scheme("int7", _gptq(63, 15.0), needs_hessian=True),
}


def without_hessians(config: QuantConfig) -> QuantConfig:
    """`config` with plain rounding at the same scales in place of GPTQ: for byte estimates while training."""
    plain = {"gptq_int6": "int6_sdclip", "gptq_int7": "int7_sdclip"}
    return replace(config, rules=tuple(replace(r, scheme=plain.get(r.scheme, r.scheme)) for r in config.rules))


def match_rule(config: QuantConfig, name: str, numel: int) -> QuantRule:
    """The first rule of `config` that claims the tensor; an error if none does."""
    for rule in config.rules:
        if numel <= rule.min_numel or (rule.max_numel and numel > rule.max_numel):
            continue
        if any(part in name for part in rule.pattern.split("|")):
            return rule
    raise GolfError(f"quant.rules: no rule matches {name} ({numel} elements); end the list with QuantRule('', 'int6_row')")


def quantize(
    tensors: Mapping[str, np.ndarray], config: QuantConfig, hessians: Mapping[str, np.ndarray] | None = None
) -> dict[str, QTensor]:
    """All tensors pruned and quantized by the rules of `config`, in the order given.

    tensors: float32 or bfloat16 arrays by canonical name. hessians: name -> [C, C] float32, for the tensors of GPTQ schemes.
    Raises GolfError naming the tensor: NaN or infinity, no rule, unknown scheme, a row scheme on a vector, a missing Hessian, a value
    or scale beyond float16.
    """
    return {name: _quantize_one(name, np.asarray(w), config, hessians or {}) for name, w in tensors.items()}


def _quantize_one(name: str, w: np.ndarray, config: QuantConfig, hessians: Mapping[str, np.ndarray]) -> QTensor:
    dtype = w.dtype.name
    if dtype not in ("float32", "bfloat16"):
        raise GolfError(f"{name}: dtype {dtype} cannot be quantized, only float32 and bfloat16")
    if not np.isfinite(w).all():
        raise GolfError(f"{name}: holds NaN or infinity; the run diverged, nothing can be packed")
    rule = match_rule(config, name, w.size)
    if config.prune_fraction and w.ndim == 2 and w.size > config.prune_min_numel:
        w = prune_by_magnitude(w, config.prune_fraction)
    if rule.scheme in FLOATS:
        with np.errstate(over="ignore"):
            values = w.astype(FLOATS[rule.scheme], order="C")
        if not np.isfinite(values).all():
            raise GolfError(f"{name}: a value exceeds {rule.scheme}; give it a float32 or integer rule in quant.rules")
        return QTensor(rule.scheme, dtype, values=values)
    scheme = SCHEMES.get(rule.scheme)
    if scheme is None:
        raise GolfError(f"quant.rules: unknown scheme {rule.scheme!r}; known: {', '.join([*SCHEMES, *FLOATS])}")
    if w.ndim != 2 or w.size == 0:
        raise GolfError(f"quant.rules: scheme {rule.scheme} needs a matrix, but {name} has shape {w.shape}; give it a float rule before")
    if scheme.needs_hessian and name not in hessians:
        raise GolfError(f"{name}: scheme {rule.scheme} needs its Hessian, and none was collected")
    with np.errstate(over="ignore"):
        codes, scale = scheme.make(w.astype(F32, order="C"), rule.step, hessians.get(name))
    if not np.isfinite(scale).all():
        raise GolfError(f"{name}: a row scale exceeds float16; the weights are far too large for scheme {rule.scheme}")
    return QTensor(scheme.kind, dtype, codes=codes, scale=scale)


def dequantize(q: QTensor) -> np.ndarray:
    """The tensor again, float32 or bfloat16 as it was: float32(code) * float32(scale) per row, or the stored values."""
    if q.codes is not None:
        assert q.scale is not None
        w = q.codes.astype(F32) * q.scale.astype(F32)[:, None]
    else:
        assert q.values is not None
        w = q.values
    return w.astype(FLOATS[q.dtype])


def dequantize_all(qtensors: Mapping[str, QTensor]) -> dict[str, np.ndarray]:
    """`dequantize` of every tensor."""
    return {name: dequantize(q) for name, q in qtensors.items()}
