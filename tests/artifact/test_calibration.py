"""Hessians of GPTQ against those of PR 2005's own hooks."""

import numpy as np
import pytest
from evaluation.reference_models import Portable

from golf_jax.artifact.calibration import collect_hessians
from golf_jax.config import GolfError
from golf_jax.mesh import make_mesh


@pytest.fixture(scope="module")
def case(references):
    return Portable(2005, references)


def test_hessians_equal_the_reference(case):
    quant = case.refs.case("quant/main")
    hessians = collect_hessians(case.config, case.params, quant.own["calibration"], make_mesh(1))
    traces = {name: facts["trace"] for name, facts in quant.settings["tensors"].items() if "trace" in facts}
    assert len(traces) == 67
    for name, trace in traces.items():
        assert np.trace(hessians[name].astype(np.float64)) == pytest.approx(trace, rel=1e-5), name
    full = quant.under("hessian/")
    assert len(full) == 3
    for name, want in full.items():
        np.testing.assert_allclose(hessians[name], want, atol=1e-5 * np.abs(want).max())


def test_padding_and_devices_do_not_matter(case):
    config = case.config
    batches = case.refs.case("quant/main").own["calibration"][:1, :3]  # 3 rows on 2 devices
    one, two = (collect_hessians(config, case.params, batches, make_mesh(n)) for n in (1, 2))
    for name, h in one.items():
        np.testing.assert_allclose(two[name], h, atol=1e-5 * np.abs(h).max(), err_msg=name)


def test_no_batch_is_an_error(case):
    with pytest.raises(GolfError, match="gptq_batches"):
        collect_hessians(case.config, case.params, [], make_mesh(1))
