"""Hessians of GPTQ against those of PR 2005's own hooks."""

import json

import numpy as np
import pytest
from evaluation.golden_models import Portable

from golf_jax.artifact.calibration import collect_hessians
from golf_jax.config import GolfError
from golf_jax.mesh import make_mesh


@pytest.fixture(scope="module")
def case(golden):
    return Portable(2005, golden)


def test_hessians_equal_the_reference(case):
    hessians = collect_hessians(case.config, case.params, case.z["calibration_tokens"], make_mesh(1))
    for name, trace in json.loads(str(case.z["hessian_trace_json"])).items():
        assert np.trace(hessians[name].astype(np.float64)) == pytest.approx(trace, rel=1e-5), name
    full = [k for k in case.z if k.startswith("hessian/")]
    assert len(full) == 3
    for key in full:
        want = case.z[key]
        np.testing.assert_allclose(hessians[key.removeprefix("hessian/")], want, atol=1e-5 * np.abs(want).max())


def test_padding_and_devices_do_not_matter(case):
    config = case.config
    batches = case.z["calibration_tokens"][:1, :3]  # 3 rows on 2 devices
    one, two = (collect_hessians(config, case.params, batches, make_mesh(n)) for n in (1, 2))
    for name, h in one.items():
        np.testing.assert_allclose(two[name], h, atol=1e-5 * np.abs(h).max(), err_msg=name)


def test_no_batch_is_an_error(case):
    with pytest.raises(GolfError, match="gptq_batches"):
        collect_hessians(case.config, case.params, [], make_mesh(1))
