"""The code bundle is reproducible, reversible, complete enough to run alone, and holds nothing it does not need."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import golf_jax
from golf_jax.artifact import ArtifactError, pack
from golf_jax.artifact.code import bundle, module_sources, raw_code_bytes, unbundle
from golf_jax.config import GolfError
from golf_jax.quant import QTensor

ROOT = Path(golf_jax.__file__).parents[1]


def test_bundle_is_reproducible_and_reversible():
    data = bundle("golf_jax.artifact", "configs.pr638")
    assert data == bundle("golf_jax.artifact", "configs.pr638")
    sources = unbundle(data)
    for path, source in sources.items():
        assert source == (ROOT / path).read_text(encoding="utf8")
    assert raw_code_bytes(data) == sum((ROOT / path).stat().st_size for path in sources)
    assert len(data) < raw_code_bytes(data) / 2


def test_bundle_follows_imports_and_takes_nothing_else():
    sources = module_sources(["golf_jax.artifact", "configs.pr638"])
    assert {"golf_jax/artifact/container.py", "golf_jax/quant/gptq.py", "golf_jax/config/model.py", "configs/pr638.py"} <= set(sources)
    assert not {p for p in sources if p.startswith(("golf_jax/data", "golf_jax/training", "tests"))}
    assert "configs/pr372.py" not in sources


def test_bundle_runs_on_its_own(tmp_path):
    """From an empty folder, without this checkout on the path: only its dependencies are installed."""
    q = QTensor("int6", "float32", codes=np.ones((2, 3), np.int8), scale=np.ones(2, np.float16))
    (tmp_path / "m.golf").write_bytes(pack({"made": "here"}, {"w": q}, "zstd", 3))
    (tmp_path / "b.pyz").write_bytes(bundle("golf_jax.artifact"))
    command = [sys.executable, "-I", "b.pyz", "m.golf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"made": "here"' in done.stdout


def test_wrong_bundles_are_named(tmp_path):
    with pytest.raises(GolfError, match="no module golf_jax.nothing"):
        bundle("golf_jax.nothing")
    with pytest.raises(ArtifactError, match="not a code bundle"):
        unbundle(b"PK nonsense")
    with zipfile.ZipFile(tmp_path / "z", "w") as z:
        z.writestr("other", "x")
    with pytest.raises(ArtifactError, match="not a code bundle"):
        unbundle((tmp_path / "z").read_bytes())
