"""Eight fake CPU devices for every test, set before jax is imported, and the optional reference data."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data beside the clone (`../shared`); the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference data in ../shared, which is not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def golden() -> Path:
    """The small reference tensors the repository carries."""
    return GOLDEN
