"""Hessians of GPTQ against those of PR 2005's own hooks."""

import numpy as np
import pytest
from evaluation.reference_models import Portable
from tiny_recipes import some

from golf_jax.artifact.calibration import collect_hessians
from golf_jax.config import GolfError
from golf_jax.mesh import make_mesh


@pytest.fixture(scope="module")
def case(references):
    return Portable(2005, references)


@pytest.mark.parametrize("devices", some([1, 3], 3))
def test_hessians_equal_the_reference(case, devices):
    quant = case.refs.case("quant/main")
    batches = quant.own["calibration"]
    assert batches.shape[1] % 3  # so rows are filled up
    hessians = collect_hessians(case.config, case.params, batches, make_mesh(devices))
    traces = {name: facts["trace"] for name, facts in quant.settings["tensors"].items() if "trace" in facts}
    assert len(traces) == 67
    for name, trace in traces.items():
        assert np.trace(hessians[name].astype(np.float64)) == pytest.approx(trace, rel=1e-5), name
    full = quant.under("hessian/")
    assert len(full) == 3
    for name, want in full.items():
        np.testing.assert_allclose(hessians[name], want, atol=1e-5 * np.abs(want).max())


def test_no_batch_is_an_error(case):
    with pytest.raises(GolfError, match="gptq_batches"):
        collect_hessians(case.config, case.params, [], make_mesh(1))
