"""Eight fake CPU devices for every test, quick compilation in the default run, both set before jax is imported; the reference data."""

import importlib.metadata
import os
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """The default tests spend their time in compilation, so XLA optimises less there; `-m slow` compiles as a user's run does."""
    flags = ["--xla_force_host_platform_device_count=8"]
    if "not slow" in config.option.markexpr:
        flags += [
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
        if importlib.metadata.version("jaxlib").startswith("0.10."):  # the only version that knows this one, and ends where it does not
            flags += ["--xla_cpu_use_fusion_emitters=false"]
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(given + [flag for flag in flags if flag not in given])
    os.environ["JAX_PLATFORMS"] = "cpu"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The reference data beside the clone (`../shared`); the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference data in ../shared, which is not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def references() -> Path:
    """The portable reference sets that the repository carries."""
    return Path(__file__).resolve().parent / "reference"


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache of compiled programs, for this process (`quick_compilation`) and for those that tests start."""
    base = tmp_path_factory.getbasetemp()  # with -n, one folder per worker inside that of the session
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (shared / "programs").mkdir(exist_ok=True)
    return shared / "programs"


@pytest.fixture(scope="module")
def quick_compilation(programs: Path):
    """Tests that spend their time in compilation: no optimizations, and each program is compiled once per session."""
    import jax

    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(programs),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
