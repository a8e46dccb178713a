"""What training sees (straight-through fake quantization) is what the artifact will hold."""

import jax
import numpy as np
import pytest

from golf_jax.kernels.fake_quant import RowScheme, fake_quant
from golf_jax.quant.schemes import SCHEMES


@pytest.mark.parametrize(
    "scheme, levels, lowest, absmax_floor, scale_floor",
    [("int6_row", 31, -32, 1e-8, 0.0), ("int5_row", 15, -16, 1e-8, 0.0), ("int6_row_floor", 31, -32, 0.0, 1 / 31)],
)
def test_fake_quantized_weights_are_the_export_codes(scheme, levels, lowest, absmax_floor, scale_floor):
    """Codes equal, values equal to code * float32 scale within the last bit of w + (rounded - w).

    PR 638 exports with the float16 scale already when coding, so there a weight on a rounding boundary may move to the next code.
    """
    rng = np.random.default_rng(0)
    w_RC = (rng.standard_normal((48, 256)) * rng.uniform(1e-3, 3, (48, 1))).astype(np.float32)
    w_RC[5] = 0
    codes_RC, scale_R = SCHEMES[scheme].make(w_RC, 1.0, None)
    trained_RC = np.asarray(jax.jit(lambda w: fake_quant(w, RowScheme(levels, lowest, absmax_floor, scale_floor), axis=-1))(w_RC))
    step_R1 = np.maximum(np.maximum(np.abs(w_RC).max(1), absmax_floor) / np.float32(levels), scale_floor).astype(np.float32)[:, None]
    same = np.rint(trained_RC / step_R1) == codes_RC
    assert same.mean() >= (0.995 if scheme == "int6_row_floor" else 1.0)
    np.testing.assert_allclose(trained_RC[same], (codes_RC * step_R1)[same], rtol=1e-6, atol=1e-7)
    exported_RC = codes_RC * scale_R.astype(np.float32)[:, None]
    np.testing.assert_allclose(trained_RC[same], exported_RC[same], rtol=1e-3, atol=1e-6)  # the stored scale is float16
