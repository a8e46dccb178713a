"""The ledger adds up to the file, the estimate is close, and the viewer never shows a traceback."""

import subprocess
import sys

import numpy as np
import pytest
from reference_quant import RECIPES, stored

from golf_jax.artifact import pack
from golf_jax.artifact.__main__ import main
from golf_jax.artifact.code import bundle
from golf_jax.artifact.ledger import HEADER_ALLOWANCE, ByteLedger, estimate_bytes, ledger
from golf_jax.config import CAP_BYTES
from golf_jax.interop.reference import Set
from golf_jax.quant import QTensor


def model(rows=512):
    rng = np.random.default_rng(0)
    codes = np.clip(np.rint(4 * rng.standard_normal((rows, 256))), -31, 31).astype(np.int8)
    return {
        "blocks.0.mlp.fc.weight": QTensor("int6", "float32", codes=codes, scale=rng.random(rows).astype(np.float16)),
        "skip_weights": QTensor("float16", "float32", values=rng.random((5, 64)).astype(np.float16)),
    }


@pytest.mark.parametrize("compressor, level", [("zstd", 22), ("lzma", 6), ("brotli", 11), ("rans", 11)])
def test_every_byte_is_in_the_ledger(compressor, level):
    data = pack({"a": [1, 2]}, model(), compressor, level)
    book = ledger(data, code_bytes=1000)
    assert book.model_bytes == len(data)
    assert book.total_bytes == len(data) + 1000
    assert book.headroom_bytes == CAP_BYTES - len(data) - 1000
    assert [line.label for line in book.lines] == ["int6 mlp.fc", "scales", "float16"]
    codes = book.lines[0]
    assert codes.items == 512 * 256
    assert 0.98 * codes.entropy_bytes < codes.stored_bytes < 1.05 * codes.entropy_bytes
    # sigma 4 in code units: log2(4 sqrt(2 pi e)) = 4.05 bits per code
    assert codes.entropy_bytes == pytest.approx(512 * 256 * 4.05 / 8, rel=0.01)


def test_the_estimate_is_close_for_the_reference_models(shared):
    """Tiny models have large headers, so that allowance is taken out on both sides."""
    for pr in RECIPES:
        case = Set(shared / "reference" / pr).case("quant/main")
        config, codes = case.recipe.quant, stored(case)
        book = ledger(pack({}, codes, config.compressor, config.level))
        actual = book.model_bytes - book.header_bytes
        assert estimate_bytes(codes, config.compressor) - HEADER_ALLOWANCE == pytest.approx(actual, rel=0.03), pr


def test_over_the_cap_is_said():
    assert "OVER CAP" in ByteLedger((), 100, 0, cap_bytes=99).table()
    assert "OVER" not in ByteLedger((), 100, 0, cap_bytes=100).table()


def test_viewer_shows_header_streams_and_code(tmp_path, capsys):
    data, code = pack({"recipe": "tiny"}, model(), "zstd", 3), bundle("golf_jax.artifact")
    (tmp_path / "m.golf").write_bytes(data)
    (tmp_path / "c.pyz").write_bytes(code)
    assert main([str(tmp_path / "m.golf"), "--code", str(tmp_path / "c.pyz"), "--tensors"]) == 0
    out = capsys.readouterr().out
    for text in ('"recipe": "tiny"', "int6 mlp.fc", "blocks.0.mlp.fc.weight", f"{len(data) + len(code):,}", "of source", "headroom"):
        assert text in out


def test_viewer_takes_a_run_directory_and_counts_its_code(tmp_path, capsys):
    data, code = pack({}, model(), "zstd", 3), bundle("golf_jax.artifact")
    (tmp_path / "artifact.golf").write_bytes(data)
    (tmp_path / "code.pyz").write_bytes(code)
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{CAP_BYTES - len(data) - len(code):,}" in out
    assert max(map(len, ledger(data, len(code)).table().splitlines())) <= 80


def test_viewer_refuses_bad_files_in_one_line(tmp_path):
    (tmp_path / "bad.golf").write_bytes(pack({}, model(), "zstd", 3)[:-1])
    for name in ("bad.golf", "none.golf"):
        done = subprocess.run([sys.executable, "-m", "golf_jax.artifact", str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and name in done.stderr
