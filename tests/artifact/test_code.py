"""The code bundle is reproducible, reversible, complete enough to run alone, and holds nothing it does not need."""

import ast
import bz2
import io
import lzma
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import golf_jax
from golf_jax.artifact import ArtifactError, pack
from golf_jax.artifact.code import FOLDERS, _imports, bundle, module_sources, raw_code_bytes, unbundle
from golf_jax.config import GolfError
from golf_jax.quant import QTensor

ROOT = Path(golf_jax.__file__).parents[1]


def _checkout(path: str) -> Path:
    """Where a module of the bundle lies in the repository: golf_jax.kernels and golf_jax.configs are top-level folders there."""
    inside = ROOT / path
    return inside if inside.exists() else ROOT / path.removeprefix("golf_jax/")


def test_a_foreign_folder_of_the_same_name_changes_nothing(tmp_path):
    """`kernels` and `configs` are common names: what lies in the working directory must not be taken for ours."""
    for name in ("kernels", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    program = "from golf_jax.artifact.code import bundle; import sys; sys.stdout.buffer.write(bundle('golf_jax.train'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == bundle("golf_jax.train")


@pytest.mark.slow
def test_the_wheel_holds_one_package(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"golf_jax"}
    shipped = {name for name in names if name.endswith(".py")}
    folders = {"golf_jax": "golf_jax", "kernels": "golf_jax/kernels", "configs": "golf_jax/configs"}
    assert shipped == {f"{to}/{p.relative_to(ROOT / at).as_posix()}" for at, to in folders.items() for p in (ROOT / at).rglob("*.py")}


def test_bundle_is_reproducible_and_reversible():
    data = bundle("golf_jax.artifact", "golf_jax.configs.pr638")
    assert data == bundle("golf_jax.artifact", "golf_jax.configs.pr638")
    sources = unbundle(data)
    for path, source in sources.items():
        assert source == _checkout(path).read_text(encoding="utf8")
    assert raw_code_bytes(data) == sum(_checkout(path).stat().st_size for path in sources)
    assert len(data) < raw_code_bytes(data) / 2


def test_bundle_follows_imports_and_takes_nothing_else():
    sources = module_sources(["golf_jax.artifact", "golf_jax.configs.pr638"])
    needed = {"artifact/container.py", "quant/gptq.py", "config/model.py", "configs/pr638.py"}
    assert {f"golf_jax/{name}" for name in needed} <= set(sources)
    assert not {p for p in sources if p.startswith(("golf_jax/data", "golf_jax/training", "tests"))}
    assert "golf_jax/configs/pr372.py" not in sources


def test_imports_are_read_as_a_parser_reads_them():
    """In every source of this project, and where they stand in more lines than one, behind others or in a comment."""

    def parsed(source: str) -> set[str]:
        nodes = list(ast.walk(ast.parse(source)))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                up = ["golf_jax", "data"][: 3 - node.level] if node.level else []
                module = ".".join([*up, *filter(None, [node.module])])
                names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        return names

    odd = """from .shards import (  # of it, (a, b
    one,  # the first, and only
    two as three,
)
if True:
    import os, json as j; x = 1
# import never
from . import text
from .. import config  # import not
import a.b
from golf_jax.mesh import rows; y = 2
"""
    for source in [odd, *(path.read_text(encoding="utf8") for folder in FOLDERS.values() for path in folder.rglob("*.py"))]:
        assert _imports(source, "golf_jax.data") == parsed(source)


def test_what_a_compiler_reads_is_taken_whole():
    sources = module_sources(["golf_jax.kernels.native.library"])
    compiled = {path: text for path, text in sources.items() if not path.endswith(".py")}
    read = {f"{path.rpartition('/')[0]}/{name}" for path, text in compiled.items() for name in re.findall('#include "([^"/]+)"', text)}
    assert read and read < set(compiled)


def test_a_run_ships_neither_the_corpus_nor_what_writes_text():
    """Both are loaded by name; a recipe that trains on the embedded corpus names it."""
    sources, optional = (
        module_sources(["golf_jax.train"]),
        {"golf_jax/data/corpus.py", "golf_jax/data/build.py", "golf_jax/model/decode.py"},
    )
    assert not optional & set(sources) and "golf_jax/pipeline.py" in sources


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


@pytest.mark.parametrize(
    ("packed", "method"),
    [
        (bz2.compress(bytes(1 << 27)), zipfile.ZIP_STORED),  # 150 bytes
        (bz2.compress(b'{"a.py": "x"}'), zipfile.ZIP_DEFLATED),
        (bz2.compress(b'{"a.py": "x"}')[:-9], zipfile.ZIP_STORED),
        *((bz2.compress(raw), zipfile.ZIP_STORED) for raw in (b"null", b"[1]", b'{"a.py": 5}', b'{"a.py": "\\ud800"}')),
    ],
)
def test_sources_of_another_form_or_without_bound_are_refused(packed, method):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as z:
        z.writestr("source.bz2", packed)
    encrypted = bytearray(out.getvalue())
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    for data in (out.getvalue(), bytes(encrypted)):
        with pytest.raises(ArtifactError, match="not a code bundle"):
            raw_code_bytes(data)


def test_a_bundle_of_an_earlier_version_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "z", "w") as z:
        z.writestr("source.xz", lzma.compress(b'{"a.py": "x = 1"}'))
    assert unbundle((tmp_path / "z").read_bytes()) == {"a.py": "x = 1"}
